"""Times jaxalign's sampler, or a GRPO step with the source and the jitted step of a run, on the shared prompts."""

from __future__ import annotations

import time

import cases
import jax
import jax.numpy as jnp
import numpy as np
import rollouts
from ours import least_flops

import jaxalign
from jaxalign import rewards, sampling
from jaxalign.methods import grpo
from jaxalign.methods.offline import Layout
from jaxalign.methods.online import OnlineSource, Parts
from jaxalign.methods.rollout import make_draw, row_length
from jaxalign.models import Model
from jaxalign.models.config import count_params, forward_flops
from jaxalign.models.pretrained import load
from jaxalign.sharding import MeshConfig, make_mesh, param_shardings
from jaxalign.training import optimizer as optimizers
from jaxalign.types import Experience

REWARD = rewards.Reward("share_of_even", lambda completions, completion_ids: rollouts.share_of_even(completion_ids))


def parse():
    """The shared command line and jaxalign's own choices."""
    parser = rollouts.arguments(__doc__ or "")
    parser.add_argument("--remat", default="none", help="as model.remat")
    parser.add_argument("--refill", type=int, default=0, help="as rollout.refill; 0: the default")
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
        refill=args.refill or None,
    )
    width = sampling.bucket_width(max(map(len, prompts)))
    draw = make_draw(model, config, make_mesh(MeshConfig()), width=width)
    counters = {}

    def call(seed: int) -> np.ndarray:
        samples = draw(variables, prompts, jax.random.key(seed))
        counters.update({name: int(count) for name, count in samples.counters.items()})
        return samples.lengths

    seconds, lengths = rollouts.time_calls(args, call)
    peak = cases.peak_memory_mib()
    sizes = [len(ids) for ids in prompts]
    rates = Rates(args, model, sum(sizes) + sum(lengths[-1]))
    floors = [rates.sampling(sizes, sizes, each) for each in lengths]
    rollouts.report(
        args,
        trainer="jaxalign",
        versions={"jaxalign": jaxalign.__version__, "jax": jax.__version__},
        settings={"width": width, "slots": args.batch_size, "refill": args.refill or None},
        seconds=seconds,
        lengths=lengths,
        extra={
            "peak_memory_mib": peak,
            "counters": counters,
            "floor_seconds": float(np.median([each["seconds"] for each in floors[args.warmup :]])),
            "floor": floors[-1] | rates.measured,
        },
    )


def train(args) -> None:
    """GRPO steps: the source of a run draws, scores and packs, the jitted step learns."""
    steps = args.warmup + args.steps
    prompts = [{"prompt_ids": np.array(ids, np.int32)} for ids in rollouts.read_prompts(args.data, args.batch_size * steps)]
    sizes = [len(each["prompt_ids"]) for each in prompts]
    config = grpo.Config(num_generations=args.generations, max_completion_length=args.new_tokens)
    model, variables = load(args.model, compute_dtype=args.dtype, remat=args.remat)
    settings = optimizers.Config(learning_rate=args.learning_rate, lr_scheduler_type="linear")
    optimizer, schedule = optimizers.make_optimizer(settings, steps)
    mesh, key = make_mesh(MeshConfig()), jax.random.key(0)
    state, frozen = grpo.init(config, model, variables, optimizer, key)
    del variables
    shardings = param_shardings(mesh, state)
    state = jax.device_put(state, shardings)
    step = jax.jit(grpo.make_step(config, model, optimizer, schedule), donate_argnums=0, out_shardings=(shardings, None))
    width = sampling.bucket_width(max(sizes))
    longest = row_length(
        min(width, max(sizes)), args.new_tokens, args.generations, share_prompt=config.share_prompt, multiple=32
    )
    layout = Layout(args.batch_size, args.micro_batch_size or args.batch_size, longest)
    drawing = sampling.Config(max_new_tokens=args.new_tokens, num_generations=args.generations)
    parts = Parts(
        prompts=prompts,
        draw=make_draw(model, drawing, mesh, width=width),
        policy=lambda params: grpo.policy_of(params, frozen),
        score=score,
        rewards=(REWARD.name,),
        width=width,
    )
    source = OnlineSource(grpo, config, parts, layout, mesh, key=key, shuffle=False)
    seconds, sampled, losses, lengths, flops, shapes = [], [], [], [], [], set()
    for _ in range(steps):
        start = time.perf_counter()
        batch, metrics = source.next(state)
        state, learnt = step(state, frozen, batch)
        losses.append(learnt["loss"].value())
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
        sampled.append(metrics["timing_s/sampling"].value())
        assert source.experience is not None
        lengths.append(source.experience.lengths.tolist())
        flops.append(least_flops("grpo", model, batch))
        shapes.add(str(batch.rows.tokens.shape))
    peak = cases.peak_memory_mib()
    rates = Rates(args, model, args.batch_size * args.generations * (width + args.new_tokens))
    floors = []
    for number, operations in enumerate(flops):
        own = sizes[number * args.batch_size :][: args.batch_size]
        floor = rates.sampling(own, np.repeat(own, args.generations), lengths[number])
        floors.append(floor["seconds"] + operations / rates.measured["flops_per_second"])
    rollouts.report(
        args,
        trainer="jaxalign",
        versions={"jaxalign": jaxalign.__version__, "jax": jax.__version__},
        settings={"remat": args.remat, "length": longest, "micro_batch_size": layout.micro_batch_size},
        seconds=seconds,
        lengths=lengths,
        extra={
            "peak_memory_mib": peak,
            "sampling_seconds": sampled,
            "losses": losses,
            "row_shapes": sorted(shapes),
            "floor_seconds": float(np.median(floors[args.warmup :])),
        },
    )


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


class Rates:
    """What this machine can do, measured in the sizes of one decode step, and what that makes of sampling.

    Args:
      args: the command line.
      model: the model.
      tokens: tokens that the caches hold at the end.
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

    def sampling(self, read, prompts, lengths) -> dict[str, float]:
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
