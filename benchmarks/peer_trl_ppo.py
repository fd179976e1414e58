# pyright: reportMissingImports=false
"""Times TRL 1.12's PPOTrainer, the last one that TRL had, on the shared prompts.

Run with TRL's own environment, the folder of the older release before it on the path (`run.py` sees to both).
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import tempfile
import time
from importlib.metadata import version

import cases
import rollouts
import torch
import trl
import words
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PrinterCallback,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Iterations(TrainerCallback):
    """Wall time from the end of one iteration (a rollout and all its updates) to the end of the next."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.marks.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)]


def parse():
    """The shared command line and TRL's own choices."""
    parser = rollouts.arguments(__doc__ or "")
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    return parser.parse_args()


def settings(args, folder: str) -> PPOConfig:
    """A rollout of `batch_size` prompts, all learnt from at once in each of the epochs."""
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=args.epochs,
        total_episodes=args.batch_size * (args.warmup + args.steps),
        local_rollout_forward_batch_size=args.batch_size,
        response_length=args.new_tokens,
        num_sample_generations=0,
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        adam_epsilon=1e-8,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )


def main() -> None:
    """Runs the warm-up and the measured iterations and prints one JSON line."""
    args = parse()
    cases.use_cores(args.threads)
    torch.set_num_threads(args.threads)
    count = args.batch_size * (args.warmup + args.steps)
    data = Dataset.from_list([{"input_ids": ids} for ids in rollouts.read_prompts(args.data, count)])
    loading = {"dtype": getattr(torch, args.dtype), "attn_implementation": args.attention}
    policy, reference = (AutoModelForCausalLM.from_pretrained(args.model, **loading) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, **loading) for _ in range(2)
    )
    clock, sampling, lengths = Iterations(), [], []
    generate = ppo_trainer.batch_generation

    def generation(model, queries, *rest):
        start = time.perf_counter()
        found = generate(model, queries, *rest)
        sampling.append(time.perf_counter() - start)
        lengths.append([found[0].shape[1] - queries.shape[1]] * len(queries))
        return found

    ppo_trainer.batch_generation = generation
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            settings(args, folder),
            words.tokenizer_for(args),
            policy,
            reference,
            reward,
            data,
            value,
            eval_dataset=data,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rollouts.report(
        args,
        trainer="trl",
        versions={"trl": trl.__version__} | {name: version(name) for name in ("transformers", "torch")},
        settings={"weights": args.dtype, "attention": args.attention},
        seconds=clock.seconds(),
        lengths=lengths,
        extra={"sampling_seconds": sampling},
    )


if __name__ == "__main__":
    main()
