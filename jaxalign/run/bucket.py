"""A run whose folder is in a bucket: written on this machine, copied there before a checkpoint counts.

Object stores cannot append to a file, so that process 0 keeps the run's small files in a folder of its machine and
copies them to the bucket: at the start of each stage, before every checkpoint counts, and at the end. What is in the
bucket is therefore never older than the checkpoint that a run goes on from, on whatever machine.

Checkpoints in `gs://` are written by Orbax, by all processes. It knows no other kind: elsewhere they are written on
this machine and then copied, which serves a run of one process.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax

from jaxalign.buckets import check_writable, delete, download, is_url, listing, scratch, upload
from jaxalign.config import RunConfig
from jaxalign.exchange import is_first
from jaxalign.run.folder import locked
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.sums import SUMS

DIRECT = ("gs://",)
CHECKPOINTS, EXPORT, CONFIG = "checkpoints/", "export/", "config.json"
# Not copied: what is of this machine, and what is computed again.
LOCAL = ("reference/", ".")


@dataclass
class Mirror:
    """The run's folder here and in the bucket.

    Attributes:
      url: the run's, in the bucket.
      folder: the run's, here.
    """

    url: str
    folder: Path
    _known: dict[str, tuple[int, int]] = field(default_factory=dict)

    def checkpoints(self, stage: str, save_total_limit: int) -> Checkpoints:
        """Checkpoints of a stage ("" for a run of one)."""
        prefix = f"{stage}/" if stage else ""
        place = checkpoints_place(self.url, self.folder, stage)
        if self.url.startswith(DIRECT):
            return Checkpoints(place, save_total_limit=save_total_limit, before=self.push)
        return Checkpoints(
            place,
            save_total_limit=save_total_limit,
            before=self.push,
            after=lambda steps: self._push_checkpoints(f"{prefix}{CHECKPOINTS}", steps),
        )

    def push(self) -> None:
        """Copies small files that have changed, on process 0; the others have none."""
        if not is_first():
            return
        names = []
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if not path.is_file() or any(part in f"/{name}" for part in (f"/{CHECKPOINTS}", f"/{EXPORT}")):
                continue
            if any(f"/{part}" in f"/{name}" for part in LOCAL) or name.endswith(".partial"):
                continue
            seen = (path.stat().st_size, path.stat().st_mtime_ns)
            if self._known.get(name) != seen:
                self._known[name] = seen
                names.append(name)
        upload(self.folder, self.url, names)

    def export_url(self, stage: str) -> str:
        """Where a stage's export is, or will be."""
        return f"{self.url}/{stage}/export" if stage else f"{self.url}/export"

    def push_export(self, stage: str) -> str:
        """Copies a stage's export, its config last, by which it counts; its URL."""
        place = f"{stage}/{EXPORT}" if stage else EXPORT
        if is_first():
            folder = self.folder / place
            names = sorted(f"{place}{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file())
            upload(self.folder, self.url, sorted(names, key=lambda name: name == f"{place}{CONFIG}"))
        return self.export_url(stage)

    def pull(self) -> None:
        """Brings the small files, and complete checkpoints unless Orbax reads them from the bucket."""
        found = listing(self.url)
        sums = {name.rpartition("/")[0] for name in found if name.endswith(f"/{SUMS}")}
        names = []
        for name in found:
            if f"/{CHECKPOINTS}" in f"/{name}":
                before, _, rest = f"/{name}".rpartition(CHECKPOINTS)
                step = f"{before}{CHECKPOINTS}{rest.partition('/')[0]}".removeprefix("/")
                if step in sums and not self.url.startswith(DIRECT):
                    names.append(name)
            elif f"/{EXPORT}" not in f"/{name}" or name.endswith(f"{EXPORT}{CONFIG}"):
                names.append(name)
        download(self.url, names, self.folder)

    def _push_checkpoints(self, place: str, steps: list[int]) -> None:
        """Copies steps that the bucket lacks, checksums last, and deletes those that are gone here, checksums first."""
        there: dict[str, list[str]] = {}
        for name in listing(f"{self.url}/{place}".rstrip("/")):
            there.setdefault(name.partition("/")[0], []).append(name)
        for step in steps:
            if f"{step}/{SUMS}" in there.get(str(step), ()):
                continue
            folder = self.folder / place / str(step)
            names = [f"{place}{step}/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()]
            upload(self.folder, self.url, sorted(names, key=lambda name: name.endswith(f"/{SUMS}")))
        for step in set(there) - {str(step) for step in steps}:
            names = sorted(there[step], key=lambda name: not name.endswith(f"/{SUMS}"))
            delete(f"{self.url}/{place}".rstrip("/"), names)


@contextlib.contextmanager
def working(config: RunConfig, fresh: bool) -> Iterator[RunConfig]:
    """The config with a `runs_dir` on this machine, filled with what the bucket has of this run, and locked.

    Raises:
      OSError: the bucket cannot be written; names it.
      ValueError: several processes and a bucket that Orbax does not write to, or the run is under way on this machine.
    """
    url = config.runs_dir.rstrip("/")
    if jax.process_count() > 1 and not url.startswith(DIRECT):
        raise ValueError(
            f"runs_dir={url}: several processes can save to a folder that all share, or to {DIRECT[0]}; this is neither"
        )
    place = scratch() / "runs" / hashlib.sha256(f"{url}/{config.name}".encode()).hexdigest()[:16]
    local = replace(config, runs_dir=str(place))
    if not is_first():
        yield local
        return
    check_writable(url)
    place.mkdir(parents=True, exist_ok=True)
    with locked(place):
        for old in place.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
        others = {name.partition("/")[0] for name in listing(url)} if fresh else set()
        for name in others:  # `--fresh` looks for a name that is free
            (place / name).mkdir()
            (place / name / "config.yaml").touch()
        if not fresh:
            Mirror(f"{url}/{config.name}", place / config.name).pull()
        yield local


def checkpoints_place(url: str, folder: Path, stage: str) -> str | Path:
    """Where the checkpoints of a stage ("" for a run of one) are written: here, or in a bucket that Orbax writes to.

    Args:
      url: the run's, where it has one in a bucket.
      folder: the run's, here.
      stage: its name.
    """
    below = f"{stage}/checkpoints" if stage else "checkpoints"
    return f"{url}/{below}" if url.startswith(DIRECT) else folder / below


def export_url(config: RunConfig, stage: str) -> str:
    """Where a stage's export is, or will be."""
    parts = [config.runs_dir.rstrip("/"), config.name, stage, "export"]
    return "/".join(part for part in parts if part) if is_url(config.runs_dir) else str(Path(*parts))
