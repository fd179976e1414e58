"""Filters remove exactly what they say, and say where it stood; lengths and margins of pairs."""

import dataclasses
import json

import pytest

from jaxalign.data import DataConfig, Filters, MixturePart, from_list, length_bias, load
from jaxalign.data.filters import FILTERS, normalise_text


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def sifted(path, tokenizer, kind="preference", **options):
    config = options.pop("config", {})
    data = load(DataConfig(path, filters=Filters(**options), **config), tokenizer, kind)
    return data, [(each.line, each.filter) for each in data.removed]


def test_texts_are_normalised():
    assert normalise_text(" The\u00a0SKY\n is \ufb01ne  stra\u00dfe") == "the sky is fine strasse"
    assert normalise_text("\uff21\u0301") == normalise_text("\u00e1")


def test_margins_and_ties(chatml, write):
    path = write(
        "a.jsonl",
        pair("a", " yes", " no", margin=2),
        pair("b", " yes", " no", margin=-1.5),  # |margin| counts
        pair("c", " yes", " no", margin=0.4),
        pair("d", " yes", " no", chosen_score=3.0, rejected_score=3.0),
        pair("e", " Yes  sir", " yes sir", margin=9),
        pair("f", " yes", " no", margin=0.5),
    )
    data, removed = sifted(path, chatml, drop_ties=True, min_margin=0.5)
    assert removed == [(3, "margin"), (4, "ties"), (5, "ties")]
    assert data.report.filters == {"ties": 2, "margin": 1}
    assert [data.train.where(i)[1] for i in range(len(data.train))] == [1, 2, 6]
    assert data.removed[0].reason == "a margin of 0.4; at least 0.5 wanted" and data.removed[0].row["prompt"] == "c"
    assert "filter ties: 2 training examples removed" in data.report.lines()
    assert data.report.train.rows == 3
    again, _ = sifted(path, chatml, "ranking", drop_ties=True, min_margin=0.5)
    assert len(again.train) == 3


def test_a_missing_margin_is_named(chatml, write):
    path = write("a.jsonl", pair("a", " yes", " no", margin=2), pair("b", " yes", " no"))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: filters\.min_margin needs `margin`, or `chosen_score`"):
        sifted(path, chatml, min_margin=1.0)
    assert sifted(path, chatml, drop_ties=True)[1] == []
    with pytest.raises(ValueError, match=r"b\.jsonl:1: wrong type: `margin` is '2'; a finite number expected"):
        sifted(write("b.jsonl", pair("a", " yes", " no", margin="2")), chatml, drop_ties=True)
    with pytest.raises(ValueError, match=r"filters\.drop_ties is for pairs; these are examples of the kind sft"):
        sifted(write("c.jsonl", {"text": "a"}), chatml, "sft", drop_ties=True)


def test_duplicates_after_normalising(chatml, write):
    rows = [
        pair("Why?", " Yes", " No"),
        pair("why?", " YES ", "  no"),  # equal
        pair("Why?", " Yes", " Never"),  # the prompt alone
        pair("\uff37hy?", " Yes", " No"),  # full-width W
        pair("How?", " Yes", " No"),
    ]
    path = write("a.jsonl", *rows)
    data, removed = sifted(path, chatml, deduplicate="example")
    assert removed == [(2, "duplicates"), (4, "duplicates")]
    assert data.removed[1].reason == f"the example of {path}:1 again"
    assert sifted(path, chatml, deduplicate="prompt")[1] == [(n, "duplicates") for n in (2, 3, 4)]
    listed = write("list.json", json.dumps(rows))  # all in line 1
    assert len(sifted(listed, chatml, deduplicate="example")[0].train) == 3


def test_duplicates_among_parts_messages_and_tools(chatml, write):
    user, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Yes"}
    shout = {"role": "assistant", "content": "YES"}
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    one = write("a.jsonl", {"messages": [user, answer]}, {"messages": [user, shout], "tools": tools})
    two = write(
        "b.jsonl", {"prompt": [user], "completion": [shout]}, {"messages": [user, shout]}, {"messages": [user, user]}
    )
    config = DataConfig(
        mixture=(MixturePart(one, format="trl"), MixturePart(two)), filters=Filters(deduplicate="example")
    )
    data = load(config, chatml, "sft")
    assert [(each.file, each.line) for each in data.removed] == [(two, 2)]
    prompts = load(DataConfig(two, filters=Filters(deduplicate="prompt")), chatml, "sft")
    assert [each.line for each in prompts.removed] == [2]  # the third row's prompt is two turns


LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def test_contamination(chatml, write):
    words = LONG.split()
    system = {"role": "system", "content": LONG.upper()}

    def asked(*messages):
        return {"messages": [*messages, {"role": "assistant", "content": "Yes"}]}

    held = write("eval.jsonl", asked(system, {"role": "user", "content": "Why is that?"}), {"text": f"So: {LONG}"})
    rows = [
        asked(system, {"role": "user", "content": "why  IS that?"}),  # the prompt
        asked(system, {"role": "user", "content": "Why is this?"}),  # the system message does not count
        {"text": "Zero " + ", ".join(words[1:]) + "!"},  # 13 words in a row, other punctuation
        {"text": " ".join(words[2:])},  # only 12
        {"text": "How is that?"},
    ]
    path = write("train.jsonl", *rows)
    exact = sifted(path, chatml, "sft", config={"eval_path": held}, decontaminate="exact")
    assert exact[1] == [(1, "contamination")]
    assert exact[0].removed[0].reason == f"the prompt of the evaluation example {held}:1"
    data, removed = sifted(path, chatml, "sft", config={"eval_path": held}, decontaminate="ngram")
    assert removed == [(1, "contamination"), (3, "contamination")]
    assert data.removed[1].reason.startswith(f"13 words of the evaluation example {held}:2: 'two three")
    assert sifted(path, chatml, "sft", config={"eval_path": held}, decontaminate="ngram", ngram=12)[1] == [
        (n, "contamination") for n in (1, 3, 4)
    ]
    with pytest.raises(ValueError, match=r"filters\.decontaminate needs evaluation data"):
        DataConfig(path, filters=Filters(decontaminate="exact"))


