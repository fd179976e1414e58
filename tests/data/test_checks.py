import json
from dataclasses import replace

import numpy as np
import pytest

from jaxalign.data import DataConfig, Problem, admit, from_list, inspect, load, problems
from jaxalign.data.checks import Report, check, measure

GOOD = [
    {"prompt": f"The sky is blue. {i}", "chosen": f" Yes {'blue ' * i}", "rejected": " No, sorry!"} for i in range(8)
]
BAD = [
    ({**GOOD[0], "chosen": ""}, "empty completion"),
    ('{"prompt": "x"', "wrong JSON"),
    ({**GOOD[0], "rejected": 3.5}, "wrong type"),
    ({"prompt": "x", "chosen": " y"}, "missing column"),
    ({**GOOD[0], "chosen": " same", "rejected": " same"}, "identical pair"),
    ({**GOOD[0], "chosen": ""}, "empty completion"),
]


@pytest.fixture
def mixed(write):
    """A file of good and bad rows, in turn, a blank line among them; the line numbers of the bad ones."""
    lines = [line for good, (bad, _) in zip(GOOD, BAD, strict=False) for line in (good, bad)]
    return write("mixed.jsonl", *lines[:3], "", *lines[3:], *GOOD[6:]), [2, 5, 7, 9, 11, 13]


def test_stop_lists_kinds_files_and_lines(chatml, mixed):
    path, lines = mixed
    with pytest.raises(ValueError) as caught:
        load(DataConfig(path), chatml, "preference")
    message = str(caught.value)
    assert message.startswith("training data: 6 of 14 examples cannot be used, data.on_bad=drop leaves them out: ")
    assert "empty completion (2), " in message and "missing column (1)" in message
    for line, (_, kind) in zip(lines, BAD, strict=True):
        assert f"\n  {path}:{line}: {kind}: " in message
    assert "`rejected` is a number (3.5)" in message


def test_a_long_list_is_cut(chatml, write):
    path = write("a.jsonl", GOOD[0], *[{**GOOD[0], "chosen": ""}] * 25)
    with pytest.raises(ValueError) as caught:
        load(DataConfig(path), chatml, "preference")
    assert str(caught.value).count("\n  " + path) == 10 and str(caught.value).endswith("and 15 more")


def test_drop_leaves_an_index_and_counts(chatml, mixed):
    path, _ = mixed
    data = load(DataConfig(path, on_bad="drop"), chatml, "preference")
    assert [data.train.row(i) for i in range(len(data.train))] == GOOD
    assert [data.train.where(i)[1] for i in range(8)] == [1, 3, 6, 8, 10, 12, 14, 15]
    assert (data.report.train.rows, data.report.train.used) == (14, 8)
    assert data.report.train.problems == {
        "empty completion": 2, "wrong JSON": 1, "wrong type": 1, "missing column": 1, "identical pair": 1
    }  # fmt: skip
    only = load(DataConfig(path, on_bad="drop", split="train[:1]"), chatml, "preference").train
    for name, value in data.train[0].items():
        assert np.array_equal(value, only[0][name])


def test_nothing_left_is_an_error(chatml, write):
    path = write("a.jsonl", *[bad for bad, _ in BAD])
    for on_bad in ("stop", "drop"):
        with pytest.raises(ValueError, match="6 of 6 examples cannot be used, nothing is left: empty completion"):
            load(DataConfig(path, on_bad=on_bad), chatml, "preference")


def test_problems_have_file_and_line(chatml, mixed):
    path, lines = mixed
    found = problems(inspect(DataConfig(path), chatml, "preference").train)
    assert [(p.path, p.line, p.kind) for p in found] == [(path, n, k) for n, (_, k) in zip(lines, BAD, strict=True)]
    assert str(found[0]) == f"{path}:2: empty completion: `chosen` has no text"
    assert str(Problem("f", 3, "kind", "why")) == "f:3: kind: why"


