"""One file, one method."""

from jaxalign.methods import (
    grpo,
    online_preference,
    ppo,
    preference,
    process_reward,
    reward,
    sft,
    unpaired_preference,
)

METHODS = {
    "sft": sft,
    "preference": preference,
    "reward": reward,
    "process_reward": process_reward,
    "grpo": grpo,
    "ppo": ppo,
    "online_preference": online_preference,
    "unpaired_preference": unpaired_preference,
}

__all__ = [
    "METHODS",
    "grpo",
    "online_preference",
    "ppo",
    "preference",
    "process_reward",
    "reward",
    "sft",
    "unpaired_preference",
]
