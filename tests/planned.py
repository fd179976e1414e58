"""Tiny stages for plans: settings, and sizes by hand."""

import yaml

from jaxalign.config import load_config
from jaxalign.run import pick_stage

LAYERS, WIDTH, HEADS, KV, DIM, MLP, VOCAB = 2, 64, 4, 2, 16, 128, 320


def stage_of(tmp_path, settings):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(settings))
    return pick_stage(load_config(path, data_needed=False), None)


def offline(bare, method, **train):
    return {
        "model": {"path": str(bare)},
        "data": {"max_length": 128},
        "method": method,
        "mesh": {"data": 2, "fsdp": 4},
        "train": {"batch_size": 16, "micro_batch_size": 8, "max_steps": 3, **train},
    }


def online(bare, method, **changes):
    return {
        "model": {"path": str(bare)},
        "data": {"max_length": 33, "max_prompt_length": 32},
        "method": {"max_completion_length": 16, **method},
        "mesh": {"data": 2, "fsdp": 4},
        "train": {"batch_size": 8, "max_steps": 3},
        **changes,
    }


# Every matrix is split over the four devices of `fsdp`; norms are whole.
MATRICES = (
    2 * VOCAB * WIDTH
    + LAYERS * (WIDTH * DIM * (2 * HEADS + 2 * KV) + 3 * WIDTH * MLP)
)  # fmt: skip
NORMS = WIDTH * (2 * LAYERS + 1)
PARAMETERS = 4 * (MATRICES // 4 + NORMS)
