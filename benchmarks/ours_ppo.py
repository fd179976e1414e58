"""Times jaxalign's PPO iterations: a rollout, its scores, reference log-probs and values, and all its updates."""

from __future__ import annotations

import time
from typing import Any, cast

import cases
import jax
import numpy as np
import rollouts
from ours import least_flops
from ours_online import Rates, make_layout, report

from jaxalign import sampling
from jaxalign.methods import ppo
from jaxalign.methods.online import OnlineSource, Parts
from jaxalign.methods.rollout import make_draw, padded_width
from jaxalign.models import add_score_head
from jaxalign.models.pretrained import load
from jaxalign.rewards.model import make_scorer
from jaxalign.sharding import MeshConfig, make_mesh, param_shardings
from jaxalign.training import optimizer as optimizers
from jaxalign.types import Experience, Mean


def parse():
    """The shared command line and jaxalign's own choices."""
    parser = rollouts.arguments(__doc__ or "")
    parser.add_argument("--remat", default="none", help="as model.remat")
    parser.add_argument("--micro-batch-size", type=int, default=0, help="as train.micro_batch_size; 0: the whole batch")
    return parser.parse_args()


def texts(experience: Experience) -> list[np.ndarray]:
    """Prompt and completion together, what the reward model reads."""
    rows = zip(experience.prompts, experience.prompt_lengths, experience.tokens, experience.lengths, strict=True)
    return [np.concatenate([prompt[:size], tokens[:length]]) for prompt, size, tokens, length in rows]


def make_parts(args, models: ppo.Models, config: ppo.Config, frozen, prompts: list[np.ndarray]) -> Parts:
    """Sampler, reward model and passes as `run.online` makes them; the reward model is the policy with a new head."""
    mesh, width = make_mesh(MeshConfig()), padded_width(max(map(len, prompts)))
    model, variables = load(args.model, compute_dtype=args.dtype)
    scorer = make_scorer(*add_score_head(model, variables, jax.random.key(1)))
    drawing = sampling.Config(max_new_tokens=args.new_tokens, temperature=config.temperature)
    logps, values = jax.jit(ppo.make_logps(config, models.policy)), jax.jit(ppo.make_values(config, models.value))

    def score(experience: Experience):
        scores = scorer(texts(experience))
        return lambda: scores[:, None].astype(np.float64)

    return Parts(
        prompts=[{"prompt_ids": ids} for ids in prompts],
        draw=make_draw(models.policy, drawing, mesh, width=width),
        policy=lambda params: ppo.policy_of(params, frozen),
        score=score,
        rewards=("reward",),
        passes={
            "ref_logps": lambda params, batch: logps(variables, batch),
            "values": lambda params, batch: values(ppo.value_of(params, frozen), batch),
        },
        width=width,
    )


def main() -> None:
    """Runs the warm-up and the measured iterations and prints one JSON line."""
    args = parse()
    cases.use_cores(args.threads)
    iterations = args.warmup + args.steps
    prompts = [np.array(ids, np.int32) for ids in rollouts.read_prompts(args.data, args.batch_size * iterations)]
    model, variables = load(args.model, compute_dtype=args.dtype, remat=args.remat)
    config = ppo.Config(num_ppo_epochs=args.epochs, max_completion_length=args.new_tokens)
    models, by_role = ppo.add_critic(config, model, variables, jax.random.key(0))
    settings = optimizers.Config(learning_rate=args.learning_rate, lr_scheduler_type="linear")
    optimizer, schedule = optimizers.make_optimizer(settings, iterations * ppo.num_updates(config))
    state, frozen = ppo.init(config, models, by_role, optimizer, jax.random.key(0))
    del variables, by_role
    mesh = make_mesh(MeshConfig())
    placed = param_shardings(mesh, state)
    state = jax.device_put(state, placed)
    step = jax.jit(ppo.make_step(config, models, optimizer, schedule), donate_argnums=0, out_shardings=(placed, None))
    layout = make_layout(args, model, config, prompts)
    parts = make_parts(args, models, config, frozen, prompts)
    source = OnlineSource(ppo, config, parts, layout, mesh, key=jax.random.key(0), shuffle=False)
    measured: dict[str, list[Any]] = {name: [] for name in ("seconds", "sampling_seconds", "losses", "lengths")}
    flops, shapes = [], set()
    for _ in range(iterations):
        start, operations = time.perf_counter(), 0.0
        batches = []
        for update in range(ppo.num_updates(config)):
            batch, metrics = source.next(state)
            if not update:
                measured["sampling_seconds"].append(cast(Mean, metrics["timing_s/sampling"]).value())
            state, learnt = step(state, frozen, batch)
            batches.append(batch)
        measured["losses"].append(learnt["loss"].value())
        jax.block_until_ready(state)
        measured["seconds"].append(time.perf_counter() - start)
        assert source.experience is not None
        measured["lengths"].append(source.experience.lengths.tolist())
        # Policy and critic learn in every update; reference, critic and reward model read the rollout once.
        forward = least_flops("ppo", model, batches[0]) / 3
        operations = sum(2 * least_flops("ppo", model, batch) for batch in batches) + 3 * forward
        flops.append(operations)
        shapes |= {str(batch.rows.tokens.shape) for batch in batches}
    peak = cases.peak_memory_mib()
    sizes = np.array([len(ids) for ids in prompts]).reshape(iterations, args.batch_size).tolist()
    rates = Rates(args, model, sum(sizes[-1]) + sum(measured["lengths"][-1]) // 2)
    floors = [
        rates.sampling(own, own, lengths)["seconds"] + operations / rates.measured["flops_per_second"]
        for own, lengths, operations in zip(sizes, measured["lengths"], flops, strict=True)
    ]
    report(args, measured, peak, floors, {"remat": args.remat, "row_shapes": sorted(shapes)})


if __name__ == "__main__":
    main()
