"""Every config that ships: it has a header with figures, it builds, its data passes, and its step traces."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxalign.config import load_config, shipped_configs
from jaxalign.methods.offline import pack_global
from jaxalign.run import pick_stage, prepare
from jaxalign.training.optimizer import make_optimizer

ROOT = Path(__file__).resolve().parents[2]
STAGES = [(name, stage.name) for name, path in shipped_configs().items() for stage in load_config(path).stages]


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
    size = ready.layout.batch_size
    batch = pack_global(ready.method, picked.method, [ready.data.train[i] for i in range(size)], ready.layout).batch
    optimizer, schedule = make_optimizer(picked.optimizer, ready.num_steps)
    key = jax.random.key(0)

    def train(variables, batch):
        state, frozen = ready.method.init(picked.method, ready.model, variables, optimizer, key)
        if ready.method.NEEDS_REFERENCE:
            batch = ready.method.make_reference(picked.method, ready.model)(variables, batch)
        return ready.method.make_step(picked.method, ready.model, optimizer, schedule)(state, frozen, batch)

    shapes = jax.eval_shape(ready.model.init, key)
    state, metrics = jax.eval_shape(train, shapes, batch)
    assert jax.tree.map(lambda x: x.shape, state.params) == jax.tree.map(
        lambda x: x.shape, {"params": shapes["params"]}
    )
    assert {"loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy"} <= set(metrics)
    assert state.params["params"]["embed"]["embedding"].dtype == jnp.dtype(picked.model.param_dtype)
