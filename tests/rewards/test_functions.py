"""The built-in rewards against values derived by hand."""

import json
import time
from decimal import Decimal

import numpy as np
import pytest

from jaxalign.rewards import RewardError, call_rewards, load_reward
from jaxalign.rewards.answers import EXTRACTORS, final_number, last_boxed
from jaxalign.rewards.programs import last_python_block, split_tests


def score(name, completions, options=None, /, **columns):
    prompts = ["a prompt"] * len(completions)
    scores = call_rewards([load_reward(name, options or {})], prompts, completions, columns)[:, 0]
    return [None if np.isnan(one) else one for one in scores.tolist()]


def test_answer_match():
    completions = [" Paris. ", "paris", "Paris, France", "\uff30aris", "**Rome**", "42", "x"]
    references = ["Paris", "PARIS", "Paris", "Paris", ["Milan", "Rome"], 42, None]
    assert score("answer_match", completions, answer=references) == [1, 1, 0, 1, 1, 1, None]
    exact = {"ignore_case": False, "ignore_punctuation": False}
    assert score("answer_match", completions, exact, answer=references) == [0, 0, 0, 1, 0, 1, None]
    with pytest.raises(RewardError, match=r"sample 0.*the reference in the column 'gold' is empty"):
        score("answer_match", ["a"], {"column": "gold"}, gold=[" . "])


