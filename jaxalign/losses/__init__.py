"""Pure losses: arrays in, unreduced arrays out."""

from jaxalign.losses.advantages import (
    ADVANTAGES,
    batch_advantages,
    discounted_returns,
    gae,
    group_advantages,
    leave_one_out_advantages,
    length_mask,
    normalize_then_sum,
    overlong_penalty,
    sum_scores,
    token_rewards,
    unscaled_advantages,
    whiten,
    without_signal,
)
from jaxalign.losses.aggregation import (
    AGGREGATIONS,
    Aggregation,
    Counts,
    aggregate,
    count_batch,
    spread_by_completion,
)
from jaxalign.losses.balance import balance_loss
from jaxalign.losses.divergences import DIVERGENCES, MAX_EXPONENT, bounded_exp
from jaxalign.losses.kl import KL_ESTIMATORS, bias_corrected, prob_ratios, update_kl_coef
from jaxalign.losses.masking import by_step, count_by_completion, mean_by_completion, ratio, sum_by_completion
from jaxalign.losses.policy import (
    CISPO_BOUNDS,
    POLICY_LOSSES,
    RATIO_LEVELS,
    PolicyTerms,
    clip_metrics,
    policy_options,
)
from jaxalign.losses.preference import (
    MARGIN_LOSSES,
    PER_TOKEN,
    PREFERENCE_LOSSES,
    PreferenceLogps,
    preference_options,
)
from jaxalign.losses.reference_free import (
    PER_TOKEN_REWARDS,
    REFERENCE_FREE_LOSSES,
    alpha_reward,
    log1mexp,
    log_odds,
    reference_free_options,
)
from jaxalign.losses.reward import RankingTerms, bradley_terry, ranking
from jaxalign.losses.supervised import SFT_LOSSES
from jaxalign.losses.tokens import TokenStatistics, state_statistics, token_logps, token_statistics
from jaxalign.losses.transport import COUPLED_LOSSES
from jaxalign.losses.unpaired import (
    MISMATCHED_LOSSES,
    RUNNING_LOSSES,
    UNPAIRED_LOSSES,
    UnpairedLogps,
    kto_baseline,
    running_mean,
)
from jaxalign.losses.value import ValueTerms, value_loss
from jaxalign.losses.weighting import length_weights, policy_weights

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "CISPO_BOUNDS",
    "COUPLED_LOSSES",
    "DIVERGENCES",
    "KL_ESTIMATORS",
    "MARGIN_LOSSES",
    "MAX_EXPONENT",
    "MISMATCHED_LOSSES",
    "PER_TOKEN",
    "PER_TOKEN_REWARDS",
    "POLICY_LOSSES",
    "PREFERENCE_LOSSES",
    "RATIO_LEVELS",
    "REFERENCE_FREE_LOSSES",
    "RUNNING_LOSSES",
    "SFT_LOSSES",
    "UNPAIRED_LOSSES",
    "Aggregation",
    "Counts",
    "PolicyTerms",
    "PreferenceLogps",
    "RankingTerms",
    "TokenStatistics",
    "UnpairedLogps",
    "ValueTerms",
    "aggregate",
    "alpha_reward",
    "balance_loss",
    "batch_advantages",
    "bias_corrected",
    "bounded_exp",
    "bradley_terry",
    "by_step",
    "clip_metrics",
    "count_batch",
    "count_by_completion",
    "discounted_returns",
    "gae",
    "group_advantages",
    "kto_baseline",
    "leave_one_out_advantages",
    "length_mask",
    "length_weights",
    "log1mexp",
    "log_odds",
    "mean_by_completion",
    "normalize_then_sum",
    "overlong_penalty",
    "policy_options",
    "policy_weights",
    "preference_options",
    "prob_ratios",
    "ranking",
    "ratio",
    "reference_free_options",
    "running_mean",
    "spread_by_completion",
    "state_statistics",
    "sum_by_completion",
    "sum_scores",
    "token_logps",
    "token_rewards",
    "token_statistics",
    "unscaled_advantages",
    "update_kl_coef",
    "value_loss",
    "whiten",
    "without_signal",
]
