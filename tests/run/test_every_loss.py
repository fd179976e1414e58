"""Every method ships a config of its own, and its step traces with every loss and under every preset's name."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml

from jaxalign import losses
from jaxalign.config import load_config, shipped_configs
from jaxalign.methods import METHODS, PRESETS
from jaxalign.methods.common import is_online
from jaxalign.methods.running import with_carry
from jaxalign.run import pick_stage, prepare
from jaxalign.training.optimizer import make_optimizer
from tests.run.test_configs import offline, one_reading, online  # noqa: F401 -- a fixture of this module too

ROOT = Path(__file__).resolve().parents[2]
# The setting that chooses a method's loss, and what it may be.
LOSSES = {
    "sft": ("loss_type", losses.SFT_LOSSES),
    "preference": ("loss_type", losses.PREFERENCE_LOSSES),
    "reference_free": ("loss_type", losses.REFERENCE_FREE_LOSSES),
    "unpaired_preference": ("loss_type", losses.UNPAIRED_LOSSES),
    "grpo": ("policy_loss", losses.POLICY_LOSSES),
}
NEEDED = {
    "exo_pair": {"label_smoothing": 1e-3},
    "cispo": {"epsilon_high": 5.0},
    "vespo": {"importance_sampling_level": "sequence_sum"},
}
CHOICES = [(method, {key: name, **NEEDED.get(name, {})}) for method, (key, names) in LOSSES.items() for name in names]
CHOICES += [(preset, {}) for preset in PRESETS]
CHOICES.sort(key=lambda choice: PRESETS.get(choice[0], choice)[0])  # the losses of a method share what is read
SMALL = ("data.split=train[:64]", "data.eval_path=null", "data.eval_split=null")
SMALL += ("train.eval_on_start=false", "train.eval_steps=null")


def shipped(method: str) -> list[Path]:
    """Configs under the method's folder whose last stage trains by it."""
    found = {name: path for name, path in shipped_configs().items() if name.split("/")[0] == method}
    return [path for path in found.values() if load_config(path).stages[-1].method_name == method]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ships_a_config(method):
    assert shipped(method)


@lru_cache(maxsize=1)
def base(method: str, model: str):
    """The method's first config over a few rows, ready to train."""
    return prepare(pick_stage(load_config(shipped(method)[0], overrides(model)), None))


def overrides(model: str) -> list[str]:
    return [f"model.path={model}", *SMALL]


@pytest.mark.parametrize(("name", "settings"), CHOICES, ids=["-".join(map(str, [n, *s.values()])) for n, s in CHOICES])
def test_the_step_traces_with_every_loss(name, settings, smollm2, monkeypatch):
    """Of what the choice does not change (data, tokenizer, model) there is one for all losses of a method."""
    monkeypatch.chdir(ROOT)
    method_name = PRESETS[name][0] if name in PRESETS else name
    text = shipped(method_name)[0].read_text()  # what it says of the method goes over a preset
    chosen = [f"method.name={name}", *(f"method.{key}={value}" for key, value in settings.items())]
    stage = load_config(shipped(method_name)[0], [*overrides(str(smollm2)), *chosen]).stages[0]
    expected = {**PRESETS.get(name, ("", {}))[1], **settings}
    expected |= {key: getattr(stage.method, key) for key in yaml.safe_load(text)["method"] if key in expected}
    assert {key: getattr(stage.method, key) for key in expected} == expected
    ready = replace(base(method_name, str(smollm2)), stage=stage)
    method, optimizer, key = ready.method, make_optimizer(stage.optimizer, ready.num_steps), jax.random.key(0)
    model, shapes, batch = (online if is_online(method) else offline)(ready, key)
    if not is_online(method):
        known = (
            {"ref_logps": jnp.zeros(batch.predictions.sources.shape)} if method.needs_reference(stage.method) else {}
        )
        batch = with_carry(method, stage.method, replace(batch, fields={**batch.fields, **known}))
    state, frozen = jax.eval_shape(lambda v: method.init(stage.method, model, v, optimizer[0], key), shapes)
    after, metrics = jax.eval_shape(method.make_step(stage.method, model, *optimizer), state, frozen, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].total.dtype == jnp.float32 and "grad_norm" in metrics
