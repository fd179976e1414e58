"""One process of several: losses and drawn tokens of tiny models trained in float64, written by the first.

Arguments: port, number of processes, this one's number, its devices, JSON of cases, file. A case has the sizes of its
`mesh`, `methods`, `steps` and `sparse` (a model with experts). Run by `test_trajectories.py`.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxalign import sampling
from jaxalign.methods import grpo, ppo, preference, sft
from jaxalign.methods.offline import Layout, pack_global
from jaxalign.methods.online import OnlineSource, Parts
from jaxalign.methods.rollout import Draw, make_draw, row_length
from jaxalign.models import Model, build
from jaxalign.sharding import MeshConfig, data_shards, make_mesh, param_shardings, place_batch
from jaxalign.types import Experience, PyTree, Samples
from tests.layouts import SPARSE, VOCAB, ragged_pairs, ragged_texts, tiny_model

SEED = 6
WIDTH, STEPS, PROMPTS = 8, 6, 8
DENSE: dict[str, Any] = {"num_layers": 2, "windows": (None, 9)}
ONLINE: dict[str, Any] = {"old_logps": "trainer", "max_completion_length": STEPS, "logits_chunk": 17}
CONFIGS = {
    "sft": (sft, sft.Config(logits_chunk=17)),
    "dpo": (preference, preference.Config(beta=0.3, logits_chunk=17)),
    # Two updates of a rollout, so that the second one's ratios are not 1; a KL against the reference. The sampler's own
    # log-probs are float32.
    "grpo": (grpo, grpo.Config(num_generations=3, num_iterations=2, beta=0.1, **ONLINE)),
    "ppo": (ppo, ppo.Config(num_ppo_epochs=2, **ONLINE)),
}


def place(mesh: Mesh, tree: PyTree) -> PyTree:
    """The same numbers on all processes, on the mesh."""
    host = jax.device_get(tree)
    return jax.tree.map(
        lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index]),
        host,
        param_shardings(mesh, host),
    )


def layout(mesh: Mesh, length: int, batch_size: int) -> Layout:
    """Of this process; micro-batches of eight."""
    processes = jax.process_count()
    return Layout(batch_size, 8, length, data_shards(mesh) // processes, jax.process_index(), processes)


def score(experience: Experience) -> Any:
    """Of the tokens alone, and different within a group."""
    return lambda: (experience.tokens.sum(1) % 11)[:, None] / 10


def train(name: str, mesh: Mesh, sparse: bool, steps: int) -> dict[str, list]:
    """The losses of so many steps, and all tokens drawn."""
    method, config = CONFIGS[name]
    small = SPARSE if sparse else DENSE
    model, values = tiny_model(dtype="float64", **small)
    model = build(model.config, param_dtype="float64", compute_dtype="float64", mesh=mesh)
    reference = place(mesh, jax.tree.map(lambda x: x * 0.98, values))
    variables, made = place(mesh, values), model
    if method is ppo:
        scorer, critic = tiny_model(5, dtype="float64", lm_head=False, score_head=True, **small)
        scorer = build(scorer.config, param_dtype="float64", compute_dtype="float64", mesh=mesh)
        made, variables = ppo.add_critic(config, model, values, jax.random.key(SEED), start=(scorer, critic))
        variables = place(mesh, variables)
    optimizer = optax.adam(1e-2)
    init = partial(method.init, config, made, optimizer=optimizer, key=jax.random.key(SEED))
    places = param_shardings(mesh, jax.eval_shape(init, variables))
    state, frozen = jax.jit(init, out_shardings=places)(variables)
    step = jax.jit(method.make_step(config, made, optimizer), donate_argnums=0, out_shardings=(places[0], None))
    source = None
    if method in (grpo, ppo):
        source = online(name, made, reference, frozen, mesh)
    fill = jax.jit(preference.make_reference(config, model)) if method is preference else None
    losses, tokens = [], []
    for number in range(steps):
        if source is not None:
            batch = source.next(state)[0]
            assert source.experience is not None
            tokens.append(np.asarray(source.experience.tokens).tolist())
        else:
            examples = (ragged_texts if method is sft else ragged_pairs)(16, seed=number % 2)
            batch = place_batch(mesh, pack_global(method, config, examples, layout(mesh, 128, 16)).batch)
            batch = batch if fill is None else fill(reference, batch)
        state, metrics = step(state, frozen, batch)
        losses.append(float(jax.device_get(metrics["loss"]).value()))
    moved = jax.tree.leaves(state.params)[0]
    assert moved.dtype == np.float64
    return {"losses": losses, "tokens": tokens}


def online(name: str, made: Any, reference: PyTree, frozen: PyTree, mesh: Mesh) -> OnlineSource:
    """The source as a run makes it, with a reward of the tokens."""
    method, config = CONFIGS[name]
    policy = made.policy if method is ppo else made
    size = config.num_generations
    drawing = sampling.Config(max_new_tokens=STEPS, num_generations=size, eos_ids=tuple(range(1, 12)))
    logps = jax.jit(method.make_logps(config, policy))
    runs = {
        "policy": lambda params, batch: logps(method.policy_of(params, frozen), batch),
        "reference": lambda params, batch: logps(reference, batch),
    }
    if method is ppo:
        values = jax.jit(ppo.make_values(config, made.value))
        runs["value"] = lambda params, batch: values(ppo.value_of(params, frozen), batch)
    rng = np.random.default_rng(1)
    prompts = [{"prompt_ids": rng.integers(1, VOCAB, rng.integers(1, WIDTH + 1)).astype(np.int32)} for _ in range(11)]
    parts = Parts(
        prompts=prompts,
        draw=draw_narrow(policy, drawing, mesh),
        policy=lambda params: method.policy_of(params, frozen),
        score=score,
        rewards=("sum",),
        passes={field: runs[role] for field, role in method.passes(config, narrow=False).items()},
        width=WIDTH,
    )
    length = row_length(WIDTH, STEPS, size, share_prompt=config.share_prompt, multiple=32)
    return OnlineSource(method, config, parts, layout(mesh, length, PROMPTS), mesh, key=jax.random.key(SEED))


def draw_narrow(policy: Model, config: sampling.Config, mesh: Mesh) -> Draw:
    """The sampler, which counts in int32 and so knows no float64: it draws with the policy rounded to float32."""
    narrow = build(policy.config, param_dtype="float32", compute_dtype="float32", mesh=mesh)
    rounded = jax.jit(partial(jax.tree.map, lambda x: x.astype(np.float32)))
    with jax.enable_x64(False):
        made = make_draw(narrow, config, mesh, width=WIDTH)

    def draw(variables: PyTree, prompts: Sequence[np.ndarray], key: jax.Array) -> Samples:
        variables = rounded(variables)
        with jax.enable_x64(False):
            return made(variables, prompts, key)

    return draw


def main(port: str, processes: str, process: str, devices: str, cases: str, path: str) -> None:
    """Trains and writes."""
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_enable_x64", True)
    if int(processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    found = []
    for case in json.loads(cases):
        mesh = make_mesh(MeshConfig(**case["mesh"]))
        found.append({name: train(name, mesh, case["sparse"], case["steps"]) for name in case["methods"]})
    if process == "0":
        Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
