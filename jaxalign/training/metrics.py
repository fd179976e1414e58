"""Metrics on the host: exact sums over steps, JSON lines, TensorBoard and W&B."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxalign.extras import install
from jaxalign.files import writing
from jaxalign.types import Max, Mean, Metric, Min, Sum

Number = float | int | np.number | np.ndarray | jax.Array
KINDS: dict[str, type] = {"mean": Mean, "min": Min, "max": Max, "sum": Sum}


@dataclass(frozen=True)
class Interval:
    """Metrics merged over the steps since the last log, in float64 on the host.

    Attributes:
      parts: by name, a `Mean`, `Min`, `Max` or `Sum` over all steps, or the latest value of a plain number.
    """

    parts: Mapping[str, Metric | float] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Metric | Number | None]) -> Interval:
        """These metrics and one more step's; device scalars are fetched, None is left out."""
        fetched = {name: _host(value) for name, value in metrics.items() if value is not None}
        merged = {name: _merge(self.parts[name], new) if name in self.parts else new for name, new in fetched.items()}
        return Interval({**self.parts, **merged})

    def values(self) -> dict[str, float]:
        """One number per name, by name in order; a metric over nothing is absent."""
        values = {name: _value(part) for name, part in sorted(self.parts.items())}
        return {name: value for name, value in values.items() if value is not None}

    def to_json(self) -> dict[str, list[str]]:
        """The exact state: `[kind, numbers in hexadecimal]` by name, legal JSON for infinities and NaN too."""
        return {name: _encode(part) for name, part in self.parts.items()}

    @classmethod
    def from_json(cls, state: Mapping[str, Sequence[str]]) -> Interval:
        """The inverse of `to_json`, bit for bit."""
        return cls({name: _decode(part) for name, part in state.items()})


def _host(value: Metric | Number) -> Metric | float:
    if isinstance(value, Mean | Min | Max | Sum):
        return jax.tree.map(float, value)
    return float(value)


def _merge(old: Metric | float, new: Metric | float) -> Metric | float:
    if isinstance(old, Mean) and isinstance(new, Mean):
        return old.merge(new)
    if isinstance(old, Sum) and isinstance(new, Sum):
        return old.merge(new)
    if isinstance(old, Min) and isinstance(new, Min):
        return Min(float(np.minimum(old.least, new.least)))
    if isinstance(old, Max) and isinstance(new, Max):
        return Max(float(np.maximum(old.most, new.most)))
    return new


def _value(part: Metric | float) -> float | None:
    if isinstance(part, Mean | Sum):
        return part.value()
    if isinstance(part, Min):
        return None if part.least == math.inf else float(part.least)
    if isinstance(part, Max):
        return None if part.most == -math.inf else float(part.most)
    return part


def _encode(part: Metric | float) -> list[str]:
    kind = next((kind for kind, cls in KINDS.items() if isinstance(part, cls)), "latest")
    return [kind, *(float(x).hex() for x in jax.tree.leaves(part))]


def _decode(part: Sequence[str]) -> Metric | float:
    kind, *numbers = part
    floats = [float.fromhex(x) for x in numbers]
    if kind == "sum":
        return Sum(tuple(Mean(*pair) for pair in zip(floats[0::2], floats[1::2], strict=True)))
    return floats[0] if kind == "latest" else KINDS[kind](*floats)


class Writer(Protocol):
    """Where logged steps go."""

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds one record; None values are absent."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Writes out what is left; `failed` where an error ended the run."""
        ...


class JsonLines:
    """One JSON object per line, `step` first, flushed line by line: a kill tears at most the last line.

    Every line is legal JSON: NaN and infinities become null (the metric was computed and is no finite number), while
    a value of None is absent (there was nothing to compute).

    Args:
      path: the file; its folder is made.
      resume_step: lines of later steps are dropped (see `keep_until`); None empties the file.

    Raises:
      OSError: naming the file, when it cannot be written.
      ValueError: a line that is kept is no JSON object with a step.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None and self.path.exists():
            keep_until(self.path, resume_step)
        self._file = self.path.open("w" if resume_step is None else "a", encoding="utf-8")

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Appends one line; the record may hold lists, dicts and strings too."""
        present = {name: _legal(value) for name, value in record.items() if value is not None}
        line = json.dumps({"step": step, **present}, ensure_ascii=False, allow_nan=False)
        with writing(self.path):
            self._file.write(line + "\n")
            self._file.flush()

    def close(self, *, failed: bool = False) -> None:
        """Closes the file; what a failed write has left over is tried once more."""
        del failed
        with writing(self.path):
            self._file.close()


def keep_until(path: Path, last_step: int) -> None:
    """Cuts a file of JSON lines after the last record of `last_step`, in place.

    A torn last line goes too, and so does the summary of a finished run (a record with `train_runtime`), which is
    written again.

    Raises:
      ValueError: a complete line that is no JSON object with a step, named by file and number.
    """
    kept = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            record = _parse(line, path, number)
            if record["step"] > last_step or "train_runtime" in record:
                break
            kept += len(line)
    os.truncate(path, kept)


