"""What the methods' Configs refuse: unknown names, numbers out of range, settings that nothing reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


def check_unread(config: Any, read: Mapping[str, bool], why: Mapping[str, str]) -> None:
    """Raises ValueError for a setting that nothing reads and that is not at its default.

    Args:
      config: a dataclass.
      read: by name of a field, whether anything reads it.
      why: by name of a field, who would.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, used in read.items():
        if not used and getattr(config, name) != defaults[name]:
            raise ValueError(f"{name}={getattr(config, name)!r} is not read here, only {why[name]}: leave it away")


def check_rules(config: Any, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Raises ValueError that names the first field of a dataclass whose rule does not hold."""
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{name}={getattr(config, name)!r} must be {rule}")


def check_known(name: str, values: Iterable[str], registry: Mapping[str, Any]) -> None:
    """Raises ValueError that lists what there is for a key that is not in a registry."""
    for value in values:
        if value not in registry:
            raise ValueError(f"{name} {value!r} is unknown; known: {', '.join(registry)}")


def check_chunk(config: Any) -> None:
    """Raises ValueError where `logits_chunk` is no number of predictions."""
    check_rules(config, {"logits_chunk": (config.logits_chunk is None or config.logits_chunk >= 1, "at least 1")})