def test_answer_match_of_a_part():
    text = "I think.\n<answer>7</answer>\nno: <answer> 8 </answer>\n#### 9\nthe answer is \\boxed{10}\n\n11\n"
    right = {"tag": "8", "marker": "9", "boxed": "10", "last_line": "11", "all": text}
    assert set(right) == set(EXTRACTORS)
    for extract, answer in right.items():
        assert score("answer_match", [text, ""], {"extract": extract}, answer=[answer, "8"]) == [1, 0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = <<48/2=24>>24 clips. 48+24 = 72.\n#### 72", "72"),
        ("#### 72 apples, of which 3", "72"),
        ("#### $1,234.50", "1234.5"),
        ("#### -5", "-5"),
        ("#### \u22125", "-5"),
        ("#### unknown 3\n#### none", None),  # the last marker counts, and has no number
        ("so 10 - 7 = 3", "3"),
        ("7-3", "3"),  # a difference, not minus three
        ("The answer is 12. Check: 12 + 1 = 13", "12"),
        ("Answer: 1,000,000 (or 7)", "1000000"),
        ("We get $\\boxed{\\$18}$ from 20", "18"),
        ("the answer is right; it is twelve", None),
        ("the answer is unclear, 4 or 5?", "4"),
        ("1,2,3", "3"),
        ("costs 12.50.", "12.50"),
        (".5 kg", "0.5"),
        ("", None),
        ("no number", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_gsm8k():
    completions = ["18", "#### 18.0", "It makes $18", "17 18 19", "eighteen"]
    reference = "Janet sells 16 - 3 - 4 = 9 eggs.\n9 * 2 = 18\n#### 18"
    assert score("gsm8k", completions, answer=[reference] * 5) == [1, 1, 1, 0, 0]
    assert score("gsm8k", completions, {"strict": True}, answer=[reference] * 5) == [0, 1, 0, 0, 0]
    assert score("gsm8k", ["1,000", "5"], {"column": "gold"}, gold=[1000.0, None]) == [1, None]
    with pytest.raises(RewardError, match=r"'gsm8k', sample 1 \(starts '5'\): the reference 'none' .* has no number"):
        score("gsm8k", ["5", "5"], answer=["5", "none"])


def test_finding_an_answer_takes_linear_time():
    start = time.monotonic()
    for text in ("1," * 100_000, "<answer>" * 30_000, "\\boxed{" * 30_000, "answer: " * 30_000, "-" * 200_000):
        final_number(text)
        for find in EXTRACTORS.values():
            find(text)
        last_python_block("```python\n" * 10_000 + text)
    assert time.monotonic() - start < 5


def test_boxed_braces_are_balanced():
    assert last_boxed("\\boxed{1} and \\boxed{\\frac{1}{2}} end") == "\\frac{1}{2}"
    assert last_boxed("\\boxed{1") is None and last_boxed("boxed{1}") is None


def test_conversations_are_read_by_their_last_message():
    parts = [{"type": "text", "text": "Par"}, {"type": "text", "text": "is"}]
    completions = [
        [{"role": "assistant", "content": "Paris"}],
        [{"role": "assistant", "content": "Rome"}, {"role": "assistant", "content": parts}],
        [{"role": "assistant", "content": None}],
        [],
    ]
    assert score("answer_match", completions, answer=["Paris"] * 4) == [1, 1, 0, 0]


def test_json_valid():
    completions = [
        '{"a": 1}',
        " [1, 2]\n",
        "7",
        '{"a": 1,}',
        "NaN",
        "",
        "Sure: {}",
        '```json\n{"a": 2}\n```',
        "[" * 10**5,
    ]
    assert score("json_valid", completions) == [1, 1, 1, 0, 0, 0, 0, 1, 0]
    assert score("json_valid", completions[-2:], {"fence": False}) == [0, 0]


def test_json_schema():
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer", "minimum": 2}}}
    completions = ['{"a": 1}', '{"a": 2}', "not json", '{"b": 2}', '```\n{"a": 3}\n```']
    assert score("json_valid", completions, {"schema": schema}) == [0, 1, 0, 0, 1]
    with pytest.raises(ValueError, match="no JSON schema"):
        load_reward("json_valid", {"schema": {"type": "integr"}})
    slow = {"schema": {"pattern": "^(a+)+$"}, "seconds": 0.3}
    with pytest.raises(RewardError, match=r"sample 1 .*longer than 0.3 s"):
        score("json_valid", ['"aa"', json.dumps("a" * 40 + "b")], slow)


def test_regex():
    completions = ["the answer is 4", "THE ANSWER IS 4", "4", "first\nthe answer is 5"]
    pattern = r"^the answer is \d$"
    assert score("regex", completions, {"pattern": pattern}) == [1, 0, 0, 0]
    assert score("regex", completions, {"pattern": pattern, "flags": "im"}) == [1, 1, 0, 1]
    assert score("regex", completions, {"pattern": "the answer", "mode": "match"}) == [1, 0, 0, 0]
    assert score("regex", completions, {"pattern": r"\d", "mode": "fullmatch"}) == [0, 0, 1, 0]


def test_a_regex_that_backtracks_for_ever_is_ended():
    """In a thread of this process it could not be: `re` keeps the interpreter's lock while it matches."""
    start = time.monotonic()
    completions = ["a" * 10, "a" * 40 + "b", "b", "a" * 40 + "c", "aa"]
    options = {"pattern": "^(a+)+$", "seconds": 0.3}
    with pytest.raises(RewardError, match=r"'regex', sample 1 \(starts 'aaaa.*took longer than 0\.3 s"):
        score("regex", completions, options)
    reward = load_reward("regex", options)
    scores = call_rewards([reward], completions, completions, {}, on_error="none")[:, 0]
    np.testing.assert_array_equal(scores, [1, np.nan, 0, np.nan, 1])
    assert time.monotonic() - start < 8


TAGGED = [
    "<think>a</think><answer>b</answer>",
    " <think>a\nb</think>\n\n<answer>c</answer>\n",
    "<think>a</think> so <answer>b</answer>",  # text between
    "<answer>b</answer><think>a</think>",  # order
    "<think>a</think><answer> </answer>",  # empty
    "<think>a</think><think>a</think><answer>b</answer>",  # twice
    "<think>a<answer>b</think></answer>",  # crossed
    "a</think><answer>b</answer>",  # the first tag is missing
    "<think>a</think><answer>b",
    "",
]


def test_format_tags():
    assert score("format_tags", TAGGED) == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    # Of 4 marks, those that occur exactly once.
    partial = [1, 1, 1, 1, 1, 0.5, 1, 0.75, 0.75, 0]
    assert score("format_tags", TAGGED, {"partial": True}) == partial
    opened = [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert score("format_tags", TAGGED, {"opened": True}) == opened
    assert score("format_tags", ["<a>x</a>", "<a>x</b>"], {"tags": ["a"]}) == [1, 0]


def test_length_target():
    ids = [[1] * n for n in (0, 5, 10, 14, 30)]
    texts = ["", "five words are in here", " ".join("ten") * 5, "a", "b"]
    # |0 − 10| / 10, |5 − 10| / 10, 0, 4 / 10, 20 / 10 cut to 1
    assert score("length_target", texts, {"target": 10}, completion_ids=ids) == [-1, -0.5, 0, -0.4, -1]
    above = {"target": 10, "side": "above", "width": 40}
    assert score("length_target", texts, above, completion_ids=ids) == [0, 0, 0, -0.1, -0.5]
    below = {"target": 10, "side": "below", "width": 40}
    assert score("length_target", texts, below, completion_ids=ids) == [-0.25, -0.125, 0, 0, 0]
    assert score("length_target", texts[:2], {"target": 4, "unit": "words"}) == [-1, -0.25]


def test_overlong():
    """Limit 20, cache 4: free up to 16; 17, 18, 19, 20 tokens cost 1/4, 2/4, 3/4, 1; −1 above."""
    ids = [[1] * n for n in (0, 16, 17, 18, 20, 21, 99)]
    options = {"max_completion_length": 20, "soft_punish_cache": 4}
    assert score("overlong", [""] * 7, options, completion_ids=ids) == [0, 0, -0.25, -0.5, -1, -1, -1]


def test_repetition_penalty():
    # 5 words have 3 trigrams, all different; "a a a a" has one twice; 7 words of period 2 have 5, of which 2 distinct.
    completions = ["a b c d e", "A a a a", "x y x y x y x", "a b", ""]
    assert score("repetition_penalty", completions) == pytest.approx([0, -0.5, -0.6, 0, 0])
    options = {"ngram": 2, "max_penalty": 2.0, "unit": "tokens"}
    # Pairs: 12 23 12 -> 2 of 3 distinct; none repeats; one token has none.
    ids = [np.array([1, 2, 3, 1, 2]), [1, 2, 3], [1]]
    assert score("repetition_penalty", ["", "", ""], options, completion_ids=ids) == pytest.approx([-2 * 0.25, 0, 0])


def fenced(code):
    return f"Here it is.\n```python\n{code}\n```\nDone."


def test_python_tests():
    good, half = fenced("def add(a, b):\n    return a + b"), fenced("def add(a, b):\n    return 3")
    completions = [good, half, "def add(a, b): return a + b", fenced("import sys; sys.exit(0)"), good]
    tests = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]
    columns = [tests, json.dumps(tests), tests, tests, None]
    assert score("python_tests", completions, tests=columns) == [1, 0.5, 0, 0, None]
    assert score("python_tests", completions, {"score": "all"}, tests=columns) == [1, 0, 0, 0, None]


def test_rewards_that_end_their_own_work_say_how_long_it_may_take():
    """64 endless programs of 10 s, two at a time, take 320 s and are no failure."""
    longest = load_reward("python_tests", {"workers": 2}).longest
    assert longest is not None and 320 < longest(64) == 32 * longest(1)
    for name, options in (("regex", {"pattern": "a"}), ("json_valid", {"schema": {}})):
        longest = load_reward(name, {**options, "seconds": 7}).longest
        assert longest is not None and longest(64) > 7 * 64 / 16
    assert load_reward("json_valid").longest is None and load_reward("gsm8k").longest is None


def test_python_tests_from_source():
    source = "def helper():\n    return 3\ndef test_a():\n    assert f(1) == helper()\ndef test_b():\n    1 / 0\n"
    check = "def check(candidate):\n    assert candidate(2) == 3\n"
    plain = "assert f(0) == 3\nassert f(1) == OFFSET"
    columns = {"tests": [source, check, plain], "name": [None, "f", None], "setup": ["", "", "OFFSET = 3"]}
    options = {"entry_point_column": "name", "setup_column": "setup"}
    completion = fenced("def f(x):\n    return 3")
    assert score("python_tests", [completion] * 3, options, **columns) == [0.5, 1, 1]


@pytest.mark.parametrize(("tests", "message"), [([], "no tests"), ("", "no tests"), ("def (", "no Python")])
def test_samples_without_tests_are_errors(tests, message):
    with pytest.raises(RewardError, match=f"'python_tests', sample 1 .*{message}"):
        score("python_tests", ["x"] * 2, tests=[["pass"], tests])


def test_the_last_block_is_run():
    text = "```python\nfirst\n```\nand\n```\nsecond\n```\n```bash\nls\n```\n```python\nopen"
    assert last_python_block(text) == "second\n"
    assert last_python_block("```py\nx = '''```'''\n```") == "x = '''```'''\n"
    assert last_python_block("no block") is None


def test_tests_are_split_before_the_code_runs():
    assert split_tests("[1, 2][0]") == ("", ["[1, 2][0]"])  # Python, and no JSON list
    assert split_tests("def check(candidate):\n    pass") == ("", ["def check(candidate):\n    pass"])


def test_math_equivalence():
    pytest.importorskip("math_verify")
    completions = [
        "so $x = \\frac{1}{2}$",
        "\\boxed{0.5}",
        "it is $\\boxed{2}$, I think",
        "no idea",
        "$\\{2, 1\\}$",
        "",
    ]
    references = ["1/2", "\\frac{1}{2}", "3", "3", "$\\{1, 2\\}$", None]
    assert score("math_equivalence", completions, answer=references) == [1, 1, 0, 0, 1, None]
    with pytest.raises(RewardError, match=r"sample 1 .*cannot read the reference ''.*unreadable=none"):
        score("math_equivalence", ["1", "1"], answer=["1", ""])
    assert score("math_equivalence", ["1", "1"], {"unreadable": "none"}, answer=["1", ""]) == [1, None]


def test_mathematics_that_takes_for_ever(caplog):
    pytest.importorskip("math_verify")
    endless = "$9^{9^{9^{9}}}$"
    assert score("math_equivalence", ["$2$", endless], {"seconds": 2}, answer=["2", "7"]) == [1, 0]
    assert "counts as wrong" in caplog.text
    with pytest.raises(RewardError, match=r"sample 0 .*the reference .*took longer than 2 s"):
        score("math_equivalence", ["$7$"], {"seconds": 2}, answer=[endless])


def test_reasoning_gym():
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = reasoning_gym.create_dataset("basic_arithmetic", size=1, seed=3)[0]
    completions = [f"<answer>{entry['answer']}</answer>", "<answer>123456</answer>", entry["answer"]]
    scores = score("reasoning_gym", completions, entry=[entry, json.dumps(entry), entry])
    assert scores == [1, pytest.approx(0, abs=0.5), 0]
