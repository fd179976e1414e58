"""RunConfig: YAML and dotted overrides in, validated frozen dataclasses out."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pydantic
import yaml

from jaxalign.data import DataConfig, Filters, MixturePart
from jaxalign.foreign_names import FOREIGN_NAMES
from jaxalign.methods import METHODS, PRESETS
from jaxalign.methods.common import is_online, trains_scores
from jaxalign.sections import (
    CompareSection,
    ExportSection,
    LogSection,
    LoraSection,
    ModelSection,
    RewardSection,
    RolloutSection,
    RunConfig,
    Stage,
    TrainSection,
)
from jaxalign.sharding import MeshConfig
from jaxalign.training import optimizer

# What a later stage may name of an earlier one: `<stage>.policy`, of a reward stage `<stage>.reward`, which are the
# export; of a stage with a critic `<stage>.critic`, which is beside it.
OUTPUTS = ("policy", "reward", "critic")
NO_DATA = "(none)"  # in the place of `data.path`, where a plan does without
SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "lora": LoraSection,
    "data": DataConfig,
    "ptx_data": DataConfig,
    "rollout": RolloutSection,
    "optimizer": optimizer.Config,
    "mesh": MeshConfig,
    "train": TrainSection,
    "log": LogSection,
    "export": ExportSection,
}
TOP = ("name", "runs_dir", "stages", "compare", "method", *SECTIONS)


def load_config(path: str | Path, overrides: Sequence[str] = (), *, data_needed: bool = True) -> RunConfig:
    """Reads a YAML file and applies `a.b=value` overrides (`stages.<name>.a.b=value` for one stage).

    Args:
      path: the file.
      overrides: settings in the place of the file's.
      data_needed: refuse a config without `data.path`; else `NO_DATA` stands there, for a plan.

    Raises:
      FileNotFoundError: no such file.
      ValueError: YAML that does not parse, an unknown key (the nearest known one is named), a wrong value; each names
        file and key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config (`jaxalign configs list` names those that come with jaxalign)")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a config is a mapping of sections, not {type(raw).__name__}")
    for override in overrides:
        raw = _override(raw, override)
    if not data_needed and "stages" not in raw and not (raw.get("data") or {}).get("mixture"):
        raw = {**raw, "data": {"path": NO_DATA, **(raw.get("data") or {})}}
    try:
        return parse_config(raw, default_name=path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_config(raw: Mapping[str, Any], default_name: str = "run") -> RunConfig:
    """Validates plain data as a run; errors as `load_config`, without the file."""
    _known("", raw, TOP)
    name, runs_dir = str(raw.get("name", default_name)), str(raw.get("runs_dir", "runs"))
    shared = {key: value for key, value in raw.items() if key in SECTIONS or key == "method"}
    for section, settings in shared.items():
        if section in SECTIONS and isinstance(settings, Mapping):
            _known(section, settings, [each.name for each in dataclasses.fields(SECTIONS[section])])
    listed = raw.get("stages")
    if listed is None:
        stages = (_stage("", shared, ""),)
    else:
        if not isinstance(listed, list) or not listed:
            raise ValueError("stages: a list of at least one stage")
        names = [each.get("name") if isinstance(each, dict) else None for each in listed]
        for i, each in enumerate(names):
            if not isinstance(each, str) or not each or names.index(each) != i:
                raise ValueError(f"stages[{i}].name: every stage needs a name of its own")
        stages = tuple(
            _stage(
                each["name"], _merge(shared, {k: v for k, v in each.items() if k != "name"}), f"stages.{each['name']}."
            )
            for each in listed
        )
        _check_inputs(stages)
    compare = None if raw.get("compare") is None else build(CompareSection, raw["compare"], "compare")
    resolved = {"name": name, "runs_dir": runs_dir}
    resolved |= {"stages": [_plain_stage(stage) for stage in stages]} if listed else _plain_stage(stages[0])
    if compare is not None:
        resolved["compare"] = _plain(dataclasses.asdict(compare))
    return RunConfig(name, runs_dir, stages, compare, resolved)


def build(kind: type, raw: Any, where: str) -> Any:
    """Validates a mapping as a frozen dataclass.

    Raises:
      ValueError: unknown key (with the nearest known one), or a wrong value; names `where.key`.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}: a mapping of keys, not {raw!r}")
    _known(where, raw, [each.name for each in dataclasses.fields(kind)])
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(raw))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join([where, *(str(part) for part in first["loc"][:1])])
        given = (
            "" if first["type"] in ("missing", "missing_argument") or not first["loc"] else f" (got {first['input']!r})"
        )
        raise ValueError(f"{key}: {first['msg'].removeprefix('Value error, ')}{given}") from None


def config_text(resolved: Mapping[str, Any]) -> str:
    """The text of config.yaml."""
    return yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True)


def read_config_text(text: str) -> dict[str, Any]:
    """The inverse of `config_text`."""
    return yaml.safe_load(text)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys in which two resolved configs differ, as lines."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key, 'absent')!r} there, {after.get(key, 'absent')!r} here" for key in keys]


def shipped_configs() -> dict[str, Path]:
    """Configs that come with jaxalign, by name (`sft/...`): from the clone, or from the installed package."""
    packaged = Path(str(importlib.resources.files("jaxalign"))) / "_configs"
    folder = packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def _stage(name: str, raw: Mapping[str, Any], where: str) -> Stage:
    _known(where.rstrip("."), raw, ["method", *SECTIONS])
    for section in ("method", "optimizer"):
        if not isinstance(raw.get(section) or {}, Mapping):
            raise ValueError(f"{where}{section}: a mapping of keys, for example {{name: ...}}, not {raw[section]!r}")
    method = dict(raw.get("method") or {})
    method_name = method.pop("name", None)
    if method_name in PRESETS:
        method_name, settings = PRESETS[method_name]
        method = {**settings, **method}
    if method_name not in METHODS:
        known = ", ".join(dict.fromkeys([*METHODS, *PRESETS]))
        raise ValueError(f"{where}method.name: {method_name!r} is not a method; known: {known}")
    for needed in ("model", "data"):
        if needed not in raw:
            raise ValueError(f"{where}{needed}: this section is missing; it needs at least `path`")
    settings = {"learning_rate": METHODS[method_name].LEARNING_RATE, **(raw.get("optimizer") or {})}
    raw = {**raw, "rollout": _rollout(METHODS[method_name], raw.get("rollout"), f"{where}rollout")}
    raw |= {key: _data(raw[key], where + key) for key in ("data", "ptx_data") if raw.get(key) is not None}
    apart = {"optimizer"} if raw.get("ptx_data") is not None else {"optimizer", "ptx_data"}
    built = {key: build(kind, raw.get(key) or {}, where + key) for key, kind in SECTIONS.items() if key not in apart}
    built["lora"] = None if raw.get("lora") is None else built["lora"]
    if built["lora"] and built["model"].trainable:
        raise ValueError(f"{where}model.trainable: with the section lora the adapter trains; leave one of them away")
    return Stage(
        name=name,
        method_name=method_name,
        method=build(METHODS[method_name].Config, method, f"{where}method"),
        optimizer=build(optimizer.Config, settings, f"{where}optimizer"),
        **built,
    )


def _rollout(method: ModuleType, raw: Any, where: str) -> Any:
    """The section with its rewards validated; only online methods have one."""
    if raw and not is_online(method):
        raise ValueError(f"{where}: this method learns from a data set and draws nothing; leave the section away")
    if isinstance(raw, Mapping) and raw.get("mesh") is not None:
        raw = {**raw, "mesh": build(MeshConfig, raw["mesh"], f"{where}.mesh")}
    if not isinstance(raw, Mapping) or not isinstance(raw.get("rewards"), Sequence):
        return raw
    each = [build(RewardSection, reward, f"{where}.rewards[{i}]") for i, reward in enumerate(raw["rewards"])]
    return {**raw, "rewards": tuple(each)}


def _data(raw: Any, where: str) -> Any:
    """The section with the parts of its mixture and its filters validated."""
    if not isinstance(raw, Mapping):
        return raw
    built = dict(raw)
    if isinstance(raw.get("mixture"), Sequence) and not isinstance(raw["mixture"], str):
        built["mixture"] = tuple(
            build(MixturePart, part, f"{where}.mixture[{i}]") for i, part in enumerate(raw["mixture"])
        )
    if raw.get("filters") is not None:
        built["filters"] = build(Filters, raw["filters"], f"{where}.filters")
    return built


def _check_inputs(stages: Sequence[Stage]) -> None:
    earlier: dict[str, Stage] = {}
    for stage in stages:
        named = {f"model.{key}": getattr(stage.model, key) for key in ("path", "reference", "critic")}
        named |= {f"rollout.rewards[{i}].model": each.model for i, each in enumerate(stage.rollout.rewards)}
        for key, value in named.items():
            source, dot, role = (value or "").rpartition(".")
            if not dot or role not in OUTPUTS:
                continue
            where = f"stages.{stage.name}.{key}: {value!r}"
            if source not in earlier:
                raise ValueError(f"{where} names no earlier stage (there are: {list(earlier)})")
            if role == "reward" and not trains_scores(METHODS[earlier[source].method_name]):
                raise ValueError(f"{where}: that stage trains a policy, {source}.policy")
            if role == "critic" and not earlier[source].export.critic:
                raise ValueError(f"{where} is not written: set stages.{source}.export.critic to true")
            if role == "critic" and key != "model.critic":
                raise ValueError(f"{where} is a critic, which is for model.critic alone")
        earlier[stage.name] = stage


def _known(where: str, raw: Mapping[str, Any], names: Sequence[str]) -> None:
    for key in raw:
        if key in names:
            continue
        full = f"{where}.{key}" if where else str(key)
        if key in FOREIGN_NAMES:
            raise ValueError(f"{full}: unknown key; here it is {FOREIGN_NAMES[key]}")
        near = difflib.get_close_matches(str(key), names, 1, 0.6)
        hint = _elsewhere(str(key)) or (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}")
        raise ValueError(f"{full}: unknown key; {hint}")


def _elsewhere(key: str) -> str | None:
    for section, kind in SECTIONS.items():
        if key in [each.name for each in dataclasses.fields(kind)]:
            return f"it belongs to {section}: {section}.{key}"
    for name, method in METHODS.items():
        if key in [each.name for each in dataclasses.fields(method.Config)]:
            return f"it belongs to the method {name}: method.{key}"
    return None


def _override(raw: dict[str, Any], text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text!r}: an override is written a.b=value")
    parts = key.strip().split(".")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r}: the value is not YAML: {error}") from error
    if parts[0] == "stages" and len(parts) > 2:
        stages = list(raw.get("stages") or [])
        place = next((i for i, each in enumerate(stages) if each.get("name") == parts[1]), None)
        if place is None:
            raise ValueError(f"{text!r}: there is no stage {parts[1]!r}")
        stages[place] = _set(stages[place], parts[2:], parsed)
        return {**raw, "stages": stages}
    return _set(raw, parts, parsed)


def _set(raw: Any, parts: Sequence[str], value: Any) -> dict[str, Any]:
    mapping = dict(raw) if isinstance(raw, Mapping) else {}
    return {**mapping, parts[0]: _set(mapping.get(parts[0]), parts[1:], value) if len(parts) > 1 else value}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _plain_stage(stage: Stage) -> dict[str, Any]:
    there = {"rollout": is_online(METHODS[stage.method_name]), "lora": stage.lora is not None}
    there["ptx_data"] = stage.ptx_data is not None
    names = [key for key in SECTIONS if there.get(key, True)]
    sections = {key: _plain(dataclasses.asdict(getattr(stage, key))) for key in names}
    method = {"name": stage.method_name, **_plain(dataclasses.asdict(stage.method))}
    return {**({"name": stage.name} if stage.name else {}), "method": method, **sections}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flatten(each, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and all(isinstance(each, Mapping) and "name" in each for each in value):
        names = [each["name"] for each in value]
        for i, each in enumerate(value):
            # Two rewards may be the same function with other options, or models, which have no name.
            alone = names[i] and names.count(names[i]) == 1
            yield from _flatten(each, f"{prefix}.{names[i]}" if alone else f"{prefix}[{i}]")
    else:
        yield prefix, value
