"""A run's folder: whose it is, what it holds, and who is writing to it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from jaxalign.config import RunConfig, Stage, config_text, difference, read_config_text
from jaxalign.exchange import from_first
from jaxalign.files import write_text
from jaxalign.training.checkpoint import remove_unfinished, saved_any

# Name of a stage ("" for a run of one) -> where its checkpoints are, here or in a bucket.
Checkpoints = Callable[[str], str | Path]

LOCK = ".lock"
# What of an attempt says how a stage began: two attempts would be mixed in them.
LEFT = ("metrics.jsonl", "samples.jsonl", "removed.jsonl", "wandb_id")
LAYOUT = ("devices", "layouts")
PACKAGES = (
    "jaxalign",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "datasets",
    "numpy",
)

# What may change while a run goes on: what is kept, shown, and done about rewards that fail, not what is learnt.
OPERATIONAL = (
    "rollout.reward_timeout",
    "rollout.on_reward_error",
    "train.save_steps",
    "train.save_total_limit",
    "log.",
)


def find_folder(config: RunConfig, at: Checkpoints, *, fresh: bool = False) -> tuple[Path, bool, list[str]]:
    """The folder of a run, which may not exist yet; nothing is written but a probe.

    Args:
      config: the run.
      at: where the checkpoints of its stages are.
      fresh: start anew in a folder beside an existing one (`name-2`, `name-3`, ...).

    Returns:
      The folder, whether it holds this run already (then it is resumed), and in what the run there differs: where that
      concerns only stages that have saved nothing, there is nothing to lose (see `correct_folder`).

    Raises:
      ValueError: the folder holds another run (the differences are named), or something else.
      OSError: it cannot be written.
    """
    folder = Path(config.runs_dir) / config.name
    if fresh:
        number = 2
        while _occupied(folder):
            folder, number = Path(config.runs_dir) / f"{config.name}-{number}", number + 1
    kept = folder / "config.yaml"
    if _occupied(folder):
        if not kept.is_file():
            raise ValueError(f"{folder} exists and holds no run (there is no config.yaml in it): choose another `name`")
        # Where a run lies is not what it is: a run may be moved, and `--fresh` gives it another name.
        before, now = (
            {key: value for key, value in _without_operational(each).items() if key not in ("name", "runs_dir")}
            for each in (read_config_text(kept.read_text()) or {}, config.resolved)
        )
        changes = _binding(before, now, _held(folder, before, at))
        if changes:
            shown = "".join(f"\n  {line}" for line in changes[:8]) + (
                f"\n  and {len(changes) - 8} more" if len(changes) > 8 else ""
            )
            raise ValueError(f"{folder} holds another run; give --fresh, or another `name`. It differs in:{shown}")
        check_writable(folder)
        return folder, True, difference(before, now)
    return folder, False, []


def _without_operational(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config without the keys that may change while its run goes on."""

    def kept(section: Any, name: str) -> Any:
        if not isinstance(section, Mapping):
            return section
        return {key: each for key, each in section.items() if f"{name}.{key}" not in OPERATIONAL}

    here = {name: kept(each, name) for name, each in resolved.items() if f"{name}." not in OPERATIONAL}
    stages = here.get("stages")
    return {**here, "stages": [_without_operational(each) for each in stages]} if stages else here


def write_config(config: RunConfig, folder: Path) -> None:
    """Writes a run's config.yaml, its folder too where there is none yet.

    Raises:
      OSError: it cannot be written.
    """
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", config_text(config.resolved))


def correct_folder(config: RunConfig, folder: Path, at: Checkpoints) -> list[str]:
    """Gives a run other settings for stages that have saved nothing, and clears what their attempts left.

    Args:
      config: the run as it is now.
      folder: the run's, locked.
      at: where the checkpoints of its stages are.

    Returns:
      Lines for the user.

    Raises:
      ValueError: something has been saved meanwhile (see `find_folder`).
    """
    _, _, changes = find_folder(config, at)
    before = read_config_text((folder / "config.yaml").read_text()) or {}
    held = _held(folder, before, at)
    for name in _stage_names(before)[len(held) :]:
        for left in LEFT:
            (folder / name / left).unlink(missing_ok=True)
        shutil.rmtree(folder / name / "tensorboard", ignore_errors=True)
        remove_unfinished(at(name))
    manifest = folder / "manifest.json"
    if held and manifest.is_file():
        found = json.loads(manifest.read_text())
        kept = {name: lineage for name, lineage in found["stages"].items() if name in held}
        write_text(manifest, json.dumps({**found, "seeds": _seeds(config), "stages": kept}, indent=2) + "\n")
    else:
        manifest.unlink(missing_ok=True)
    write_text(folder / "config.yaml", config_text(config.resolved))  # last: killed before it, this is done again
    what = (
        f"stages after {held[-1]} have saved nothing: they begin" if held else "nothing was saved here: the run begins"
    )
    return [f"{what} anew, with other settings:", *(f"  {line}" for line in changes)]


def has_saved(folder: Path, stage: str, at: Checkpoints) -> bool:
    """Whether a stage ("" for a run of one) has a complete checkpoint or an export."""
    return (folder / stage / "export" / "config.json").is_file() or saved_any(at(stage))


def _stage_names(resolved: dict[str, Any]) -> list[str]:
    return [stage["name"] for stage in resolved.get("stages", ())] or [""]


