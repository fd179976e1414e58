"""Completions with a label: rows of them, and pairs taken apart."""

import json

import numpy as np
import pytest

from jaxalign.data import DataConfig, encode, from_list, inspect, load, normalise, weight_ranges
from jaxalign.data.formats import Bad

ROW = {"prompt": "The sky is", "completion": " blue", "label": True}
PAIR = {"prompt": "The sky is", "chosen": " blue", "rejected": " deep and deep"}
CONFIG = DataConfig("unused")
USER = {"role": "user", "content": "The sky?"}


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("label", "wanted"),
    [(True, 1), (False, 0), (1, 1), (0, 0), (1.0, 1), ("true", 1), ("False", 0), (" TRUE ", 1)],
)
def test_labels(label, wanted):
    assert normalise({**ROW, "label": label}, "unpaired")["labels"] == [wanted]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({**ROW, "label": "good"}, "wrong label"),
        ({**ROW, "label": 2}, "wrong label"),
        ({**ROW, "label": -1}, "wrong label"),
        ({**ROW, "label": float("nan")}, "wrong label"),
        ({**ROW, "label": [True]}, "wrong label"),
        ({**ROW, "label": None}, "missing column"),
        ({**ROW, "completion": ""}, "empty completion"),
        ({**ROW, "completion": [answer("blue")]}, "mixed forms"),
        ({**ROW, "prompt": [USER], "completion": [USER, answer("blue")]}, "repeated prompt"),
        ({**ROW, "completion": " blue" * 300}, "too long"),
        ({**PAIR, "rejected": " blue"}, "identical pair"),
        ({"prompt": "a", "completion": " b"}, "missing column"),
    ],
)
def test_bad_rows(chatml, row, kind):
    with pytest.raises(Bad) as caught:
        encode(chatml, row, "unpaired", DataConfig("unused", max_length=200))
    assert caught.value.kind == kind


def test_both_kinds_of_rows_are_encoded_as_pairs_are(chatml):
    """The same tokens as the pair's own encoding, texts and messages."""
    chat = {"prompt": [USER], "chosen": [answer("Yes, certainly")], "rejected": [answer("No")]}
    for pair in (PAIR, chat):
        wanted = encode(chatml, pair, "preference", CONFIG)
        both = encode(chatml, pair, "unpaired", CONFIG)
        assert both["labels"].tolist() == [1, 0]
        assert both["completion_ids"].tolist() == [*wanted["chosen_ids"], *wanted["rejected_ids"]]
        for label, side in ((True, "chosen"), (False, "rejected")):
            row = {"prompt": pair["prompt"], "completion": pair[side], "label": label}
            single = encode(chatml, row, "unpaired", CONFIG)
            assert single["completion_ids"].tolist() == wanted[f"{side}_ids"].tolist()
            assert single["prompt_ids"].tolist() == both["prompt_ids"].tolist() == wanted["prompt_ids"].tolist()
            assert (single["sizes"].tolist(), single["labels"].tolist()) == ([len(wanted[f"{side}_ids"])], [label])


def test_a_file_of_rows_pairs_and_bad_ones(chatml, write):
    """Every pair is two examples, with its line; a bad row is one problem, with its line."""
    rows = [PAIR, {**ROW, "label": "false"}, {**ROW, "label": "good"}, {**PAIR, "rejected": ""}, PAIR, ROW]
    path = write("a.jsonl", *rows)
    with pytest.raises(ValueError, match=r"2 of 8 examples.*\n.*a\.jsonl:3: wrong label.*\n.*a\.jsonl:4: empty"):
        load(DataConfig(path), chatml, "unpaired")
    data = load(DataConfig(path, on_bad="drop"), chatml, "unpaired")
    train = data.train
    assert train.labels.tolist() == [each["label"].item() for each in train] == [1, 0, 1, 1, 0, 0]
    assert [train.where(i)[1] for i in range(6)] == [1, 2, 5, 6, 1, 5]
    texts = [" blue"] * 4 + [" deep and deep"] * 2
    assert [chatml.decode(each["completion_ids"][:-1]) for each in train] == texts
    assert [set(each) for each in train] == [{"prompt_ids", "completion_ids", "label"}] * 6
    assert train.lengths["completion"].tolist() == [len(each["completion_ids"]) for each in train]
    totals = [len(each["prompt_ids"]) + len(each["completion_ids"]) for each in train]
    assert train.lengths["total"].tolist() == totals and len(set(totals)) > 1
    assert train.select(np.array([4, 2])).labels.tolist() == [0, 1]
    assert data.report.train.labels == {"desirable": 3, "undesirable": 3}
    text = "\n".join(data.report.lines())
    assert "desirable: 3, undesirable: 3" in text
    assert "method.desirable_weight from 1 to 1.33 or method.undesirable_weight from 0.75 to 1, the other" in text


def test_held_out_pairs_stay_together(chatml, write):
    rows = [{**PAIR, "prompt": f"The sky {'blue ' * i}is"} for i in range(9)]
    data = inspect(DataConfig(write("a.jsonl", *rows), eval_ratio=0.4), chatml, "unpaired")
    assert data.eval is not None and len(data.eval) == 8 and len(data.train) == 10
    assert data.report.leaked == 0


def test_weights_that_balance():
    """30 desirable and 10 undesirable: 1 <= 30 w / 10 <= 4/3, so w from 1/3 to 4/9; or 10 v from 22.5 to 30."""
    ranges = weight_ranges(np.repeat([1, 0], [30, 10]))
    assert ranges["desirable_weight"] == pytest.approx((1 / 3, 4 / 9))
    assert ranges["undesirable_weight"] == pytest.approx((2.25, 3))


def test_examples_in_memory():
    examples = from_list(
        [{"prompt_ids": [1, 2], "completion_ids": [3] * (i + 1), "label": i % 2 == 0} for i in range(3)]
    )
    assert examples.labels.tolist() == [1, 0, 1] and examples[1]["label"].tolist() == [0]
    assert examples.lengths["total"].tolist() == [3, 4, 5]


def test_columns_that_do_not_serve(chatml, write):
    path = write("a.jsonl", json.dumps({"prompt": "a", "completion": " b"}))
    with pytest.raises(ValueError, match="needed: `prompt`, `completion` and `label`, or `chosen` and `rejected`"):
        load(DataConfig(path), chatml, "unpaired")
