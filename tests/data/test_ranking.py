"""Pairs with margins and rankings of several completions: what they may look like, and what is refused."""

import json

import numpy as np
import pytest

from jaxalign.data import DataConfig, encode, load, normalise
from jaxalign.data.formats import Bad

PAIR = {"prompt": "The sky is", "chosen": " blue", "rejected": " deep and deep"}
RANKED = {"prompt": "The sky is", "completions": [" blue", " deep and deep", " the sea is"]}
CONFIG = DataConfig("unused")


def ranking(row, **columns):
    found = normalise({**row, **columns}, "ranking")
    return found["ranks"], found["margins"]


def test_ranks_and_scores():
    assert ranking(PAIR) == ([0, 1], [0.0, 0.0])
    assert ranking(PAIR, margin=1.5, score=3) == ([0, 1], [1.5, 0.0])
    assert ranking(RANKED) == ([0, 1, 2], [0.0] * 3)
    assert ranking(RANKED, ranks=[2, 7.5, 1])[0] == [1, 2, 0]
    assert ranking(RANKED, scores=[2, 7.5, 2])[0] == [1, 0, 1]
    assert ranking(RANKED, scores=[1e300, -3, 10**12])[0] == [0, 2, 1]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({**PAIR, "margin": "much"}, "wrong type"),
        ({**PAIR, "margin": float("nan")}, "wrong type"),
        ({**PAIR, "rejected": " blue"}, "identical pair"),
        ({**RANKED, "completions": " blue"}, "wrong type"),
        ({**RANKED, "completions": [" blue"]}, "wrong number"),
        ({**RANKED, "completions": [f" {i}" for i in range(8)]}, "wrong number"),
        ({**RANKED, "completions": [" blue", [{"role": "assistant", "content": "a"}]]}, "mixed forms"),
        ({**RANKED, "completions": [" blue", 3, " deep"]}, "wrong type"),
        ({**RANKED, "ranks": [1, 2]}, "wrong number"),
        ({**RANKED, "ranks": [1, 2, True]}, "wrong type"),
        ({**RANKED, "scores": [1, 10**400, 2]}, "wrong type"),
        ({**RANKED, "scores": [4, 4, 4]}, "no pair"),
        ({**RANKED, "ranks": [1, 2, 3], "scores": [3, 2, 1]}, "ambiguous ranking"),
        ({**RANKED, "labels": [True, False, True]}, "ambiguous ranking"),
        ({"completions": [" blue", " deep"]}, "missing column"),
        ({**RANKED, "completions": [" blue", "", " deep"]}, "empty completion"),
        ({**RANKED, "completions": [" blue", " deep", " blue"]}, "identical pair"),
        ({**RANKED, "completions": [" blue", " deep", " blue" * 300]}, "too long"),
    ],
)
def test_bad_rankings(chatml, row, kind):
    with pytest.raises(Bad) as caught:
        encode(chatml, row, "ranking", DataConfig("unused", max_length=200))
    assert caught.value.kind == kind


def test_equal_completions_of_one_rank_are_no_problem(chatml):
    row = {**RANKED, "completions": [" blue", " deep", " blue"], "scores": [2, 1, 2]}
    assert encode(chatml, row, "ranking", CONFIG)["ranks"].tolist() == [0, 1, 0]


def test_a_problem_names_the_completion(chatml):
    with pytest.raises(Bad, match=r"`completions\[1\]` has no text"):
        encode(chatml, {**RANKED, "completions": [" blue", " ", " deep"]}, "ranking", CONFIG)
    with pytest.raises(Bad, match=r"completions\[0\] and completions\[2\] are the same tokens"):
        encode(chatml, {**RANKED, "completions": [" blue", " deep", " blue"]}, "ranking", CONFIG)


def test_pairs_are_encoded_as_for_preference(chatml):
    """The same tokens as the pair's own encoding, texts and messages, whole and cut."""
    message = [{"role": "assistant", "content": "Yes, certainly. The sky is blue"}]
    chat = {
        "prompt": [{"role": "user", "content": "The sky?"}],
        "chosen": message,
        "rejected": [{"role": "assistant", "content": "No"}],
    }
    for row in (PAIR, chat):
        for config in (CONFIG, DataConfig("unused", max_length=24, truncation_mode="keep_end")):
            pair = encode(chatml, row, "preference", config)
            ranked = encode(chatml, {**row, "margin": 2}, "ranking", config)
            listed = {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]], "scores": [-1, 3]}
            again = encode(chatml, listed, "ranking", config)
            assert ranked["prompt_ids"].tolist() == again["prompt_ids"].tolist() == pair["prompt_ids"].tolist()
            assert ranked["completion_ids"].tolist() == [*pair["chosen_ids"], *pair["rejected_ids"]]
            assert again["completion_ids"].tolist() == [*pair["rejected_ids"], *pair["chosen_ids"]]
            assert ranked["sizes"].tolist() == [len(pair["chosen_ids"]), len(pair["rejected_ids"])]
            assert (ranked["ranks"].tolist(), again["ranks"].tolist()) == ([0, 1], [1, 0])
            assert (ranked["margins"].tolist(), ranked["margins"].dtype) == ([2.0, 0.0], np.float32)


def test_a_file_of_both(chatml, write):
    rows = [{**PAIR, "margin": 0.25}, RANKED, {**RANKED, "scores": [0, 0, 1]}, {**RANKED, "scores": [0, 0, 0]}]
    path = write("a.jsonl", *rows)
    with pytest.raises(ValueError, match=r"a\.jsonl:4: no pair: all `scores` are equal"):
        load(DataConfig(path), chatml, "ranking")
    train = load(DataConfig(path, on_bad="drop"), chatml, "ranking").train
    assert [each["ranks"].tolist() for each in train] == [[0, 1], [0, 1, 2], [1, 1, 0]]
    assert [each["margins"].tolist() for each in train] == [[0.25, 0], [0] * 3, [0] * 3]
    totals = [len(each["prompt_ids"]) + len(each["completion_ids"]) for each in train]
    assert train.lengths["total"].tolist() == totals
    assert set(train.lengths) == {"prompt", "completion", "total"}
    for each, row in zip(train, rows, strict=False):
        for name, values in encode(chatml, row, "ranking", CONFIG).items():
            np.testing.assert_array_equal(each[name], values)


def test_columns_that_do_not_serve(chatml, write):
    path = write("a.jsonl", json.dumps({"completions": [" a", " b"]}))
    with pytest.raises(ValueError, match=r"needed: `chosen` and `rejected`.* or `prompt` and `completions`"):
        load(DataConfig(path), chatml, "ranking")
