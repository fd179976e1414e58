# pyright: reportMissingImports=false
"""Times Tunix's Sampler, or its GRPOLearner, on the shared prompts; run with the Python of Tunix's own environment."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.metadata import version

import cases
import jax
import numpy as np
import peer_tunix
import rollouts
from flax import nnx
from tunix.generate import sampler as samplers
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

# A list of ends cannot be empty; no token has this id.
NO_END = [-1]


class Words:
    """What Tunix takes for a tokenizer: words as in `rollouts.to_text`, nothing added."""

    def __init__(self, args) -> None:
        self.config, self.pad = rollouts.describe(args.model), rollouts.pad_id(args.model)

    def encode(self, text: str) -> list[int]:
        return rollouts.from_text(text)

    def decode(self, ids: list[int]) -> str:
        return rollouts.to_text(ids)

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return self.config["eos_token_id"]

    def pad_id(self) -> int:
        return self.pad


def parse():
    """The shared command line and Tunix's own choice."""
    parser = rollouts.arguments(__doc__ or "")
    parser.add_argument("--remat", choices=("none", "block", "decoder"), default="none")
    return parser.parse_args()


def sample(args) -> None:
    """Calls of the sampler, one batch after the other; prompts padded to the longest of all."""
    prompts = rollouts.read_prompts(args.data, args.prompts)
    texts, longest = [rollouts.to_text(ids) for ids in prompts], max(map(len, prompts))
    model, ends = peer_tunix.load(args), rollouts.ending_ids(args)
    cache = samplers.CacheConfig(
        cache_size=longest + args.new_tokens,
        num_layers=model.config.num_layers,
        num_kv_heads=model.config.num_kv_heads,
        head_dim=model.config.head_dim,
    )
    sampler = samplers.Sampler(model, Words(args), cache)

    def call(seed: int) -> list[int]:
        lengths = []
        for start in range(0, len(texts), args.batch_size):
            drawn = sampler(
                texts[start : start + args.batch_size],
                max_generation_steps=args.new_tokens,
                max_prompt_length=longest,
                eos_tokens=ends or NO_END,
                temperature=1.0,
                top_p=1.0,
                seed=seed + start,
            )
            # The end itself is not given back.
            lengths += [min(len(ids) + 1, args.new_tokens) for ids in drawn.tokens]
        return lengths

    seconds, lengths = rollouts.time_calls(args, call)
    report(args, seconds, lengths, {"prompt_width": longest})


def share_of_even(prompts, completions, **columns) -> list[float]:
    """The reward; Tunix hands over texts only."""
    return rollouts.share_of_even([rollouts.from_text(text) for text in completions])


def build(args, width: int) -> grpo_learner.GRPOLearner:
    """The learner, everything on the one device; without KL there is no reference."""
    # On a single device, as Tunix's own examples do it.
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh),
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=peer_tunix.adamw(args),
            eval_every_n_steps=10**9,
            max_steps=args.warmup + args.steps,
            mini_batch_size=args.batch_size,
            train_micro_batch_size=args.batch_size,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=args.new_tokens,
            max_prompt_length=width,
            kv_cache_size=width + args.new_tokens,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=NO_END,
        ),
    )
    cluster = rl_cluster.RLCluster(actor=peer_tunix.load(args), tokenizer=Words(args), cluster_config=config)
    method = grpo_learner.GRPOConfig(num_generations=args.generations, num_iterations=1, beta=0.0, epsilon=0.2)
    return grpo_learner.GRPOLearner(cluster, method, share_of_even)


class Clock:
    """Notes when every update is done, how long its rollout took, and how long its completions are."""

    def __init__(self, cluster: rl_cluster.RLCluster) -> None:
        self.cluster, self.marks = cluster, [time.perf_counter()]
        self.sampling: list[float] = []
        self.lengths: list[list[int]] = []
        self.generate, self.update_actor = cluster.generate, cluster.update_actor
        cluster.generate, cluster.update_actor = self.timed_generate, self.timed_update

    def timed_generate(self, *args, **kwargs):
        start = time.perf_counter()
        drawn = self.generate(*args, **kwargs)
        self.sampling.append(time.perf_counter() - start)
        self.lengths.append([len(ids) for ids in drawn.tokens])
        return drawn

    def timed_update(self, *args, **kwargs) -> None:
        self.update_actor(*args, **kwargs)
        jax.block_until_ready(nnx.state(self.cluster.actor_trainer.model))
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)]


def train(args) -> None:
    """GRPO steps, one update per rollout."""
    count = args.batch_size * (args.warmup + args.steps)
    prompts = rollouts.read_prompts(args.data, count)
    learner = build(args, max(map(len, prompts)))

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, count, args.batch_size):
            yield {"prompts": np.array([rollouts.to_text(ids) for ids in prompts[start : start + args.batch_size]])}

    clock = Clock(learner.rl_cluster)
    learner.train(batches())
    report(args, clock.seconds(), clock.lengths, {"remat": args.remat}, {"sampling_seconds": clock.sampling})


def report(args, seconds, lengths, settings, extra=None) -> None:
    """Prints the JSON line."""
    rollouts.report(
        args,
        trainer="tunix",
        versions={name: version(name) for name in ("google-tunix", "jax", "flax")},
        settings={"weights": args.dtype, **settings},
        seconds=seconds,
        lengths=lengths,
        extra=extra,
    )


def main() -> None:
    """Runs the warm-up and the measured calls or steps and prints one JSON line."""
    args = parse()
    cases.use_cores(args.threads)
    {"sample": sample, "sample-ragged": sample, "grpo": train}[args.task](args)


if __name__ == "__main__":
    main()
