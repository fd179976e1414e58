"""One file, one method."""

from jaxalign.methods import grpo, ppo, preference, reward, sft

METHODS = {"sft": sft, "preference": preference, "reward": reward, "grpo": grpo, "ppo": ppo}

__all__ = ["METHODS", "grpo", "ppo", "preference", "reward", "sft"]