def _held(folder: Path, resolved: dict[str, Any], at: Checkpoints) -> list[str]:
    """The names of stages up to the last that has saved something."""
    names = _stage_names(resolved)
    return names[: max((i for i, name in enumerate(names, 1) if has_saved(folder, name, at)), default=0)]


def _binding(before: dict[str, Any], now: dict[str, Any], held: list[str]) -> list[str]:
    """Differences in what the stages held were trained with; in all, where every stage has saved something."""
    if not held:
        return []
    if len(held) < len(_stage_names(before)):
        before, now = ({**each, "stages": each.get("stages", [])[: len(held)]} for each in (before, now))
    return difference(before, now)


def check_writable(folder: Path) -> None:
    """Raises OSError, naming the folder, if nothing can be written there."""
    probe = folder / f".probe-{os.getpid()}"
    with _naming(folder):
        probe.touch()
        probe.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run's folder for this process; the lock goes with the process, however it ends.

    Raises:
      ValueError: another process of this machine is running it.
    """
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is running this run; wait for it, or stop it") from None
        yield


def check_shared(folder: Path) -> None:
    """Checks that all processes see the same folder.

    Raises:
      ValueError: this one sees another, or none: every machine has a runs_dir of its own.
    """
    if jax.process_count() == 1:
        return
    mark = folder / ".seen"

    def leave() -> str:
        write_text(mark, token := uuid.uuid4().hex)
        return token

    token = from_first(leave)
    for wait in (0, 1, 5, 10):  # network file systems may remember for seconds that a file was not there
        time.sleep(wait)
        if mark.is_file() and mark.read_text() == token:
            return
    raise ValueError(
        f"{folder} is not the same folder on process {jax.process_index()} ({platform.node()}) as on process 0: set "
        "runs_dir to a folder that all machines share"
    )


def input_changes(folder: Path, name: str, lineage: dict[str, Any]) -> list[str]:
    """In what a stage's inputs differ from those in manifest.json that it was begun with; nothing before it was."""
    path = folder / "manifest.json"
    begun = json.loads(path.read_text())["stages"].get(name, {}) if path.is_file() else {}
    before = {key: value for key, value in begun.items() if key not in LAYOUT}
    return difference(before, lineage) if begun else []


def other_inputs(folder: Path, name: str, changes: list[str]) -> ValueError:
    """The error for a stage that has saved something, where its inputs are no longer those that it was begun with."""
    listed = "".join(f"\n  {line}" for line in changes)
    return ValueError(f"{folder}: stage {name} was begun with other inputs; bring them back or give --fresh:{listed}")


def record_stage(folder: Path, config: RunConfig, name: str, lineage: dict[str, Any], *, saved: bool) -> list[str]:
    """Keeps in manifest.json versions, seeds and hardware of the first start, and where a stage's inputs came from.

    Devices and processes may change from start to start: batches stay the same, and sums are added up in another order.
    All that there were are kept.

    Args:
      folder: the run's.
      config: the run.
      name: the stage's, or the run's for a run of one.
      lineage: where its inputs came from, as plain data.
      saved: it has saved something, see `has_saved`.

    Returns:
      Lines for the user.

    Raises:
      ValueError: the stage was begun with other inputs and has saved something: going on would not be the same run.
    """
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.is_file() else _first(config)
    begun = manifest["stages"].get(name, {})
    changes = input_changes(folder, name, lineage)
    if changes and saved:
        raise other_inputs(folder, name, changes)
    if changes:
        begun = {}
    # Manifests of version 0.1 say how many devices there were, and no more.
    kept = begun.get("layouts", [{"devices": begun["devices"], "processes": 1}] if "devices" in begun else [])
    now = {"devices": jax.device_count(), "processes": jax.process_count()}
    lines = [f"{name}: nothing was saved yet: it begins anew, with other inputs:"] if changes else []
    lines += [f"  {line}" for line in changes]
    if kept and kept[-1] != now:
        lines.append(f"{name}: begun on {_layout(kept[-1])}, goes on on {_layout(now)}: equal up to rounding")
    manifest["stages"][name] = {**lineage, "layouts": kept if kept and kept[-1] == now else [*kept, now]}
    write_text(path, json.dumps(manifest, indent=2) + "\n")
    return lines


def _layout(numbers: dict[str, int]) -> str:
    return f"{numbers['devices']} device(s) in {numbers['processes']} process(es)"


def _first(config: RunConfig) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in PACKAGES}},
        "seeds": _seeds(config),
        "hardware": {
            "platform": device.platform,
            "device": device.device_kind,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
        },
        "stages": {},
    }


def _seeds(config: RunConfig) -> dict[str, dict[str, int]]:
    return {stage.name or config.name: {"train": stage.train.seed, "data": stage.data.seed} for stage in config.stages}


def _occupied(folder: Path) -> bool:
    """Whether something is there, beyond what a run leaves that ended before its config.yaml was written."""
    with _naming(folder):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return folder.is_file() or any(name != LOCK and not name.endswith(".partial") for name in names)


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write the run's folder: {error.strerror}; choose another runs_dir", str(folder)
        ) from error


def run_folder(stage: Stage, folder: Path) -> Path:
    """The folder of the run that a stage's folder belongs to."""
    return folder.parent if stage.name else folder
