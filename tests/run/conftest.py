"""A tiny model with a tokenizer, ragged pairs, a config, and the command line in a process of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxalign.models import ModelConfig, Rope, build, save
from jaxalign.sharding import MeshConfig, make_mesh
from tests.compiling import QUICKLY

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the cat sat on a mat and looked at seven small birds that flew over an old house near the river"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A Hugging Face folder: two llama layers with a spread of logits, a byte-level tokenizer, a ChatML template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    config = ModelConfig(
        "llama", 320, 48, 2, 4, 2, 12, 96, 256, rope=Rope(), windows=(None, None), tie_embeddings=True, eos_ids=(2,)
    )
    model = build(config)
    variables = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf, model.init(jax.random.key(3)))
    return save(tmp_path_factory.mktemp("models") / "tiny", model, variables, tokenizer)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """45 conversational pairs of ragged lengths: the chosen answer is short, the rejected one is not."""
    rng = np.random.default_rng(0)

    def text(low, high):
        return " ".join(rng.choice(TEXT.split(), rng.integers(low, high)))

    rows = [
        {
            "prompt": [{"role": "user", "content": text(2, 12)}],
            "chosen": [{"role": "assistant", "content": text(1, 6)}],
            "rejected": [{"role": "assistant", "content": text(6, 20)}],
        }
        for _ in range(45)
    ]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", autouse=True)
def every_run(compiled_quickly):
    """What is compared are runs with each other; numbers are compared in the other folders."""


@pytest.fixture
def one_device(monkeypatch):
    """A run whose `mesh` says nothing has one device, for which programs compile faster than for eight."""

    def make(config: MeshConfig, devices=None):
        return make_mesh(config, jax.devices()[:1] if devices is None and config == MeshConfig() else devices)

    monkeypatch.setattr(import_module("jaxalign.run.prepare"), "make_mesh", make)


@pytest.fixture
def settings(tiny, pairs, tmp_path, one_device) -> dict:
    """A run of one DPO stage: 3 steps per epoch, dropout-free, with evaluation and checkpoints at odd steps."""
    return {
        "name": "run",
        "runs_dir": str(tmp_path / "runs"),
        "model": {"path": str(tiny)},
        "data": {"path": str(pairs), "eval_ratio": 0.2, "max_length": 128},
        "method": {"name": "preference"},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"batch_size": 12, "micro_batch_size": 6, "max_steps": 8, "save_steps": 3, "eval_steps": 4},
        "log": {"logging_steps": 2},
    }


@pytest.fixture
def write_config(tmp_path) -> Callable[[dict], Path]:
    """Settings as a YAML file."""

    def write(settings: dict) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture(scope="session")
def cli(tmp_path_factory) -> Callable[..., subprocess.Popen]:
    """Starts `jaxalign` in a process of its own, one CPU device, compiled programs kept between processes."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {
        **os.environ,
        # A tenth of the time to compile, and one process in a test compiles for the others.
        "XLA_FLAGS": " ".join(f"--{name}={str(value).lower()}" for name, value in QUICKLY.items()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
    }

    def start(*arguments: str | Path, **changes: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "jaxalign", *map(str, arguments)]
        return begin(command, environment | changes)

    return start


STARTED: list[subprocess.Popen] = []


def begin(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """Starts a process whose output can be read; it ends with the test at the latest."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_left():
    """What a failed test has left running, or unread, must not fail the next one."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.terminate()  # nothing happens to one that has ended
        if process.stdout is None or process.stdout.closed:
            continue
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.stdout.close()


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Waits for a process, checks its exit status, and gives what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def wait_until(condition, process, seconds=240.0):
    """Polls a condition; False if the process ended first, whose output is then printed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            print(process.stdout.read())
            return False
        time.sleep(0.002)
    raise TimeoutError("the process did not get that far")
