# pyright: reportMissingImports=false
"""Times TRL's SFTTrainer or DPOTrainer, or transformers' `generate`, for gpu.py; run with TRL's own environment."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import argparse
import json
import tempfile
import time
from importlib.metadata import version

import gpu_cases
import peer_trl
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PrinterCallback
from trl import DPOConfig, SFTConfig, SFTTrainer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARMUP = 2


def load(shape: str, dtype: str):
    """The model with random weights, made on the device."""
    described = dict(gpu_cases.SHAPES[shape])
    config = AutoConfig.for_model(described.pop("model_type"), **described)
    with torch.device(DEVICE):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")


def trainer_arguments(args: argparse.Namespace, work: gpu_cases.Work, folder: str) -> dict[str, object]:
    """As on CPU, but on the device: bfloat16 autocast over float32 weights, or bfloat16 weights, as `Work` says."""
    wide = work.params == "float32"
    settings = argparse.Namespace(
        warmup=WARMUP,
        steps=args.steps,
        batch_size=work.documents,
        learning_rate=1e-5,
        checkpointing=work.remat != "none",
        dtype="bfloat16",
        autocast=wide,
        compile=False,
    )
    optimizer = {"adamw": "adamw_torch_fused", "adafactor": "adafactor"}[work.optimizer]
    return peer_trl.trainer_arguments(settings, folder) | {"use_cpu": DEVICE == "cpu", "optim": optimizer}


def train(args: argparse.Namespace, work: gpu_cases.Work) -> dict[str, object]:
    """Seconds of each step, collation and DPO's live reference included."""
    clock, steps = peer_trl.Clock(), WARMUP + args.steps
    model = load(args.shape, work.params)
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_arguments(args, work, folder)
        tokenizer = peer_trl.tokenizer_for(model.config)
        if args.task == "sft":
            rows = [
                {"input_ids": ids, "labels": ids}
                for step in gpu_cases.sft_rows(args.shape, work, steps)
                for ids in step
            ]
            trainer = SFTTrainer(
                model,
                SFTConfig(max_length=None, **settings),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[clock],
            )
        else:
            rows = [pair for step in gpu_cases.dpo_pairs(args.shape, work, steps) for pair in step]
            trainer = peer_trl.TokenizedDPOTrainer(
                model,
                load(args.shape, work.params),
                DPOConfig(beta=0.1, loss_type=["sigmoid"], precompute_ref_log_probs=False, max_length=None, **settings),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[clock],
            )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {"seconds": clock.seconds()[WARMUP:], "loss": clock.losses[-1]}


@torch.inference_mode()
def decode(args: argparse.Namespace, work: gpu_cases.Work) -> dict[str, object]:
    """Whole calls of `generate`: seconds for all tokens, and for the first alone."""
    model = load(args.shape, "bfloat16").eval()
    ids = torch.tensor(gpu_cases.prompts(args.shape, work), device=DEVICE)
    mask, found = torch.ones_like(ids), {}
    for name, new in (("seconds", work.new), ("first_token_seconds", 1)):
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new,
            pad_token_id=model.config.pad_token_id,
        )
        found[name] = []
        for _ in range(1 + max(1, args.steps // 3)):
            started = time.perf_counter()
            drawn = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - started)
            if drawn.shape[1] != work.prompt + new:
                raise ValueError(f"{drawn.shape[1] - work.prompt} tokens were drawn for each prompt, not {new}")
        found[name].pop(0)
    return found


MEASURES = {"sft": train, "dpo": train, "decode": decode}


def main() -> None:
    """Prints one JSON line."""
    args = gpu_cases.arguments(__doc__ or "").parse_args()
    found = MEASURES[args.task](args, gpu_cases.chosen(args.shape, args.work))
    if DEVICE == "cuda":
        found |= {"peak_bytes": torch.cuda.max_memory_allocated()}
    versions = {name: version(name) for name in ("trl", "transformers", "torch")}
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    print(json.dumps({"device": device, "versions": versions, **found}))


if __name__ == "__main__":
    main()
