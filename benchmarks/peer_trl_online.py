# pyright: reportMissingImports=false
"""Times Hugging Face's `generate`, or TRL's GRPOTrainer, on the shared prompts; run with TRL's own environment."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version

import cases
import peer_trl
import rollouts
import torch
import words
from datasets import Dataset
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    PrinterCallback,
)
from trl import GRPOConfig, GRPOTrainer


def parse():
    """The shared command line and the choices of transformers and TRL."""
    parser = rollouts.arguments(__doc__ or "")
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic", help="how `generate` keeps keys")
    parser.add_argument("--compile", action="store_true", help="torch.compile; sampling: of a decode step")
    parser.add_argument("--continuous", action="store_true", help="sampling: transformers' continuous batching")
    parser.add_argument("--checkpointing", action="store_true", help="grpo: gradient checkpointing (TRL's default)")
    parser.add_argument("--autocast", action="store_true", help="bfloat16: keep float32 weights (TRL's default)")
    return parser.parse_args()


class CompileOnCpu(CompileConfig):
    """By itself `generate` compiles on GPUs only."""

    _compile_all_devices = True


def sampling_config(args) -> GenerationConfig:
    """Plain sampling at temperature 1 until one of the ends."""
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=args.new_tokens,
        eos_token_id=rollouts.ending_ids(args) or None,
        pad_token_id=rollouts.pad_id(args.model),
        cache_implementation="static" if args.compile or args.cache == "static" else None,
    )
    if args.compile:
        config.compile_config = CompileOnCpu(mode="default")
    return config


def in_batches(args, model, prompts: list[list[int]]) -> Callable[[int], list[int]]:
    """`generate` on one batch after the other, each until its last completion ends."""
    pad, ends = model.generation_config.pad_token_id, torch.tensor(rollouts.ending_ids(args))
    width = max(map(len, prompts))
    batches = []
    for start in range(0, len(prompts), args.batch_size):
        rows = prompts[start : start + args.batch_size]
        longest = width if args.compile else max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        batches.append((ids, mask))

    @torch.inference_mode()
    def call(seed: int) -> list[int]:
        torch.manual_seed(seed)
        lengths: list[int] = []
        for ids, mask in batches:
            new = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :]
            ended = torch.isin(new, ends)
            lengths += torch.where(ended.any(1), ended.int().argmax(1) + 1, args.new_tokens).tolist()
        return lengths

    return call


def continuous(args, model, prompts: list[list[int]]) -> Callable[[int], list[int]]:
    """Continuous batching: a place whose completion ended takes the next prompt."""
    # One page holds a whole row. Left to itself it takes most of the machine's memory and is far slower.
    page = -(-(max(map(len, prompts)) + args.new_tokens) // 32) * 32
    settings = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=args.batch_size,
        max_requests_per_batch=args.batch_size,
        max_batch_tokens=page * 2,
        allow_block_sharing=False,
    )

    def call(seed: int) -> list[int]:
        torch.manual_seed(seed)
        found = model.generate_batch(prompts, continuous_batching_config=settings, progress_bar=False)
        return [len(each.generated_tokens) for each in found.values()]

    return call


def sample(args) -> None:
    """Calls of `generate`."""
    prompts = rollouts.read_prompts(args.data, args.prompts)
    model = peer_trl.load(args).eval()
    # Nothing of the folder's own generation_config is to be mixed in.
    model.generation_config = sampling_config(args)
    call = (continuous if args.continuous else in_batches)(args, model, prompts)
    seconds, lengths = rollouts.time_calls(args, call)
    report(args, model, seconds, lengths, {"cache": args.cache, "continuous": args.continuous})


class TimedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer that notes how long it samples and how long the completions are."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.eos_token_ids = []  # nothing ends a completion before its last token
        self.sampling: list[float] = []
        self.lengths: list[list[int]] = []

    def _generate_single_turn(self, *args, **kwargs):
        start = time.perf_counter()
        completions, logps = super()._generate_single_turn(*args, **kwargs)
        self.sampling.append(time.perf_counter() - start)
        self.lengths.append([len(ids) for ids in completions])
        return completions, logps


def share_of_even(prompts, completions, completion_ids, **columns) -> list[float]:
    """The reward."""
    return rollouts.share_of_even(completion_ids)


def train(args) -> None:
    """GRPO steps, one update per rollout."""
    count = args.batch_size * (args.warmup + args.steps)
    rows = [{"prompt": rollouts.to_text(ids)} for ids in rollouts.read_prompts(args.data, count)]
    clock = peer_trl.Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = peer_trl.trainer_arguments(args, folder)
        settings |= {"per_device_train_batch_size": args.batch_size * args.generations, "shuffle_dataset": False}
        del settings["train_sampling_strategy"]  # GRPOTrainer has its own
        config = GRPOConfig(
            num_generations=args.generations,
            max_completion_length=args.new_tokens,
            temperature=1.0,
            beta=0.0,
            generation_kwargs={"eos_token_id": None},
            cache_implementation="static" if args.cache == "static" else None,
            **settings,
        )
        trainer = TimedGRPOTrainer(
            peer_trl.load(args),
            share_of_even,
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=words.tokenizer_for(args),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    extra = {"sampling_seconds": trainer.sampling, "losses": clock.losses}
    report(args, trainer.model, clock.seconds(), trainer.lengths, {"checkpointing": args.checkpointing}, extra)


def report(args, model, seconds, lengths, settings, extra=None) -> None:
    """Prints the JSON line."""
    rollouts.report(
        args,
        trainer="trl",
        versions={name: version(name) for name in ("trl", "transformers", "torch")},
        settings={
            "weights": str(next(model.parameters()).dtype).removeprefix("torch."),
            "attention": args.attention,
            "compile": args.compile,
            **settings,
        },
        seconds=seconds,
        lengths=lengths,
        extra=extra,
    )


def main() -> None:
    """Runs the warm-up and the measured calls or steps and prints one JSON line."""
    args = parse()
    cases.use_cores(args.threads)
    torch.set_num_threads(args.threads)
    {"sample": sample, "sample-ragged": sample, "grpo": train}[args.task](args)


if __name__ == "__main__":
    main()
