"""Checkpoints: asynchronous Orbax saves, a SHA-256 of every file, fallback to the step before.

A checkpoint exists once its `SHA256SUMS` does, and that is written after Orbax has committed the step's folder and all
processes have read their shares of it. Old checkpoints are deleted only after that, so there is something sound to
resume from at every moment. No process goes on from `wait` before that, lest it leave while others work. One killed

- inside a save leaves a temporary folder, which is reported, and cleared away by Orbax at the next save;
- between commit and checksums leaves a step without `SHA256SUMS`: not saved, the step before is used;
- while an old checkpoint is deleted leaves a step whose `SHA256SUMS` went first: not saved either.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxalign.exchange import Messages, is_first
from jaxalign.training import storable
from jaxalign.training.sums import PATIENCE, SUMS, UNFINISHED, patience, sum_up, verify, write_sums
from jaxalign.types import PyTree

logger = logging.getLogger("jaxalign")

NONE, DAMAGED = -1, -2


@dataclass(frozen=True)
class Rejected:
    """A step that cannot be restored, and why."""

    step: int
    reason: str


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      step: the checkpoint's number.
      state: a tree of the structure and shardings asked for.
      source: what was saved of the source; None where it was not asked for.
      meta: the JSON object saved with it.
      rejected: newer steps that could not be used.
    """

    step: int
    state: Any
    source: Any
    meta: dict
    rejected: tuple[Rejected, ...]


