"""The command that installs one of this package's extras."""

from __future__ import annotations


def install(extra: str, *, upgrade: bool = False) -> str:
    """What a user types for an extra of pyproject.toml; from a clone, since no package index has jaxalign."""
    return f"pip install {'-U ' if upgrade else ''}-e '.[{extra}]' in jaxalign's repository"
