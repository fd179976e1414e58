"""Every config that ships: it has a header with figures, it builds, its data passes, and its step traces."""

import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models
from jaxalign.config import load_config, shipped_configs
from jaxalign.methods.common import is_online, needs_reference, split_start
from jaxalign.methods.offline import pack_global
from jaxalign.methods.rollout import pack_prompts, to_experience
from jaxalign.run import pick_stage, prepare
from jaxalign.run.adapting import adapt
from jaxalign.run.online import online_models, prompt_width
from jaxalign.training.optimizer import make_optimizer
from jaxalign.types import Samples

CONFIG, TOKENIZER = lru_cache(models.load_config), lru_cache(models.load_tokenizer)
ROOT = Path(__file__).resolve().parents[2]
STAGES = [(name, stage.name) for name, path in shipped_configs().items() for stage in load_config(path).stages]


@pytest.fixture(autouse=True)
def one_reading(monkeypatch):
    """The GGUF file's metadata, which take seconds, are read once for all configs."""
    monkeypatch.setattr(models, "load_config", CONFIG)
    monkeypatch.setattr(models, "load_tokenizer", TOKENIZER)


def test_all_yaml_files_are_covered():
    assert {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in (ROOT / "configs").rglob("*.yaml")} == {
        name for name, _ in STAGES
    }


@pytest.mark.parametrize("path", shipped_configs().values(), ids=shipped_configs().keys())
def test_header(path):
    header = path.read_text().split("\nname:")[0]
    assert re.match(r"# \S.*\.\n", header), "the first line says what it does"
    for part in ("Command:", "Hardware:", "Time:", "Result:"):
        found = re.search(rf"# {part} +(\S.*)", header)
        assert found, f"the header lacks {part}"
        assert not re.fullmatch(r"[A-Z]+", found[1]), f"{part} is not filled in"


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_the_step_traces(name, stage, smollm2, monkeypatch):
    monkeypatch.chdir(ROOT)
    picked = pick_stage(load_config(shipped_configs()[name], [f"model.path={smollm2}", "mesh.data=8"]), stage or None)
    ready = prepare(picked)
    assert ready.data.report.leaked == 0
    method, optimizer = ready.method, make_optimizer(picked.optimizer, ready.num_steps)
    key = jax.random.key(0)
    model, shapes, batch = online(ready, key) if is_online(method) else offline(ready, key)

    def train(variables, batch):
        state, frozen = method.init(picked.method, model, variables, optimizer[0], key)
        if not is_online(method) and needs_reference(method, picked.method):
            batch = method.make_reference(picked.method, model)(variables, batch)
        return method.make_step(picked.method, model, *optimizer)(state, frozen, batch)

    state, metrics = jax.eval_shape(train, shapes, batch)
    trained = jax.tree.leaves(state.params)
    wanted = jax.eval_shape(lambda variables: split_start(method, variables)[0], shapes)
    assert [leaf.shape for leaf in trained] == [leaf.shape for leaf in jax.tree.leaves(wanted)]
    assert {"loss", "grad_norm", "learning_rate"} <= set(metrics)
    assert all(leaf.dtype == jnp.dtype(picked.model.param_dtype) for leaf in trained)


def offline(ready, key):
    size = ready.layout.batch_size
    batch = pack_global(
        ready.method, ready.stage.method, [ready.data.train[i] for i in range(size)], ready.layout
    ).batch
    start = lambda key: adapt(ready.stage, ready.model.config, ready.model.init(key), key)  # noqa: E731
    return ready.model, jax.eval_shape(start, key), batch


def online(ready, key):
    """A rollout of random tokens and scores, estimated and packed as the source does it."""
    method, config, rng = ready.method, ready.stage.method, np.random.default_rng(0)
    size, steps = config.num_generations, config.max_completion_length
    prompts = [
        ready.data.train[i]["prompt_ids"] for i in range(method.rollout_prompts(config, ready.layout.batch_size))
    ]
    n = len(prompts) * size
    lengths = rng.integers(1, steps + 1, n).astype(np.int32)
    mask = np.arange(steps)[None] < lengths[:, None]
    tokens = rng.integers(1, 1000, (n, steps)).astype(np.int32) * mask
    logps = -mask.astype(np.float32)
    samples = Samples(tokens, lengths, rng.integers(0, 2, n).astype(np.int32), logps, logps * 0)
    experience = to_experience(prompts, np.arange(len(prompts)), samples, prompt_width(ready), 1)
    wanted = {field: logps for field in method.passes(config, narrow=False)}
    experience = replace(experience, scores=rng.normal(size=(n, 1)), fields={**experience.fields, **wanted})
    assert method.keep(config, experience).all()
    experience, _, _ = method.estimate(config, experience, method.start_carry(config))
    members = method.schedule(config, len(prompts), ready.layout.batch_size, rng)[0]
    share = config.share_prompt
    batch = pack_prompts(experience, members, ready.layout, share_prompt=share, fields=method.fields(config))
    numbers = method.batch_fields(config, experience, len(batch.present))
    made = online_models(ready, key, lambda path: pytest.fail(f"{path} is loaded"))
    return made.model, made.shapes, replace(batch, fields={**batch.fields, **numbers})
