"""The shipped sums are what their scripts write; labels are right, and nothing held out is trained on."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "data" / "arithmetic"
KINDS = ("thumbs", "rankings", "steps")


def rows(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def value(text):
    """What a sum of numbers comes to, from the left."""
    first, *rest = re.findall(r"[+-]?\d+", text.replace(" ", ""))
    return int(first) + sum(map(int, rest))


def is_right(claim):
    left, _, right = claim.rstrip(".").partition(" = ")
    return bool(right) and value(left) == int(right)


@pytest.mark.parametrize("script", ["make", "make_feedback"])
def test_the_scripts_write_these_files(script, tmp_path, monkeypatch):
    found = importlib.util.spec_from_file_location(script, FOLDER / f"{script}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path)
    module.main()
    written = sorted(path.name for path in tmp_path.iterdir())
    assert len(written) == (2 if script == "make" else 6)
    assert all((tmp_path / name).read_bytes() == (FOLDER / name).read_bytes() for name in written)


@pytest.mark.parametrize("kind", KINDS)
def test_no_question_is_on_both_sides(kind):
    train, held_out = ({json.dumps(row["prompt"]) for row in rows(f"{kind}_{part}")} for part in ("train", "held_out"))
    assert len(train) == 160 and len(held_out) == 40 and not train & held_out


def test_the_labels_are_right():
    for row in rows("thumbs_train"):
        assert is_right(row["completion"][0]["content"]) == (row["thumbs"] == "up")
    for row in rows("rankings_train"):
        said = [each[0]["content"] for each in row["completions"]]
        assert [is_right(each) for each in said] == [score == 2 for score in row["scores"]]
        assert ["=" in each for each in said] == [score > 0 for score in row["scores"]]
    labels = []
    for row in rows("steps_train"):
        asked = re.findall(r"is (.*)\?", row["prompt"])[0]
        good = [is_right(step) for step in row["completions"]]
        wrong = good.index(False) if False in good else len(good)
        assert row["labels"] == [i < wrong for i in range(len(good))] and len(good) in (2, 3)
        assert (value(asked) == int(row["completions"][-1].rstrip(".").split(" = ")[1])) == row["labels"][-1]
        labels.append(row["labels"][-1])
    assert 0.4 < sum(labels) / len(labels) < 0.6
