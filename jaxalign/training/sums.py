"""SHA-256 of every file of a checkpoint, computed by all processes together, each its share of the bytes.

A checkpoint may be larger than what one process reads in a reasonable time. All decide alike, because process 0 says
what lies in the folder and compares.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
from etils import epath

from jaxalign.exchange import Messages

SUMS = "SHA256SUMS"
UNFINISHED = f"the save did not finish (no {SUMS})"
# How long processes wait for each other: heartbeats notice who died, so that this only has to be long enough.
PATIENCE = 3600.0  # seconds
SLOWEST = 10e6  # bytes per second and process


def patience(size: float) -> float:
    """Seconds that reading or writing so many bytes, by all processes together, may take."""
    return PATIENCE + size / (SLOWEST * jax.process_count())


def verify(path: epath.Path) -> str | None:
    """Why a step's folder cannot be trusted; None when every file has the SHA-256 that it was saved with.

    All processes call it, read their shares, and get the same answer.
    """
    talk = Messages(f"verify {path}")
    reason, expected, sizes = talk.from_first(lambda: _look(path), PATIENCE)
    if reason is not None:
        return reason

    def compare(parts: list[dict[str, str]]) -> str | None:
        actual = _joined(parts)
        changed = [name for name in expected if actual[name] != expected[name]]
        return f"{changed[0]} is not what was saved (its SHA-256 differs)" if changed else None

    return talk.through_first(lambda: _sums(path, own_share(sizes)), compare, patience(sum(sizes.values())))


def sum_up(path: epath.Path, use: Callable[[dict[str, str]], None], seconds: float) -> None:
    """Reads a step's folder, all processes their shares, and waits until process 0 has made use of it.

    Args:
      path: the folder, committed.
      use: called on process 0 with the SHA-256 of every file by its relative name.
      seconds: that reading may take.

    Raises:
      OSError: a file cannot be read, here or by another process, or `use` failed on process 0.
    """
    talk = Messages(f"sums of {path}")
    sizes = talk.from_first(lambda: _sizes(path, _files(path)), seconds)
    talk.through_first(lambda: _sums(path, own_share(sizes)), lambda parts: use(_joined(parts)), seconds)


def write_sums(path: epath.Path, sums: Mapping[str, str]) -> None:
    """Writes `SHA256SUMS` (`sha256sum -c` reads it), atomically: by this a checkpoint counts."""
    temporary = path / f"{SUMS}.tmp"
    temporary.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    temporary.replace(path / SUMS)


def own_share(sizes: Mapping[str, int]) -> list[str]:
    """Names of the files that this process reads: all processes get about as many bytes."""
    loads = [0] * jax.process_count()
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += max(sizes[name], 1)
        if least == jax.process_index():
            mine.append(name)
    return mine


def _joined(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {name: digest for part in parts for name, digest in part.items()}


def _look(path: epath.Path) -> tuple[str | None, dict[str, str], dict[str, int]]:
    """What is wrong with a folder at first sight; else the sums expected and the sizes of its files."""
    if not path.exists():
        return "it does not exist", {}, {}
    if not (path / SUMS).exists():
        return UNFINISHED, {}, {}
    expected, present = _read_sums(path), set(_files(path))
    if missing := sorted(set(expected) - present):
        return f"{missing[0]} is missing", {}, {}
    if unknown := sorted(present - set(expected)):
        return f"{unknown[0]} is not in {SUMS}", {}, {}
    return None, expected, _sizes(path, expected)


def _read_sums(path: epath.Path) -> dict[str, str]:
    text = (path / SUMS).read_bytes().decode(errors="replace")
    pairs = (line.partition("  ") for line in text.splitlines())
    return {name: digest for digest, _, name in pairs}


def _files(path: epath.Path) -> list[str]:
    """Files under `path` by relative name, sorted, without the checksums themselves."""
    names = [str((folder / name).relative_to(path)) for folder, _, files in path.walk() for name in files]
    return sorted(name for name in names if name not in (SUMS, f"{SUMS}.tmp"))


def _sizes(path: epath.Path, names: Iterable[str]) -> dict[str, int]:
    names = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: (path / name).stat().length, names), strict=True))


def _sums(path: epath.Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1) + 4)) as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(path / name), names), strict=True))


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
