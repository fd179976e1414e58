"""`model.attention` is decided before packing: what `auto` becomes, and what an explicit choice says."""

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from jaxalign.config import parse_config
from jaxalign.run import prepare
from jaxalign.run.kernels import choose_attention, costs
from tests.layouts import tiny_config

# The shapes of Llama-3.1-8B.
LARGE = replace(
    tiny_config(num_layers=32, windows=(None,) * 32, num_heads=32, num_kv_heads=8, head_dim=128),
    embed_dim=4096,
    mlp_dim=14336,
    vocab_size=128256,
)


def mesh_of(platform: str, compute_capability: str = "9.0", context: int = 1) -> Any:
    return SimpleNamespace(
        devices=np.array([SimpleNamespace(platform=platform, compute_capability=compute_capability)] * context),
        shape={"context": context},
    )


def choose(
    platform,
    *,
    method="preference",
    config=LARGE,
    dtype="bfloat16",
    lengths=None,
    capability="9.0",
    context=1,
    **sections,
):
    stage = parse_config(
        {
            "data": {"path": "x"},
            "method": {"name": method},
            **sections,
            "model": {"path": "y", **sections.get("model", {})},
        }
    ).stages[0]
    lengths = lengths or {"prompt": 3000, "chosen": 500, "rejected": 500}
    found = {name: np.array([each // 2, each]) for name, each in lengths.items()}
    found["total"] = np.sum(list(found.values()), axis=0)
    examples = cast(Any, SimpleNamespace(lengths=found))
    stage, why = choose_attention(stage, [examples], config, mesh_of(platform, capability, context), dtype)
    return stage.model.attention, getattr(stage.method, "share_prompt", None), why


TEXTS = {"prompt": 0, "completion": 4000}
LONG = {"prompt": 4000, "chosen": 28000, "rejected": 28000}


@pytest.mark.parametrize(
    ("given", "attention", "share", "said"),
    [
        ({"platform": "cpu"}, "xla", True, "cpu"),
        ({"platform": "tpu"}, "xla", True, "sharing prompts"),
        ({"platform": "tpu", "lengths": LONG}, "splash", False, "without sharing"),
        ({"platform": "tpu", "method": "sft", "lengths": TEXTS}, "splash", None, "TPUs"),
        ({"platform": "tpu", "method": "sft", "lengths": TEXTS, "dtype": "float64"}, "xla", None, "float64"),
        ({"platform": "tpu", "lengths": LONG, "model": {"attention": "xla"}}, "xla", True, "asked"),
        ({"platform": "tpu", "method": "sft", "lengths": TEXTS, "context": 2}, "xla", None, "context=2"),
        ({"platform": "gpu"}, "cudnn", True, "GPUs"),
        ({"platform": "gpu", "dtype": "float32"}, "xla", True, "float32"),
        ({"platform": "gpu", "lengths": LONG}, "xla", True, "60000 tokens"),
        ({"platform": "gpu", "config": replace(LARGE, head_dim=256)}, "cudnn", True, "GPUs"),
        ({"platform": "gpu", "config": replace(LARGE, head_dim=256), "capability": "8.9"}, "xla", True, "Hopper"),
    ],
)
def test_auto(given, attention, share, said):
    found = choose(given.pop("platform"), **given)
    assert found[:2] == (attention, share) and said in found[2]


def test_completions_yet_to_be_drawn_count_as_the_longest():
    """8 completions of 4,096 tokens in one row: most of its scores are between different completions."""
    method = {"name": "grpo", "max_completion_length": 4096, "num_generations": 8}
    stage = parse_config(
        {
            "model": {"path": "y"},
            "data": {"path": "x"},
            "method": method,
            "rollout": {"rewards": [{"name": "x.py:f"}]},
        }
    ).stages[0]
    examples = cast(Any, SimpleNamespace(lengths={"prompt": np.array([500])}))
    decided, _ = choose_attention(stage, [examples], LARGE, mesh_of("tpu"), "bfloat16")
    assert decided.model.attention == "splash" and not decided.method.share_prompt
    # 500 + 8 * 4096 tokens in one row, or 8 rows of 4596; 2 operations per score and channel, twice, over 2 per weight.
    weight = 2 * 32 * 32 * 128 / 6.98e9
    shared, apart = 33268 * (1 + 2.5 * weight / 2 * 33268), 36768 * (1 + weight / 2 * 4596)
    assert costs(stage, examples, LARGE) == pytest.approx((shared, apart), rel=2e-3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"platform": "tpu", "model": {"attention": "splash"}}, "method.share_prompt to false"),
        ({"platform": "cpu", "model": {"attention": "splash"}}, "runs on TPUs, and this is cpu"),
        ({"platform": "tpu", "context": 2, "model": {"attention": "splash"}}, "over context=2"),
        ({"platform": "tpu", "model": {"attention": "cudnn"}}, "runs on NVIDIA GPUs, and this is tpu"),
        ({"platform": "gpu", "model": {"attention": "cudnn"}, "dtype": "float32"}, "float32"),
        ({"platform": "gpu", "model": {"attention": "cudnn"}, "train": {"row_length": 16384}}, "16384 tokens"),
    ],
)
def test_a_choice_that_cannot_serve_raises(given, said):
    with pytest.raises(ValueError, match=rf"model\.attention=.*{said}"):
        choose(given.pop("platform"), **given)


def test_a_run_decides_and_says_so(settings, caplog):
    with caplog.at_level(logging.INFO):
        ready = prepare(parse_config(settings).stages[0])
    assert ready.stage.model.attention == "xla" and ready.attention == "xla, which is what there is for cpu"
    settings["model"]["attention"] = "splash"
    with pytest.raises(ValueError, match=r"model\.attention=splash: it runs on TPUs"):
        prepare(parse_config(settings).stages[0])
