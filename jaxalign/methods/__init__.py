"""One file, one method."""

from collections.abc import Mapping
from typing import Any

from jaxalign.methods import grpo, online_preference, ppo, preference, reference_free, reward, sft

METHODS = {
    "sft": sft,
    "preference": preference,
    "reference_free": reference_free,
    "reward": reward,
    "grpo": grpo,
    "ppo": ppo,
    "online_preference": online_preference,
}

# Names that stand for a method with some of its settings.
PRESETS: dict[str, tuple[str, Mapping[str, Any]]] = {
    name: (method, settings)
    for method, presets in {
        "preference": preference.PRESETS,
        "reference_free": reference_free.PRESETS,
        "grpo": grpo.PRESETS,
    }.items()
    for name, settings in presets.items()
}

__all__ = ["METHODS", "PRESETS", "grpo", "online_preference", "ppo", "preference", "reference_free", "reward", "sft"]
