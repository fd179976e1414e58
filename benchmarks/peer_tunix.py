# pyright: reportMissingImports=false
"""Times Tunix's PeftTrainer (SFT) or DPOTrainer on the shared rows; run with the Python of Tunix's own environment."""

from __future__ import annotations

import json
import time
from importlib.metadata import version

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.sft import peft_trainer, utils
from tunix.sft.dpo import dpo_trainer


def parse():
    """The shared command line and Tunix's own choice."""
    parser = cases.arguments(__doc__ or "")
    parser.add_argument("--remat", choices=("none", "block", "decoder"), default="none")
    return parser.parse_args()


def load(args) -> llama3.Llama3:
    """Tunix's Llama 3 with the folder's weights.

    Tunix 0.1.7 never passes its config's `rope_theta` on, so the model would run with 1,000,000; the default of its
    `apply_rope` is set to the folder's value instead, which costs nothing.
    """
    described = json.loads((args.model / "config.json").read_text())
    rope = described.get("rope_parameters") or described
    theta = float(rope["rope_theta"])
    heads = described["num_attention_heads"]
    config = llama3.ModelConfig(
        num_layers=described["num_hidden_layers"],
        vocab_size=described["vocab_size"],
        embed_dim=described["hidden_size"],
        hidden_dim=described["intermediate_size"],
        num_heads=heads,
        head_dim=described.get("head_dim") or described["hidden_size"] // heads,
        num_kv_heads=described["num_key_value_heads"],
        rope_theta=int(theta),
        norm_eps=described["rms_norm_eps"],
        weight_tying=described["tie_word_embeddings"],
        remat_config=llama3.RematConfig[args.remat.upper()],
    )
    llama3.apply_rope.__defaults__ = (theta,)
    return llama3_params.create_model_from_safe_tensors(str(args.model), config, dtype=jnp.dtype(args.dtype))


def adamw(args) -> optax.GradientTransformation:
    """AdamW with clipping and a linear schedule: the optimiser of every trainer here."""
    schedule = optax.linear_schedule(args.learning_rate, 0.0, args.warmup + args.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, eps=1e-8, weight_decay=0.0))


def place(rows: list[list[int]], width: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded to `width`, and their mask."""
    ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, span], mask[index, span] = row, 1
    return ids, mask


def dpo_inputs(batches) -> list[dpo_trainer.TrainingInput]:
    """One static shape for all batches: prompts left-padded to the longest, completions right-padded."""
    pairs = [pair for batch in batches for pair in batch]
    prompt_width = max(len(pair.prompt_ids) for pair in pairs)
    width = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
    inputs = []
    for batch in batches:
        prompt_ids, prompt_mask = place([pair.prompt_ids for pair in batch], prompt_width, left=True)
        chosen_ids, chosen_mask = place([pair.chosen_ids for pair in batch], width, left=False)
        rejected_ids, rejected_mask = place([pair.rejected_ids for pair in batch], width, left=False)
        inputs.append(
            dpo_trainer.TrainingInput(
                prompt_ids=prompt_ids,
                prompt_mask=prompt_mask,
                chosen_ids=chosen_ids,
                chosen_mask=chosen_mask,
                rejected_ids=rejected_ids,
                rejected_mask=rejected_mask,
            )
        )
    return inputs


def sft_inputs(batches) -> list[dict[str, np.ndarray]]:
    """One static shape for all batches: rows right-padded to the longest."""
    rows = [[pair.prompt_ids + pair.chosen_ids for pair in batch] for batch in batches]
    width = max(len(row) for batch in rows for row in batch)
    inputs = []
    for batch, ids in zip(batches, rows, strict=True):
        tokens, real = place(ids, width, left=False)
        prompt = np.array([[len(pair.prompt_ids)] for pair in batch])
        inputs.append({"tokens": tokens, "real": real, "loss": real * (np.arange(width) >= prompt)})
    return inputs


def sft_model_input(rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What Tunix's SFT loss takes."""
    return {
        "input_tokens": rows["tokens"],
        "input_mask": rows["loss"],
        "positions": utils.build_positions_from_mask(rows["real"]),
        "attention_mask": utils.make_causal_attn_mask(rows["real"] > 0),
    }


def build(args) -> peft_trainer.PeftTrainer:
    """The trainer of the task; DPO gets a second model as its live reference."""
    limits = {"eval_every_n_steps": 10**9}
    if args.task == "sft":
        trainer = peft_trainer.PeftTrainer(load(args), adamw(args), peft_trainer.TrainingConfig(**limits))
        return trainer.with_gen_model_input_fn(sft_model_input)
    config = dpo_trainer.DPOTrainingConfig(beta=0.1, **limits)
    return dpo_trainer.DPOTrainer(load(args), load(args), adamw(args), config)


class Clock:
    """Feeds the batches one by one, each after the step before is done, and notes when."""

    def __init__(self, trainer: peft_trainer.PeftTrainer, inputs: list) -> None:
        self.trainer, self.inputs, self.marks = trainer, inputs, []

    def __iter__(self):
        for batch in self.inputs:
            self.mark()
            yield batch
        self.mark()

    def mark(self) -> None:
        jax.block_until_ready(nnx.state(self.trainer.model))
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)]


class Losses:
    """Collects every logged loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def log(self, prefix, name, value, mode, step) -> None:
        if name == "loss":
            self.values.append(float(value))

    def close(self) -> None:
        pass


def padded_tokens(task: str, batches) -> int:
    """Tokens that each batch costs at the one static shape."""
    pairs = [pair for batch in batches for pair in batch]
    size = len(batches[0])
    if task == "sft":
        return size * max(len(pair.prompt_ids) + len(pair.chosen_ids) for pair in pairs)
    completion = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
    return 2 * size * (max(len(pair.prompt_ids) for pair in pairs) + completion)


def main() -> None:
    """Runs the warm-up and the measured steps and prints one JSON line."""
    args = parse()
    cases.use_cores(args.threads)
    batches = cases.read_batches(args.data, args.batch_size, args.warmup + args.steps)
    inputs = (sft_inputs if args.task == "sft" else dpo_inputs)(batches)
    trainer = build(args)
    losses = trainer.metrics_logger = Losses()
    clock = Clock(trainer, inputs)
    trainer.train(clock)
    seconds = clock.seconds()
    cases.report(
        args,
        batches,
        trainer="tunix",
        versions={name: version(name) for name in ("google-tunix", "jax", "flax")},
        settings={"remat": args.remat, "weights": args.dtype},
        seconds=seconds,
        losses=losses.values,
        row_tokens=[padded_tokens(args.task, batches)] * len(batches),
        extra={"compile_seconds": cases.compile_seconds(seconds, args.warmup)},
    )


if __name__ == "__main__":
    main()