def test_what_is_held_out_is_not_in_training(chatml, write):
    rows = [{"prompt": f"Is {i % 10} even?", "completion": f" {i} yes"} for i in range(60)]
    config = {"eval_ratio": 0.1}
    data, removed = sifted(write("a.jsonl", *rows), chatml, "sft", config=config, decontaminate="exact")
    assert data.eval is not None and len(data.eval) == 6 and removed
    assert len(data.train) + len(removed) == 54 and data.report.leaked == 0


def test_lengths(chatml, write):
    path = write(
        "a.jsonl", pair("a", " no", " no no no no"), pair("b", " no no", " no no no"), pair("c", " no", " no no")
    )
    data, _ = sifted(path, chatml)
    sizes = [(len(each["chosen_ids"]), len(each["rejected_ids"])) for each in data.train]
    assert sizes[0][1] > 2 * sizes[0][0] and max(sizes[1]) <= 2 * min(sizes[1])
    assert sifted(path, chatml, max_length_ratio=2.0)[1] == [(1, "length")]
    least = min(map(min, sizes)) + 1
    assert sifted(path, chatml, min_completion_tokens=least)[1] == [
        (i + 1, "length") for i, size in enumerate(sizes) if min(size) < least
    ]
    most = max(map(max, sizes)) - 1
    found, removed = sifted(path, chatml, max_completion_tokens=most)
    assert removed == [(1, "length")]
    assert found.removed[0].reason == f"a completion of {most + 1} tokens; at most {most} wanted"


def test_bad_rows_are_no_filters_business(chatml, write):
    path = write("a.jsonl", pair("a", " yes", " no"), pair("b", "", " no"), pair("a", " yes", " no"))
    with pytest.raises(ValueError, match=r"1 of 2 examples cannot be used.*\n.*a\.jsonl:2: empty completion"):
        sifted(path, chatml, deduplicate="example")
    data, removed = sifted(path, chatml, deduplicate="example", config={"on_bad": "drop"})
    assert removed == [(2, "problem"), (3, "duplicates")] and len(data.train) == 1
    assert data.removed[0].reason == "empty completion: `chosen` has no text"


def test_length_bias_by_hand():
    """Differences 2, 1, 0, -3; margins 1, 0.5, (none), -1 of the first, second and fourth.

    Deviations of 2, 1, -3 are 2, 1, -3; of 1, 0.5, -1 they are 5/6, 2/6, -7/6. Their products add up to 33/6 = 5.5,
    the squares to 14 and 78/36: 5.5 / sqrt(14 · 78/36) = 0.99862.
    """
    sizes = [(4, 2), (3, 2), (2, 2), (1, 4)]
    examples = from_list([{"prompt_ids": [1], "chosen_ids": [5] * a, "rejected_ids": [6] * b} for a, b in sizes])
    bias = length_bias(examples)
    assert bias is not None and bias.correlation is None and bias.margins == 0
    assert (bias.pairs, bias.chosen_longer, bias.equal, bias.mean_difference) == (4, 0.5, 0.25, 0.0)

    class Listed:
        hashes = property(lambda self: {})

        def __getitem__(self, i):
            return [{"margin": 1}, {"chosen_score": 2, "rejected_score": 1.5}, {}, {"margin": -1.0}][i]

        def where(self, i):
            return "", i

    bias = length_bias(dataclasses.replace(examples, rows=Listed()))
    assert bias is not None and bias.margins == 3
    assert bias.correlation == pytest.approx(0.998625, abs=1e-6)
    assert "chosen is longer in 50.0% of 4 pairs, as long in 25.0%, by +0.0 tokens on average" in bias.line()
    assert length_bias(from_list([{"input_ids": [1, 2], "loss_mask": [False, True]}])) is None


def test_length_bias_of_rankings_of_two(chatml, write):
    rows = [
        {"prompt": "a", "completions": [" no", " yes yes yes"], "scores": [0, 1]},
        {"prompt": "b", "completions": [" no", " yes yes yes", " x"]},
        pair("c", " no", " yes yes yes"),
    ]
    bias = length_bias(load(DataConfig(write("a.jsonl", *rows)), chatml, "ranking").train)
    assert bias is not None and (bias.pairs, bias.chosen_longer, bias.mean_difference) == (2, 0.5, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_completion_tokens": 0}, "min_completion_tokens=0 must be at least 1"),
        ({"min_completion_tokens": 5, "max_completion_tokens": 4}, "exceeds max_completion_tokens=4"),
        ({"max_length_ratio": 0.5}, "max_length_ratio=0.5 must be at least 1"),
        ({"min_margin": -1.0}, "must not be negative"),
        ({"deduplicate": "yes"}, "deduplicate='yes': one of example, prompt"),
        ({"decontaminate": "all"}, "decontaminate='all': one of exact, ngram"),
        ({"ngram": 0}, "ngram=0 must be at least 1"),
    ],
)
def test_filters_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Filters(**options)


def test_filters_are_all_off_by_default():
    assert all(make(Filters(), []) is None for make in FILTERS.values())