class Checkpoints:
    """A folder of checkpoints, one numbered folder per step, written by one run at a time; a context manager.

    Nothing is touched on disk before the first save.

    Args:
      folder: local path or bucket; made when needed.
      save_total_limit: keep the last so many (and those named in `save`); None keeps all.
      before: called on process 0, in the background, when a save is written, before it counts.
      after: called with the steps saved when it counts and old ones are deleted. A save fails where either fails.

    Attributes:
      latest: the step saved or restored last, None before.

    Raises:
      ValueError: a limit under 1.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        save_total_limit: int | None = None,
        before: Callable[[], None] = lambda: None,
        after: Callable[[list[int]], None] = lambda steps: None,
    ):
        if save_total_limit is not None and save_total_limit < 1:
            raise ValueError(f"save_total_limit must be at least 1, got {save_total_limit}")
        self.folder = epath.Path(os.path.abspath(folder)) if "://" not in os.fspath(folder) else epath.Path(folder)
        self._limit, self._before, self._after = save_total_limit, before, after
        self._manager: ocp.CheckpointManager | None = None
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None
        self.latest: int | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Numbers of the steps saved, ascending; their files are not verified."""
        return [step for step in _folders(self.folder) if (self.folder / str(step) / SUMS).exists()]

    def save(self, step: int, state: PyTree, source: Any, meta: dict, *, keep: Iterable[int] = ()) -> None:
        """Saves in the background; blocks for an earlier save and for the copy from the devices.

        Args:
          step: the checkpoint's number. A damaged folder of that number is moved aside (`<step>.damaged`).
          state: tree of arrays; the caller may donate it once this returns.
          source: the source's state, see `storable.pack`; equal on every process.
          meta: a JSON object.
          keep: steps that `save_total_limit` does not delete.

        Raises:
          OSError: this save, or the one before in the background, could not be written; names the folder.
          ValueError: the step is saved already, or the source's state holds what cannot be saved.
        """
        self.wait()
        skeleton, arrays = storable.pack(source)
        args = {"state": ocp.args.StandardSave(storable.to_names(state)), "source": ocp.args.StandardSave(arrays)}
        if not arrays:
            del args["source"]
        items = ocp.args.Composite(**args, meta=ocp.args.JsonSave({"meta": meta, "source": skeleton}))
        with self._reporting(step):
            self._make_room(step)
            seconds = patience(sum(leaf.nbytes for leaf in jax.tree.leaves((state, arrays))))
            manager = self._open(step, seconds)
            manager.save(step, args=items, force=True)
        self.latest = step
        background = (manager, step, frozenset(keep), seconds)
        self._thread = threading.Thread(target=self._finish, args=background, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Blocks until the save in the background is complete, checksums included, on all processes.

        Raises:
          OSError: it could not be written; names the folder. What was saved before is untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            (step, error), self._failure = self._failure, None
            # Orbax would raise the same error again from the manager that failed.
            self._manager = None
            self._discard(step)
            raise self._named(step, error) from error

    def close(self) -> None:
        """Waits for the save in the background and frees Orbax's threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def restore(self, like: PyTree, step: int | None = None, *, source: bool = True) -> Restored | None:
        """Restores the newest sound checkpoint, verified file by file.

        Args:
          like: arrays or `jax.ShapeDtypeStruct`s with shardings: what to restore, and where to. Part of what was saved
            is allowed: `{"params": ...}`.
          step: this one, and no other.
          source: False leaves the source's state alone (it may need the mesh that it was saved on).

        Returns:
          The checkpoint, its rejected newer ones listed and logged; None where nothing was ever saved.

        Raises:
          ValueError: there are checkpoints but none is sound; or `like` does not fit what was saved.
        """
        self.wait()
        chosen, rejected = self._choose(step)
        for bad in rejected if is_first() else ():
            logger.warning("checkpoint %s is not used: %s", self.folder / str(bad.step), bad.reason)
        if chosen == DAMAGED:
            reasons = "; ".join(f"{bad.step}: {bad.reason}" for bad in rejected)
            which = f"all {len(_folders(self.folder))} checkpoints are" if step is None else f"checkpoint {step} is"
            raise ValueError(f"{which} damaged in {self.folder}: {reasons}; move the folder away to start anew")
        if chosen == NONE:
            return None
        self.latest = chosen
        return self._read(chosen, like, source, rejected)

    def _choose(self, step: int | None) -> tuple[int, tuple[Rejected, ...]]:
        """The newest sound step (or `step`), NONE or DAMAGED, the same on all processes; and why newer ones are not."""
        rejected: list[Rejected] = []
        talk = Messages(f"steps of {self.folder}")
        look = lambda: [_folders(self.folder), _begun(self.folder)]  # noqa: E731
        saved, begun = talk.from_first(look, PATIENCE) if step is None else ([step], [])
        for each in sorted({*saved, *begun}, reverse=True):
            reason = verify(self.folder / str(each)) if each in saved else UNFINISHED
            if reason is None:
                return each, tuple(rejected)
            rejected.append(Rejected(each, reason))
        # One save is under way at most: a lone unfinished one is the first of a run that was killed: nothing was saved.
        nothing = all(bad.reason == UNFINISHED for bad in rejected) and len(saved) <= 1
        return NONE if nothing and step is None else DAMAGED, tuple(rejected)

    def _read(self, step: int, like: PyTree, source: bool, rejected: tuple[Rejected, ...]) -> Restored:
        path = self.folder / str(step)
        meta = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path / "meta", args=ocp.args.JsonRestore())
        state = _read_state(path / "state", like)
        arrays = {}
        if source and (path / "source").exists():
            # Arrays of devices come back with the sharding that they were saved with, others as numpy's.
            arrays = ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(
                path / "source", args=ocp.args.StandardRestore(fallback_sharding=storable.everywhere())
            )
        return Restored(
            step, state, storable.unpack(meta["source"], arrays) if source else None, meta["meta"], rejected
        )

    def _open(self, step: int, seconds: float) -> ocp.CheckpointManager:
        if self._manager is None:
            # Orbax keeps all: it would delete old steps before their successor has checksums. `_prune` does it after.
            waiting = ocp.AsyncOptions(timeout_secs=math.ceil(seconds))
            options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True, async_options=waiting)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        elif step in self._manager.all_steps():
            self._manager.reload()
        return self._manager

    def _make_room(self, step: int) -> None:
        """Moves a damaged folder of this number aside and removes an unfinished one."""
        path = self.folder / str(step)
        talk = Messages(f"room for {path}")
        if not talk.from_first(path.exists, PATIENCE):
            return
        reason = verify(path)
        if reason is None:
            raise ValueError(f"step {step} is saved already in {self.folder}")

        def move() -> None:
            _remove(path) if reason == UNFINISHED else path.rename(_free_name(path))

        talk.from_first(move, PATIENCE)

    def _finish(self, manager: ocp.CheckpointManager, step: int, keep: frozenset[int], seconds: float) -> None:
        """Runs in the background: after the commit checksums, then deletes what is too old."""
        try:
            manager.wait_until_finished()
            sum_up(self.folder / str(step), lambda sums: self._complete(step, keep, sums), seconds)
        except BaseException as error:  # kept for the main thread, which raises it
            self._failure = (step, error)

    def _complete(self, step: int, keep: frozenset[int], sums: dict[str, str]) -> None:
        """On process 0: makes the step count."""
        self._before()
        write_sums(self.folder / str(step), sums)
        self._prune(step, keep)
        self._after(self.steps())

    def _prune(self, newest: int, keep: frozenset[int]) -> None:
        """Deletes all but the last `save_total_limit` up to `newest`; later ones are left-overs yet to be replaced."""
        saved = [step for step in self.steps() if step <= newest]
        old = saved[: -self._limit] if self._limit else []
        unfinished = [step for step in _folders(self.folder) if step < newest and step not in saved]
        for step in [*unfinished, *(step for step in old if step not in keep)]:
            _remove(self.folder / str(step))

    def _discard(self, step: int) -> None:
        """Frees the disk of what a failed save has left."""
        if is_first() and self.folder.exists():
            for path in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                path.rmtree(missing_ok=True)

    def _named(self, step: int, error: BaseException) -> OSError:
        number = error.errno if isinstance(error, OSError) else None
        text = f"cannot save checkpoint {step} in {self.folder}: {error}. Checkpoints saved before are untouched"
        return OSError(number, text) if number is not None else OSError(text)

    @contextlib.contextmanager
    def _reporting(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._named(step, error) from error


def saved_any(folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint was ever completed in a folder (local path or bucket), sound or damaged by now."""
    place = epath.Path(folder)
    return place.exists() and any((path / SUMS).exists() for path in place.iterdir())


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Deletes what saves have left in a folder that did not finish."""
    place = epath.Path(folder)
    for path in place.iterdir() if place.exists() else ():
        if path.is_dir() and not (path / SUMS).exists():
            path.rmtree()


def _folders(folder: epath.Path) -> list[int]:
    """Numbers of the step folders, ascending; Orbax commits by renaming to the bare number."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def _begun(folder: epath.Path) -> list[int]:
    """Numbers of the steps that Orbax had begun to write and not committed."""
    names = [path.name for path in folder.glob("*.orbax-checkpoint-tmp*")] if folder.exists() else []
    return sorted({int(name.partition(".")[0]) for name in names if name.partition(".")[0].isdecimal()})


def _remove(path: epath.Path) -> None:
    (path / SUMS).unlink(missing_ok=True)
    path.rmtree()


def _free_name(path: epath.Path) -> epath.Path:
    names = (path.parent / f"{path.name}.damaged{suffix}" for suffix in ("", *(f".{i}" for i in range(1, 1000))))
    return next(name for name in names if not name.exists())


def _read_state(path: epath.Path, like: PyTree) -> PyTree:
    handler = ocp.PyTreeCheckpointHandler()
    named = storable.to_names(like, abstract=True)
    storable.check_fits(named, handler.metadata(path).tree, path)
    restore_args = ocp.checkpoint_utils.construct_restore_args(named)
    args = ocp.args.PyTreeRestore(item=named, restore_args=restore_args, partial_restore=True)
    return storable.from_names(ocp.Checkpointer(handler).restore(path, args=args), like)
