"""Every preference loss and preset takes a step from a config, the policy loaded once; TR-DPO resumes exactly."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign import models
from jaxalign.config import parse_config
from jaxalign.losses import PREFERENCE_LOSSES, REFERENCE_FREE_LOSSES
from jaxalign.methods import METHODS, PRESETS
from jaxalign.methods.moving_reference import FollowingSource
from jaxalign.run import RunResult, run
from jaxalign.training.timings import TIMINGS

NAMES = {name: {"name": name} for name, (method, _) in PRESETS.items() if METHODS[method].KIND == "preference"}
OTHERS = {
    "ipo_sum": {"name": "preference", "loss_type": "ipo_sum"},
    "bco_pair": {"name": "preference", "loss_type": "bco_pair"},
    "sft": {"name": "preference", "loss_type": "sft"},
    "f-DPO": {"name": "dpo", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "cpo hinge": {"name": "cpo", "loss_type": "hinge"},
    "cpo ipo": {"name": "cpo", "loss_type": "ipo"},
}


@pytest.fixture
def quick(settings):
    """One step."""
    settings["model"] |= {"remat": "none"}
    settings["data"] |= {"split": "train[:4]", "eval_ratio": None}
    settings["train"] = {"batch_size": 4, "max_steps": 1}
    settings["log"] = {"logging_steps": 1}
    settings["optimizer"] = {"learning_rate": 1e-3}
    return settings


def export_of(result: RunResult) -> Path:
    export = result.stages[0].export
    assert export is not None
    return Path(export)


def lines(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


def test_every_loss_is_among_them():
    assert CASES.keys() >= KINDS
    configs = [parse_config({"model": {"path": "m"}, "data": {"path": "d"}, "method": each}) for each in CASES.values()]
    used = {"preference": set(), "reference_free": set()}
    for config in configs:
        loss_type = config.stages[0].method.loss_type
        used[config.stages[0].method_name] |= {loss_type} if isinstance(loss_type, str) else set(loss_type)
    assert used == {"preference": set(PREFERENCE_LOSSES), "reference_free": set(REFERENCE_FREE_LOSSES)}


CASES = NAMES | OTHERS
# With a reference and without, coupled over the batch, two losses summed, another divergence. The others differ from
# these in one function of tests/losses, and each preset's step is traced in tests/test_docs.py.
KINDS = {"dpo", "orpo", "aot", "mpo", "f-DPO"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in KINDS else pytest.mark.slow) for n in CASES])
def test_it_takes_a_step(name, quick, tiny, monkeypatch):
    loaded = []
    load = models.load
    monkeypatch.setattr("jaxalign.models.load", lambda path, **options: loaded.append(path) or load(path, **options))
    quick["method"] = CASES[name]
    result = run(parse_config(quick))
    (line,) = (line for line in lines(result.folder) if "loss" in line)
    assert np.isfinite(line["loss"]) and line["grad_norm"] > 1e-6
    before, after = (models.load(path)[1]["params"] for path in (tiny, export_of(result)))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    assert len(loaded) == 3  # the policy once, whatever the reference, and the two above


MISPLACED = {
    "a cache of nothing": ("dpo", {"reference_cache": "x"}, r"model\.reference_cache: nothing is kept there without"),
    "a reference that nobody reads": (
        "simpo",
        {"reference": "x"},
        r"model\.reference: the method reference_free has no",
    ),
}


@pytest.mark.parametrize("kind", MISPLACED)
def test_misplaced_settings(kind, quick):
    quick["method"], model, message = {"name": MISPLACED[kind][0]}, *MISPLACED[kind][1:]
    quick["model"] |= model
    with pytest.raises(ValueError, match=message):
        run(parse_config(quick))


class Killed(Exception):
    """In place of a signal."""


@pytest.mark.slow
def test_tr_dpo_resumes_exactly(settings, monkeypatch):
    """The reference moves after steps 2, 4 and 6; the run is killed before its sixth batch, checkpointed at 3."""
    settings["method"] = {"name": "tr_dpo", "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.7}
    settings["log"]["logging_steps"] = 1
    whole = run(parse_config({**settings, "name": "whole"}))
    still = run(parse_config({**settings, "name": "still", "method": {"name": "dpo"}}))
    following, asked = FollowingSource.next, []

    def killed(source, state):
        asked.append(1)
        if len(asked) == 6:
            raise Killed
        return following(source, state)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FollowingSource, "next", killed)
        run(parse_config({**settings, "name": "killed"}))
    resumed = run(parse_config({**settings, "name": "killed"}))
    assert lines(resumed.folder) == lines(whole.folder)
    exports = [(export_of(each) / "model.safetensors").read_bytes() for each in (whole, resumed, still)]
    assert exports[0] == exports[1] != exports[2]
    # Evaluation at step 4 is against the reference as it has just become: rewards jump towards 0.
    found = [next(line for line in lines(each.folder) if "eval_loss" in line) for each in (whole, still)]
    assert abs(found[0]["eval_rewards/margins"]) < 0.8 * abs(found[1]["eval_rewards/margins"])