def test_problems_of_the_evaluation_data_stop_too(chatml, write, mixed):
    config = DataConfig(write("good.jsonl", *GOOD), eval_path=mixed[0])
    with pytest.raises(ValueError, match="evaluation data: 6 of 14"):
        load(config, chatml, "preference")


def test_report(chatml, write):
    train = write("train.jsonl", *GOOD, {**GOOD[0], "chosen": ""})
    held = [GOOD[3], {**GOOD[5], "chosen": " other"}, {**GOOD[0], "prompt": "New"}, {**GOOD[2], "rejected": ""}]
    config = DataConfig(train, eval_path=write("eval.jsonl", *held), on_bad="drop")
    seen = []

    def packing(lengths):
        seen.append(lengths)
        return {"efficiency": 0.875}

    data = load(config, chatml, "preference", packing)
    report = data.report
    assert report.leaked == 2 and report.packing == {"efficiency": 0.875}
    assert report.eval is not None and (report.eval.rows, report.eval.used) == (4, 3)
    chosen = [len(data.train[i]["chosen_ids"]) for i in range(8)]
    lengths = report.train.lengths["chosen"]
    assert seen[0]["chosen"].tolist() == chosen
    assert (lengths.tokens, lengths.mean) == (sum(chosen), sum(chosen) / 8)
    assert (lengths.quantiles["min"], lengths.quantiles["max"]) == (min(chosen), max(chosen))
    totals = sum(sum(map(len, data.train[i].values())) for i in range(8))
    assert report.train.lengths["total"].tokens == totals
    again = json.loads(json.dumps(report.to_dict()))
    assert again["train"]["problems"] == {"empty completion": 1}
    text = "\n".join(report.lines())
    assert "train: 8 of 9 examples can be used" in text and f"{train}:9: empty completion" in text
    assert "eval examples whose prompt is in train: 2" in text and "packing efficiency: 0.875" in text
    assert "per bar" not in text
    whole = "\n".join(report.lines(problems=False, histograms=True))
    assert f"{train}:9" not in whole and "\n  empty completion: 1\n" in whole
    assert whole.count("per bar") == sum(len(part.lengths) for part in (report.train, report.eval))


def test_truncation_is_counted(chatml, write):
    path = write("a.jsonl", {"text": "The sky"}, {"text": "The sky is blue and deep. " * 9})
    config = DataConfig(path, max_length=40, truncation_mode="keep_start")
    data = load(config, chatml, "sft")
    whole = load(DataConfig(path), chatml, "sft").train.lengths["total"]
    assert (data.report.train.cut_examples, data.report.train.cut_tokens) == (1, whole[1] - 40)
    assert "truncation shortened 1 examples" in "\n".join(data.report.lines())


@pytest.mark.parametrize("lengths", [[0], [5, 5, 5], [1, 2, 3, 400], list(range(57))])
def test_histograms_hold_every_example_once(lengths):
    found = measure(np.asarray(lengths))
    assert sum(found.counts) == len(lengths) and len(found.counts) <= 21
    assert len(found.edges) == len(found.counts) + 1 and found.edges[-1] > max(lengths)
    width = found.edges[1] - found.edges[0]
    for edge, count in zip(found.edges, found.counts, strict=False):
        assert count == sum(edge <= n < edge + width for n in lengths)


def test_a_histogram_is_a_line():
    part = replace(check(from_list([{"prompt_ids": [1], "completion_ids": [2]}])).train, lengths={})
    lengths = {"total": measure(np.asarray([0] * 16 + [1, 3] + [4] * 8))}
    lines = Report(replace(part, lengths=lengths)).lines(histograms=True)
    assert lines[-1] == "    0 |█▁ ▁▄| 5, 1 token(s) per bar, at most 16 example(s) in one"


def test_examples_in_memory_can_be_checked():
    examples = from_list([{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}] * 3)
    assert check(examples).train.lengths["total"].tokens == 15
    assert admit(examples, "stop").index.tolist() == [0, 1, 2]
