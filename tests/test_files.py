"""Files whole or not at all, and what is said when a disk is full."""

import contextlib
import os
import resource
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from jaxalign.cli import _plain
from jaxalign.files import write_text, writing
from jaxalign.models import ModelConfig, Rope, build, save

FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
CURE = "cannot write: No space left on device. Nothing saved before is lost: free space, then give the same command"


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    for text in ("one", "two"):
        write_text(tmp_path / "a.json", text)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "two")]


@FULL
def test_a_full_disk_keeps_the_old_file_and_says_what_to_do(tmp_path):
    write_text(tmp_path / "a.json", "old")
    (tmp_path / f"a.json.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "a.json", "new")
    assert _plain(caught.value) == f"{tmp_path / 'a.json'}: {CURE}"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]


@FULL
def test_errors_of_libraries_in_rust_are_named_too(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught, writing(tmp_path):
        Tokenizer(BPE()).save(str(tmp_path / "tokenizer.json"))
    assert _plain(caught.value) == f"{tmp_path}: {CURE}"


def test_other_errors_are_left_alone(tmp_path):
    with pytest.raises(ValueError, match="no file system"), writing(tmp_path):
        raise ValueError("no file system")


def test_an_export_that_finds_no_room_is_named_and_leaves_no_half(tmp_path):
    model = build(ModelConfig("llama", 320, 48, 2, 4, 2, 12, 96, 256, rope=Rope(), windows=(None, None)))
    variables = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(model.init, jax.random.key(0))
    )
    with file_limit(1 << 14), pytest.raises(OSError) as caught:
        save(tmp_path / "export", model, variables, None)
    said = _plain(caught.value)
    assert said.startswith(f"{tmp_path / 'export'}: cannot write: File too large. Nothing saved before is lost: ")
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def file_limit(size: int):
    """Writes beyond `size` bytes in a file fail, as they would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