def _parse(line: bytes, path: Path, number: int) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is no JSON: {error}; repair or remove the line to resume") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"{path}, line {number} has no step; repair or remove the line to resume")
    return record


def _legal(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _legal(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_legal(part) for part in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _legal(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """Scalars for TensorBoard under the names that transformers' Trainer gives them (`train/loss`, `eval/loss`).

    Args:
      folder: where the event files go.
      resume_step: TensorBoard hides what an earlier process wrote for later steps; None hides all that it wrote.
    """

    def __init__(self, folder: str | os.PathLike[str], resume_step: int | None = None):
        from tensorboardX import SummaryWriter

        purge = 0 if resume_step is None else resume_step + 1
        # File names hold the second only: without a suffix a process started within it would overwrite the last one's.
        suffix = f".{os.getpid()}.{purge}"
        self._writer = SummaryWriter(logdir=str(folder), purge_step=purge, filename_suffix=suffix)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds the record's numbers."""
        for name, value in dashboard_names(record).items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def close(self, *, failed: bool = False) -> None:
        """Closes the event file."""
        del failed
        self._writer.close()


class WandB:
    """Scalars for Weights & Biases under the names that transformers' Trainer gives them.

    A resumed run continues under the id kept in `<folder>/wandb_id`. W&B ignores steps that it has already; since a
    resumed run repeats them exactly, nothing is lost. The project is `WANDB_PROJECT`, or `jaxalign`; the login, the
    entity and whether anything is sent (`WANDB_MODE`) are W&B's own settings.

    Args:
      folder: the run's folder.
      name: shown name of the run.
      config: the run's resolved configuration.

    Raises:
      ValueError: W&B cannot start: nobody is logged in, no such project, no connection.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str | None = None, config: Mapping | None = None):
        wandb = importlib.import_module("wandb")
        identity = Path(folder) / "wandb_id"
        identity.parent.mkdir(parents=True, exist_ok=True)
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:8])
        project = os.environ.get("WANDB_PROJECT") or "jaxalign"
        settings = {"project": project, "name": name, "config": dict(config or {}), "dir": str(folder)}
        try:
            self._run = wandb.init(id=identity.read_text(), resume="allow", **settings)
        except wandb.Error as error:
            raise _refused(error) from error

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds the record's numbers."""
        self._run.log({**dashboard_names(record), "train/global_step": step}, step=step)

    def close(self, *, failed: bool = False) -> None:
        """Ends the W&B run, which W&B then shows as finished or as failed."""
        self._run.finish(exit_code=int(failed))


def _refused(error: Exception) -> ValueError:
    return ValueError(
        f"log.report_to names wandb, which does not start: {error} (log in with `wandb login` or WANDB_API_KEY, set "
        "WANDB_MODE=offline to send nothing, or leave wandb away)"
    )


def dashboard_names(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers named as transformers' `rewrite_logs` does: `eval_x` -> `eval/x`, else `train/x`."""
    numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float | np.number)}
    return {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in numbers.items()}


def check_login(report_to: Collection[str]) -> None:
    """Raises ValueError where a tracker that needs an account has none; W&B asks for it on a terminal."""
    check_writers(report_to)
    if "wandb" not in report_to or os.environ.get("WANDB_MODE", "online") != "online":
        return
    wandb = importlib.import_module("wandb")
    try:
        wandb.login()
    except wandb.Error as error:
        raise _refused(error) from error


def check_writers(report_to: Collection[str]) -> None:
    """Raises ValueError for an unknown tracker, or one that is not installed."""
    unknown = set(report_to) - {"tensorboard", "wandb"}
    if unknown:
        raise ValueError(f"log.report_to: {', '.join(sorted(unknown))} is unknown; choose from tensorboard, wandb")
    if "wandb" in report_to and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"log.report_to names wandb, which is not installed: {install('wandb')}")


def open_writers(
    folder: str | os.PathLike[str],
    report_to: Sequence[str] = (),
    *,
    resume_step: int | None = None,
    name: str | None = None,
    config: Mapping | None = None,
) -> list[Writer]:
    """Opens `metrics.jsonl` and the trackers asked for; on all processes but the first there are none.

    Args:
      folder: the run's folder.
      report_to: any of "tensorboard", "wandb".
      resume_step: the restored checkpoint's step: later records are dropped; None starts anew.
      name: the run's shown name, for W&B.
      config: the run's resolved configuration, for W&B.

    Raises:
      ValueError: an unknown tracker, or one that is not installed or does not start.
    """
    check_writers(report_to)
    if jax.process_index() != 0:
        return []
    # First what may be refused, while no file has been opened or cut.
    writers: list[Writer] = [WandB(folder, name, config)] if "wandb" in report_to else []
    if "tensorboard" in report_to:
        writers.append(TensorBoard(Path(folder) / "tensorboard", resume_step))
    return [JsonLines(Path(folder) / "metrics.jsonl", resume_step), *writers]
