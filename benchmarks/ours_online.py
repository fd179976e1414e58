"""Times jaxalign's sampler, or a GRPO step with the source and the jitted step of a run, on the shared prompts."""

from __future__ import annotations

import time
from typing import Any, cast

import cases
import jax
import jax.numpy as jnp
import numpy as np
import rollouts
from ours import least_flops

import jaxalign
from jaxalign import rewards, sampling
from jaxalign.methods import grpo, ppo
from jaxalign.methods.offline import Layout
from jaxalign.methods.online import OnlineSource, Parts
from jaxalign.methods.rollout import make_draw, padded_width, row_length
from jaxalign.methods.row_length import choose_rollout_length
from jaxalign.models import Model
from jaxalign.models.config import count_params, forward_flops
from jaxalign.models.pretrained import load
from jaxalign.sharding import MeshConfig, make_mesh, param_shardings
from jaxalign.training import optimizer as optimizers
from jaxalign.types import Experience, Mean, Variables

REWARD = rewards.Reward("share_of_even", lambda completions, completion_ids: rollouts.share_of_even(completion_ids))
# Of the tokens per row, as a run on CPU has it.
ROW_MULTIPLE = 32


def parse():
    """The shared command line and jaxalign's own choices."""
    parser = rollouts.arguments(__doc__ or "")
    parser.add_argument("--remat", default="none", help="as model.remat")
    parser.add_argument("--waves", action="store_true", help="refill slots when all are free; else as by default")
    parser.add_argument("--micro-batch-size", type=int, default=0, help="as train.micro_batch_size; 0: the whole batch")
    return parser.parse_args()


