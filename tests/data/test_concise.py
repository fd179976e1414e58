"""The concise-answers data set keeps its promises, and the rule that measures it judges hard cases rightly."""

import importlib.util
import json
from pathlib import Path

import pytest

from jaxalign.evaluation.rules import concise, mentions, sentence_ends, violations, words

FOLDER = Path(__file__).parents[2] / "data" / "concise"
FRAME = """a an the is are was were do does did can could would i you me we us my please tell explain describe define
about what what's who why how when where exactly to of keep hearing it best way should mean people by"""
COMMON = "water important need float form make makes cause causes body famous built day grow for use used in and"


def load_make():
    spec = importlib.util.spec_from_file_location("concise_make", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make()


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


TRAIN, HELD_OUT = rows("train"), rows("held_out")


def content(messages: list[dict], role: str) -> str:
    assert [message["role"] for message in messages] == [role]
    return messages[0]["content"]


def normalised(question: str) -> str:
    """Words of the question without its way of asking: 'Can you explain what X is?' and 'What is X?' are equal."""
    return " ".join(word for word in words(question.lower()) if word not in FRAME.split())


def test_counts():
    assert len(TRAIN) >= 360
    assert 70 <= len(HELD_OUT) <= 80
    questions = rows("questions")
    assert len(questions) >= 440
    assert {row["split"] for row in questions} == {"train", "held_out"}


@pytest.mark.parametrize("pairs", [TRAIN, HELD_OUT], ids=["train", "held_out"])
def test_pairs(pairs):
    for row in pairs:
        question = content(row["prompt"], "user")
        chosen, rejected = content(row["chosen"], "assistant"), content(row["rejected"], "assistant")
        assert violations(chosen) == [], question
        assert {"sentences", "too long"} & set(violations(rejected)), question
        assert "\n" not in question
        for text in (question, chosen, rejected):
            assert text == text.strip()
            assert all(character == "\n" or " " <= character <= "~" for character in text), text
        assert len(words(rejected)) <= 80, question


def test_columns():
    assert all(set(row) == {"prompt", "chosen", "rejected"} for row in TRAIN)
    assert all(set(row) == {"prompt", "chosen", "rejected", "keywords"} for row in HELD_OUT)


def test_no_question_or_answer_twice():
    questions = [normalised(content(row["prompt"], "user")) for row in TRAIN + HELD_OUT]
    answers = [content(row["chosen"], "assistant").lower() for row in TRAIN + HELD_OUT]
    assert sorted(set(questions)) == sorted(questions)
    assert sorted(set(answers)) == sorted(answers)


def test_topics_of_the_splits_differ():
    """No held-out question shares more than half of its topic words with a training question."""
    train = [set(normalised(content(row["prompt"], "user")).split()) - set(COMMON.split()) for row in TRAIN]
    for row in HELD_OUT:
        topic = set(normalised(content(row["prompt"], "user")).split()) - set(COMMON.split())
        assert topic
        assert [other for other in train if 2 * len(topic & other) > len(topic)] == []


def test_keywords_judge_the_answer():
    for row in HELD_OUT:
        question, keywords = content(row["prompt"], "user"), row["keywords"]
        assert 1 <= len(keywords) <= 2, question
        assert all(group and all(word == word.lower().strip() != "" for word in group) for group in keywords), question
        assert mentions(content(row["chosen"], "assistant"), keywords), question
        assert not mentions(question, keywords), question


def test_make_reproduces_the_files():
    answers = [make.answers_by_question(rows(Path(name).stem)) for name in make.ANSWERS]
    files = make.build(rows("questions"), answers)
    assert set(files) == {"train.jsonl", "held_out.jsonl"}
    for name, text in files.items():
        assert (FOLDER / name).read_bytes() == text.encode()


def test_make_names_the_question_that_lacks_an_answer():
    prompt = [{"role": "user", "content": "Why?"}]
    question = {"prompt": prompt, "answer": "Because that is how it is.", "split": "train"}
    answers = make.answers_by_question([{"prompt": prompt, "completion": "It\u2019s so. It is. And th"}])
    row = json.loads(make.build([question], [answers])["train.jsonl"])
    assert content(row["rejected"], "assistant") == "It's so. It is."
    with pytest.raises(ValueError, match=r"answers file 2 has no answer to 'Why\?'"):
        make.build([question], [answers, {}])


def test_make_skips_concise_and_foreign_answers():
    assert make.rejected(["It is one short sentence."]) is None
    assert make.rejected(["Das ist grün. Und das auch.", "One here. Two here. Thr"]) == "One here. Two here."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two. Thr", "One. Two."),
        ("Some tips:\n- first tip\n- sec", "Some tips:\n- first tip"),
        ("Some tips:\n\n1. Wash it.\n2. Dr", "Some tips:\n\n1. Wash it."),
        ("no end at all", "no end at all"),
    ],
)
def test_cut(text, expected):
    assert make.cut(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Ice floats because it is less dense than water.",
        "  Ice floats because it is less dense than water.\n",
        "The U.S. Congress has two chambers, the Senate and the House.",
        "She was the first woman elected in the U.S.",
        "Citrus fruits, e.g. lemons and oranges, are rich in vitamin C.",
        "Pi is about 3.14159, and a mile is about 1.6 km.",
        "Dr. Watson is the friend of Sherlock Holmes.",
        "J. R. R. Tolkien wrote The Lord of the Rings.",
        "Martin Luther King Jr. led peaceful protests.",
        "Shops open at 9 a.m. and close at 6 p.m. on weekdays.",
        'His most famous line is "To be, or not to be."',
        "It was his No. 1 hit (and a long one).",
        "Sure-footed goats climb steep rocks with ease.",
        "Water turns to ice at 0 degrees; salt lowers that point.",
    ],
)
def test_concise(text):
    assert violations(text) == []
    assert concise(text)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("", ["empty"]),
        (" \n\t", ["empty"]),
        ("Yes.", ["too short"]),
        ("Ice floats on water. It is less dense.", ["sentences"]),
        ("He moved to the U.S. He stayed there.", ["sentences"]),
        ("It closes at 6 p.m. The bar stays open.", ["sentences"]),
        ("The answer is no. Cats are not dogs.", ["sentences"]),
        ("It was built in 1889. Then it was painted.", ["sentences"]),
        ("What a question! It floats on water.", ["sentences"]),
        ("Ice floats because it is less dense than", ["full stop"]),
        ("Ice floats because it is less dense...", ["full stop"]),
        ("Ice floats because it is less dense!", ["full stop"]),
        ("Buy some citrus fruits, e.g.", ["full stop"]),
        ("Do you want to know why ice floats?", ["question", "full stop"]),
        ("Ice floats on water\nbecause it is less dense.", ["lines"]),
        ("- Ice floats because it is less dense.", ["list"]),
        ("1. Ice floats because it is less dense.", ["list"]),
        ("Wash it 1) by hand and 2) in cold water.", ["list"]),
        ("Ice **floats** because it is less dense.", ["markdown"]),
        ("Use the command `ls` to list files.", ["markdown"]),
        ("Ice is *lighter* than liquid water.", ["markdown"]),
        ("Sure, ice floats because it is less dense.", ["preamble"]),
        ("Here\u2019s why ice floats on liquid water.", ["preamble"]),
        (" ".join(["word"] * 26) + ".", ["too long"]),
    ],
)
def test_violations(text, broken):
    assert violations(text) == broken
    assert not concise(text)


def test_limits_are_inclusive():
    text = " ".join(["word"] * 25) + "."
    assert concise(text)
    assert not concise(text, max_words=24)
    assert concise("Ice floats on water.")
    assert violations("Ice floats on water.", min_words=5) == ["too short"]


def test_words_count_compounds_once():
    assert words("The well-known U.S. firm's 3.5 % - i.e. a 1/4 share") == [
        *("The", "well-known", "U.S", "firm's", "3.5", "i.e", "a", "1/4", "share"),
    ]


def test_sentence_ends_are_offsets():
    text = 'He said "stop." Then he left! (Why?) Nobody knows'
    assert [text[:end][-5:] for end in sentence_ends(text)] == ['top."', "left!", "Why?)"]


def test_mentions():
    assert mentions("Strings VIBRATE loudly.", [["vibrat"]])
    assert not mentions("The environment matters.", [["iron"]])
    assert mentions("A figure of speech.", [["simile", "figure of speech"], ["speech"]])
    assert not mentions("A figure of speech.", [["figure"], ["metaphor"]])
    assert mentions("Anything.", [])
