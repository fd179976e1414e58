"""One file, one method."""

from collections.abc import Mapping
from typing import Any

from jaxalign.methods import (
    grpo,
    online_preference,
    ppo,
    preference,
    process_reward,
    reference_free,
    reward,
    sft,
    unpaired_preference,
)

METHODS = {
    "sft": sft,
    "preference": preference,
    "reference_free": reference_free,
    "reward": reward,
    "process_reward": process_reward,
    "grpo": grpo,
    "ppo": ppo,
    "online_preference": online_preference,
    "unpaired_preference": unpaired_preference,
}

# Names that stand for a method with some of its settings.
PRESETS: dict[str, tuple[str, Mapping[str, Any]]] = {
    preset: (name, settings)
    for name, method in METHODS.items()
    for preset, settings in getattr(method, "PRESETS", {}).items()
}

__all__ = [
    "METHODS",
    "PRESETS",
    "grpo",
    "online_preference",
    "ppo",
    "preference",
    "process_reward",
    "reference_free",
    "reward",
    "sft",
    "unpaired_preference",
]
