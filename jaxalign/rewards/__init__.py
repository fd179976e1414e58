"""Scores for completions from functions: built in, or your own."""

from jaxalign.rewards.calling import call_rewards, start_rewards
from jaxalign.rewards.contract import Reward, RewardError, text_of
from jaxalign.rewards.functions import REWARD_FUNCTIONS
from jaxalign.rewards.loading import load_reward, reward_file
from jaxalign.rewards.sandbox import Limits, Outcome, Program, SandboxError, describe_sandbox, run_program, run_programs

__all__ = [
    "REWARD_FUNCTIONS",
    "Limits",
    "Outcome",
    "Program",
    "Reward",
    "RewardError",
    "SandboxError",
    "call_rewards",
    "describe_sandbox",
    "load_reward",
    "reward_file",
    "run_program",
    "run_programs",
    "start_rewards",
    "text_of",
]