def sample(args) -> None:
    """Calls of the sampler as a rollout makes them: padding, the cast of the parameters, the loop, the copy back."""
    prompts = [np.array(ids, np.int32) for ids in rollouts.read_prompts(args.data, args.prompts)]
    model, variables = load(args.model, compute_dtype=args.dtype)
    config = sampling.Config(
        max_new_tokens=args.new_tokens,
        eos_ids=tuple(rollouts.ending_ids(args)),
        slots=args.batch_size,
        refill=args.batch_size if args.waves else None,
    )
    width = padded_width(max(map(len, prompts)))
    draw = make_draw(model, config, make_mesh(MeshConfig()), width=width)
    counters = {}

    def call(seed: int) -> list[int]:
        samples = draw(variables, prompts, jax.random.key(seed))
        counters.update({name: int(count) for name, count in samples.counters.items()})
        return np.asarray(samples.lengths).tolist()

    seconds, lengths = rollouts.time_calls(args, call)
    peak = cases.peak_memory_mib()
    sizes = [len(ids) for ids in prompts]
    rates = Rates(args, model, args.batch_size * (sum(sizes) // len(sizes) + args.new_tokens // 2))
    floors = [rates.sampling(sizes, sizes, each) for each in lengths]
    measured = {"seconds": seconds, "lengths": lengths, "counters": counters, "floor": floors[-1] | rates.measured}
    settings = {"width": width, "slots": args.batch_size, "refill": config.refill}
    report(args, measured, peak, [floor["seconds"] for floor in floors], settings)


def train(args) -> None:
    """GRPO steps: the source of a run draws, scores and packs, the jitted step learns."""
    steps = args.warmup + args.steps
    prompts = [np.array(ids, np.int32) for ids in rollouts.read_prompts(args.data, args.batch_size * steps)]
    model, variables = load(args.model, compute_dtype=args.dtype, remat=args.remat)
    config = grpo.Config(num_generations=args.generations, max_completion_length=args.new_tokens)
    settings = optimizers.Config(learning_rate=args.learning_rate, lr_scheduler_type="linear")
    optimizer, schedule = optimizers.make_optimizer(settings, steps)
    state, frozen = grpo.init(config, model, variables, optimizer, jax.random.key(0))
    del variables
    mesh = make_mesh(MeshConfig())
    placed = param_shardings(mesh, state)
    state = jax.device_put(state, placed)
    learn = grpo.make_step(config, model, optimizer, schedule)
    step = jax.jit(learn, donate_argnums=0, out_shardings=(placed, None))
    source = make_source(args, model, config, frozen, prompts)
    measured: dict[str, list[Any]] = {name: [] for name in ("seconds", "sampling_seconds", "losses", "lengths")}
    flops, shapes = [], set()
    for _ in range(steps):
        start = time.perf_counter()
        batch, metrics = source.next(state)
        state, learnt = step(state, frozen, batch)
        measured["losses"].append(learnt["loss"].value())
        jax.block_until_ready(state)
        measured["seconds"].append(time.perf_counter() - start)
        measured["sampling_seconds"].append(cast(Mean, metrics["timing_s/sampling"]).value())
        assert source.experience is not None
        measured["lengths"].append(source.experience.lengths.tolist())
        flops.append(least_flops("grpo", model, batch))
        shapes.add(str(batch.rows.tokens.shape))
    peak = cases.peak_memory_mib()
    sizes = np.array([len(ids) for ids in prompts]).reshape(steps, args.batch_size).tolist()
    rates = Rates(args, model, sum(sizes[-1]) * args.generations + sum(measured["lengths"][-1]) // 2)
    floors = [
        rates.sampling(own, np.repeat(own, args.generations).tolist(), lengths)["seconds"]
        + operations / rates.measured["flops_per_second"]
        for own, lengths, operations in zip(sizes, measured["lengths"], flops, strict=True)
    ]
    report(args, measured, peak, floors, {"remat": args.remat, "row_shapes": sorted(shapes)})


def make_source(args, model: Model, config: grpo.Config, frozen: Variables, prompts: list[np.ndarray]) -> OnlineSource:
    """The source, sampler and layout as `run.online` and `run.prepare` make them."""
    mesh, width = make_mesh(MeshConfig()), padded_width(max(map(len, prompts)))
    layout = make_layout(args, model, config, prompts)
    drawing = sampling.Config(max_new_tokens=args.new_tokens, num_generations=args.generations)
    parts = Parts(
        prompts=[{"prompt_ids": ids} for ids in prompts],
        draw=make_draw(model, drawing, mesh, width=width),
        policy=lambda params: grpo.policy_of(params, frozen),
        score=score,
        rewards=(REWARD.name,),
        width=width,
    )
    return OnlineSource(grpo, config, parts, layout, mesh, key=jax.random.key(0), shuffle=False)


def make_layout(args, model: Model, config: grpo.Config | ppo.Config, prompts: list[np.ndarray]) -> Layout:
    """Rows of the length that a run on CPU takes for these prompts."""
    lengths, micro = [len(ids) for ids in prompts], args.micro_batch_size or args.batch_size
    known = {"completions": config.num_generations, "share_prompt": config.share_prompt, "multiple": ROW_MULTIPLE}
    least = row_length(max(lengths), args.new_tokens, **known)
    length = choose_rollout_length(
        lengths, args.batch_size, micro, steps=args.new_tokens, least=least, model=model.config, **known
    )
    return Layout(args.batch_size, micro, length)


def score(experience: Experience):
    """Starts to score a rollout, as `run.online` does."""
    tokens = [ids[:length].tolist() for ids, length in zip(experience.tokens, experience.lengths, strict=True)]
    texts = [rollouts.to_text(ids) for ids in tokens]
    prompts = [
        rollouts.to_text(ids[:length].tolist())
        for ids, length in zip(experience.prompts, experience.prompt_lengths, strict=True)
    ]
    size = experience.num_generations
    per_completion = [prompt for prompt in prompts for _ in range(size)]
    return rewards.start_rewards([REWARD], per_completion, texts, {"completion_ids": tokens}).result


def report(args, measured: dict[str, Any], peak: float, floors: list[float], settings: dict[str, object]) -> None:
    """Prints the JSON line; the floors are of every call or step."""
    rollouts.report(
        args,
        trainer="jaxalign",
        versions={"jaxalign": jaxalign.__version__, "jax": jax.__version__},
        settings=settings,
        seconds=measured["seconds"],
        lengths=measured["lengths"],
        extra={
            **measured,
            "peak_memory_mib": peak,
            "floor_seconds": float(np.median(floors[args.warmup :])),
        },
    )


class Rates:
    """What this machine can do, measured in the sizes of one decode step, and what that makes of sampling.

    Args:
      args: the command line.
      model: the model.
      tokens: how many tokens the caches hold at a step.
    """

    def __init__(self, args, model: Model, tokens: int) -> None:
        self.config = model.config
        width = jnp.dtype(args.dtype).itemsize
        self.slots = args.batch_size * (args.generations if args.task == "grpo" else 1)
        self.weights = count_params(model.config) * width
        self.per_token = 2 * model.config.num_layers * model.config.num_kv_heads * model.config.head_dim * width
        self.measured = {
            "bytes_per_second": rollouts.read_bandwidth(self.weights + self.per_token * tokens, args.threads),
            "flops_per_second": matmul_rate(args.dtype, 2048, 2048),
            "decode_flops_per_second": matmul_rate(args.dtype, self.slots, 1024),
        }

    def sampling(self, read: list[int], prompts: list[int], lengths: list[int]) -> dict[str, float]:
        """Least seconds to draw completions.

        Every prompt is read once, then all slots are busy to the end. A decode step reads all weights and what is in
        the cache, and multiplies; it takes the longer of the two at the rates measured.

        Args:
          read: lengths of the prompts that are read.
          prompts: length of each completion's prompt.
          lengths: of the completions.
        """
        drawn = sum(lengths)
        steps = max(-(-drawn // self.slots), max(lengths))
        attended = sum(n * prompt + n * (n + 1) // 2 for prompt, n in zip(prompts, lengths, strict=True))
        moved = steps * self.weights + attended * self.per_token
        flops = forward_flops(self.config, drawn, attended, drawn)
        prefill = forward_flops(self.config, sum(read) - len(read), sum(n * (n - 1) // 2 for n in read), 0)
        decode = max(moved / self.measured["bytes_per_second"], flops / self.measured["decode_flops_per_second"])
        return {
            "seconds": prefill / self.measured["flops_per_second"] + decode,
            "decode_seconds": decode,
            "decode_steps": steps,
            "bytes_per_token": moved / drawn,
            "flops_per_token": flops / drawn,
            "prefill_flops": float(prefill),
        }


def matmul_rate(dtype: str, rows: int, size: int) -> float:
    """Operations a second of a product `[rows, size] × [size, size]`, the best of ten."""
    x, y = jnp.ones((rows, size), dtype), jnp.ones((size, size), dtype)
    multiply = jax.jit(jnp.dot)
    jax.block_until_ready(multiply(x, y))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(multiply(x, y))
        seconds.append(time.perf_counter() - start)
    return 2 * rows * size**2 / min(seconds)


def main() -> None:
    """Runs the warm-up and the measured calls or steps and prints one JSON line."""
    args = parse()
    cases.use_cores(args.threads)
    {"sample": sample, "sample-ragged": sample, "grpo": train}[args.task](args)


if __name__ == "__main__":
    main()
