"""KTO, BCO and APO-zero through a run: from folder to folder, evaluated, stopped, and continued bit for bit."""

import json
import shutil

import numpy as np
import pytest

from jaxalign import models
from jaxalign.config import parse_config
from jaxalign.run import check_data, evaluate_stage, pick_stage, prepare, run
from jaxalign.training.timings import TIMINGS
from tests.run.conftest import TEXT
from tests.run.test_run import COMMON, lines

METRICS = {f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
METRICS |= {"rewards/margins", "entropy"}
OWN = {"kto": {"kl"}, "bco": {"delta"}}


@pytest.fixture(scope="session")
def thumbs(tmp_path_factory):
    """43 rows, short answers up and long ones down, labels written in all ways; and 4 pairs among them."""
    rng = np.random.default_rng(2)

    def text(low, high):
        return " " + " ".join(rng.choice(TEXT.split(), rng.integers(low, high)))

    rows = []
    for i in range(43):
        good = i % 5 < 3
        label = ([True, 1, "true"] if good else [False, 0, "False"])[i % 3]
        rows.append({"prompt": text(2, 12)[1:], "completion": text(1, 6) if good else text(6, 20), "label": label})
    rows += [{"prompt": text(2, 12)[1:], "chosen": text(1, 6), "rejected": text(6, 20)} for _ in range(4)]
    path = tmp_path_factory.mktemp("data") / "thumbs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def unpaired(settings, thumbs):
    settings["data"]["path"] = str(thumbs)
    settings["method"] = {"name": "kto"}
    settings["model"]["reference"] = settings["model"]["path"]
    return settings


def untimed(folder):
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines(folder)]


@pytest.mark.parametrize("method", ["kto", pytest.param("bco", marks=pytest.mark.slow)])
def test_from_thumbs_to_a_policy_and_on_from_a_checkpoint(unpaired, method):
    """With partial last batches; what is cut off after a checkpoint comes again bit for bit."""
    unpaired["method"] = {"name": method, "desirable_weight": 0.8}
    unpaired["train"] |= {"max_steps": 9, "micro_batch_size": 4, "row_length": "auto"}
    result = run(parse_config(unpaired))
    folder, found = result.folder, untimed(result.folder)
    trained, evaluated = found[0], next(line for line in found if "eval_loss" in line)
    assert (
        METRICS | COMMON | OWN[method] <= trained.keys()
        and not trained.keys() & (OWN["kto"] | OWN["bco"]) - OWN[method]
    )
    assert evaluated.keys() >= {f"eval_{name}" for name in METRICS | OWN[method]}
    margins = [line["rewards/margins"] for line in found if "rewards/margins" in line]
    assert margins[-1] > max(margins[0], 0.05)
    weights = (folder / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "export")
    shutil.rmtree(folder / "checkpoints" / "9")
    kept = {int(each.name) for each in (folder / "checkpoints").iterdir() if each.name.isdigit()}
    assert kept and max(kept) < 9
    again = run(parse_config(unpaired))
    assert again.folder == folder and untimed(folder) == found
    assert (folder / "export" / "model.safetensors").read_bytes() == weights
    stage = pick_stage(parse_config(unpaired), None)
    judged = evaluate_stage(stage, str(folder / "export"), say=lambda line: None)
    last = [line for line in found if "eval_loss" in line][-1]
    assert judged["rewards/margins"] == pytest.approx(last["eval_rewards/margins"], rel=1e-3)
    if method == "bco":  # the mean reward over what is judged, not the running one of the training
        held_out = prepare(stage).data.eval
        assert held_out is not None
        mean = np.where(held_out.labels, judged["rewards/chosen"], judged["rewards/rejected"]).mean()
        assert judged["delta"] == pytest.approx(mean, rel=1e-4) and judged["delta"] != last["eval_delta"]
        assert judged["loss"] != pytest.approx(last["eval_loss"], rel=1e-4)
    else:
        assert judged["loss"] == pytest.approx(last["eval_loss"], rel=1e-3)


def test_precomputed_and_live_references_agree(unpaired):
    """Of APO-zero, which has no metric of its own; `shuffle` mixes what was computed in the data's order."""
    unpaired["data"] |= {"eval_ratio": None}
    unpaired["train"] = {"batch_size": 12, "micro_batch_size": 6, "max_steps": 4}
    found = []
    for name, early in (("live", False), ("cached", True)):
        method = {"name": "apo_zero_unpaired", "precompute_ref_log_probs": early}
        found.append(untimed(run(parse_config({**unpaired, "name": name, "method": method})).folder))
    for one, other in zip(*found, strict=True):
        assert not one.keys() & {"kl", "delta"}
        for name in one.keys() & {*METRICS, "loss"}:
            assert other[name] == pytest.approx(one[name], abs=2e-4), name


def test_early_stopping(unpaired):
    unpaired["optimizer"]["learning_rate"] = 0.5  # makes everything worse
    unpaired["train"] |= {"max_steps": 30, "eval_steps": 1, "early_stopping_patience": 2}
    result = run(parse_config(unpaired))
    assert result.stages[0].reason == "early_stopped" and models.load(result.folder / "export")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": {"batch_size": 1, "micro_batch_size": 1}},
            "leaves one of the .* training examples alone in a batch",
        ),
        ({"train": {"batch_size": 19, "micro_batch_size": 19}}, "leaves one of the 39 training examples alone"),
        ({"method": {"precompute_ref_log_probs": True}}, "method: precompute_ref_log_probs: kto compares"),
        ({"method": {"loss_type": "bco_pair"}}, "loss_type 'bco_pair' is unknown; known: kto, bco"),
        ({"train": {"metric_for_best_model": "rewards/accuracies"}}, "there is no 'rewards/accuracies'.*eval_kl"),
    ],
)
def test_what_cannot_be(unpaired, changes, message):
    for section, values in changes.items():
        unpaired[section] = {**unpaired.get(section, {}), **values}
    with pytest.raises(ValueError, match=message):
        run(parse_config(unpaired))


def test_labels_that_are_all_the_same(unpaired, tmp_path):
    path = tmp_path / "up.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "a", "completion": f" {i}", "label": True}) + "\n" for i in range(20))
    )
    unpaired["data"] = {"path": str(path), "max_length": 128}
    stage = pick_stage(parse_config(unpaired), None)
    for call in (lambda: run(parse_config(unpaired)), lambda: check_data(stage)):
        with pytest.raises(
            ValueError, match=r"all 20 examples are desirable \(label true\), the first is .*up\.jsonl:1"
        ):
            call()


def test_data_check_counts_labels_and_suggests_weights(unpaired, caplog):
    unpaired["data"] |= {"eval_ratio": None}
    found, packing = check_data(pick_stage(parse_config(unpaired), None))
    text = "\n".join(found.report.lines())
    # 27 of 43 rows are desirable, and 4 of the pairs' completions.
    assert "51 of 51 examples can be used" in text and "desirable: 31, undesirable: 20" in text
    assert "method.desirable_weight from 0.645 to 0.86 or method.undesirable_weight from 1.16 to 1.55" in text
    assert packing["efficiency"] > 0.2  # a row per device at least
    assert "method.desirable_weight / method.undesirable_weight is 1; between 0.645 and 0.86" in caplog.text
