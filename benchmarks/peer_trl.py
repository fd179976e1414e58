# pyright: reportMissingImports=false
"""Times TRL's SFTTrainer or DPOTrainer on the shared rows; run with the Python of TRL's own environment."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import tempfile
import time
from importlib.metadata import version

import cases
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Wall time from the end of one optimiser step to the end of the next, and the logged losses."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.marks.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)]


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer that takes rows of token ids as they are; TRL 1.16.0 has no such option."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def parse():
    """The shared command line and TRL's own choices."""
    parser = cases.arguments(__doc__ or "")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing (TRL's default)")
    parser.add_argument("--autocast", action="store_true", help="bfloat16: keep float32 weights (TRL's default)")
    parser.add_argument("--padding-free", action="store_true", help="SFT: one row per batch, no padding")
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    return parser.parse_args()


def tokenizer_for(config) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the pad and EOS ids; the trainers read nothing else from it."""
    eos_id = config.eos_token_id
    pad_id = eos_id if config.pad_token_id is None else config.pad_token_id
    vocab = {f"<{index}>": index for index in sorted({0, eos_id, pad_id})}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<0>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<0>", eos_token=f"<{eos_id}>", pad_token=f"<{pad_id}>"
    )


def trainer_arguments(args, folder: str) -> dict[str, object]:
    """TrainingArguments with the same optimiser everywhere, rows in file order, nothing saved or reported."""
    return {
        "output_dir": folder,
        "max_steps": args.warmup + args.steps,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": args.checkpointing,
        "bf16": args.dtype == "bfloat16" and args.autocast,
        "use_cpu": True,
        "torch_compile": args.compile,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


def load(args):
    """The model in the dtype that its weights are kept in."""
    kept = torch.bfloat16 if args.dtype == "bfloat16" and not args.autocast else torch.float32
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=kept, attn_implementation=args.attention)


def sft_trainer(args, batches, folder: str, clock: Clock) -> SFTTrainer:
    """SFT on prompt + chosen with the loss on the completion."""
    rows = [
        {
            "input_ids": pair.prompt_ids + pair.chosen_ids,
            "labels": [-100] * len(pair.prompt_ids) + pair.chosen_ids,
        }
        for batch in batches
        for pair in batch
    ]
    config = SFTConfig(max_length=None, padding_free=args.padding_free, **trainer_arguments(args, folder))
    model = load(args)
    return SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_for(model.config),
        callbacks=[clock],
    )


def dpo_trainer(args, batches, folder: str, clock: Clock) -> DPOTrainer:
    """DPO with a second copy of the model as the live reference."""
    rows = [pair._asdict() for batch in batches for pair in batch]
    config = DPOConfig(
        beta=0.1, loss_type=["sigmoid"], precompute_ref_log_probs=False, **trainer_arguments(args, folder)
    )
    model = load(args)
    return TokenizedDPOTrainer(
        model,
        load(args),
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_for(model.config),
        callbacks=[clock],
    )


def padded_tokens(args, batch) -> int:
    """Tokens that one batch costs with padding to its longest row."""
    if args.task == "sft":
        lengths = [len(pair.prompt_ids) + len(pair.chosen_ids) for pair in batch]
        return sum(lengths) if args.padding_free else max(lengths) * len(lengths)
    completions = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in batch]
    longest = max(len(pair.prompt_ids) + length for pair, length in zip(batch, completions, strict=True))
    return longest * 2 * len(batch)


def main() -> None:
    """Runs the warm-up and the measured steps and prints one JSON line."""
    args = parse()
    cases.use_cores(args.threads)
    torch.set_num_threads(args.threads)
    batches = cases.read_batches(args.data, args.batch_size, args.warmup + args.steps)
    clock = Clock()
    build = {"sft": sft_trainer, "dpo": dpo_trainer}[args.task]
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(args, batches, folder, clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    cases.report(
        args,
        batches,
        trainer="trl",
        versions={name: version(name) for name in ("trl", "transformers", "torch")},
        settings={
            "checkpointing": args.checkpointing,
            "weights": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
            "padding_free": args.padding_free,
            "attention": args.attention,
            "compile": args.compile,
        },
        seconds=clock.seconds(),
        losses=clock.losses,
        row_tokens=[padded_tokens(args, batch) for batch in batches],
    )


if __name__ == "__main__":
    main()
