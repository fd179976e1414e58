"""Pure losses: arrays in, unreduced arrays out."""

from jaxalign.losses.masking import by_step, count_by_completion, mean_by_completion, ratio, sum_by_completion
from jaxalign.losses.preference import PREFERENCE_LOSSES, PreferenceLogps
from jaxalign.losses.tokens import TokenStatistics, token_logps, token_statistics

__all__ = [
    "PREFERENCE_LOSSES",
    "PreferenceLogps",
    "TokenStatistics",
    "by_step",
    "count_by_completion",
    "mean_by_completion",
    "ratio",
    "sum_by_completion",
    "token_logps",
    "token_statistics",
]
