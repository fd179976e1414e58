"""The settings of preference losses against a reference, and the papers' combinations of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxalign.losses import COUPLED_LOSSES, DIVERGENCES, MARGIN_LOSSES, PREFERENCE_LOSSES, preference_options
from jaxalign.methods.checks import check_chunk, check_known, check_rules, check_unread

SMOOTHED = tuple(name for name in PREFERENCE_LOSSES if "label_smoothing" in preference_options(name))
# Who reads what not everybody reads.
READERS = {
    "label_smoothing": f"by the losses {', '.join(SMOOTHED)}",
    "discopop_tau": "by the loss discopop",
    "f_alpha_divergence_coef": "with f_divergence_type: alpha_divergence",
    "ref_model_mixup_alpha": "with sync_ref_model: true",
    "ref_model_sync_steps": "with sync_ref_model: true",
}


@dataclass(frozen=True)
class Config:
    """Preference optimisation.

    Attributes:
      loss_type: key in `PREFERENCE_LOSSES`, or several.
      loss_weights: weight of each of several losses; None = 1 each.
      beta: inverse strength of the KL penalty.
      label_smoothing: probability that a label is wrong, in [0, 0.5); `exo_pair` needs some.
      discopop_tau: `discopop` only.
      f_divergence_type: key in `DIVERGENCES`; other than `reverse_kl` for losses of a margin only.
      f_alpha_divergence_coef: order of `alpha_divergence`.
      ld_alpha: LD-DPO's weight of tokens beyond the shorter completion's length, in [0, 1]; None = 1.
      use_weighting: weigh pairs by the policy's own probability of them (WPO).
      sync_ref_model: let the reference follow the policy (TR-DPO).
      ref_model_mixup_alpha: share of the policy in the new reference.
      ref_model_sync_steps: steps from one such mixture to the next.
      disable_dropout: no dropout even if the model's config has some.
      precompute_ref_log_probs: run the reference once over the data set before training and cache what it says on disk,
        instead of keeping it in memory and running it on every batch.
      share_prompt: compute the prompt once for both completions.
      logits_chunk: predictions per row whose logits exist at once; None = `common.choose_chunk`.
      router_aux_loss_coef: weight of the load-balancing loss of sparse models; None = what the model's config says.
    """

    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    disable_dropout: bool = True
    precompute_ref_log_probs: bool = False
    share_prompt: bool = True
    logits_chunk: int | None = None
    router_aux_loss_coef: float | None = None

    def __post_init__(self):
        """Raises ValueError on settings that have no meaning, or that nothing reads; the field is named."""
        names = self.loss_types
        check_known("loss_type", names, PREFERENCE_LOSSES)
        check_known("f_divergence_type", [self.f_divergence_type], DIVERGENCES)
        check_unread(
            self,
            {
                "label_smoothing": not set(names).isdisjoint(SMOOTHED),
                "discopop_tau": "discopop" in names,
                "f_alpha_divergence_coef": self.f_divergence_type == "alpha_divergence",
                "ref_model_mixup_alpha": self.sync_ref_model,
                "ref_model_sync_steps": self.sync_ref_model,
            },
            READERS,
        )
        weights, others = self.loss_weights, sorted(set(names) - MARGIN_LOSSES)
        diverges = self.f_divergence_type != "reverse_kl"
        needs_noise = "exo_pair" in names and not self.label_smoothing
        rules = {
            "loss_type": (len(names) > 0, "at least one loss"),
            "loss_weights": (
                weights is None or (len(weights) == len(names) and min(weights, default=1) > 0),
                f"{len(names)} numbers above 0, one for each of {', '.join(names)}",
            ),
            "beta": (self.beta > 0, "greater than 0"),
            "label_smoothing": (
                0 <= self.label_smoothing < 0.5 and not needs_noise,
                "in (0, 0.5) with exo_pair, for example 1e-3" if needs_noise else "in [0, 0.5)",
            ),
            "discopop_tau": (self.discopop_tau > 0, "above 0"),
            "f_divergence_type": (
                not (diverges and others),
                f"reverse_kl with {', '.join(others)}: only losses of a margin ({', '.join(sorted(MARGIN_LOSSES))}) "
                "have another",
            ),
            "ld_alpha": (self.ld_alpha is None or 0 <= self.ld_alpha <= 1, "in [0, 1]"),
            "use_weighting": (
                not (self.use_weighting and {"sft", *COUPLED_LOSSES} & set(names)),
                "false with sft, which weighs tokens alike, and with aot and aot_unpaired, which weigh quantiles",
            ),
            "ref_model_mixup_alpha": (0 < self.ref_model_mixup_alpha <= 1, "in (0, 1]"),
            "ref_model_sync_steps": (self.ref_model_sync_steps >= 1, "at least 1"),
            "sync_ref_model": (
                not (self.sync_ref_model and self.precompute_ref_log_probs),
                "false with precompute_ref_log_probs: what was computed beforehand would be of another reference",
            ),
        }
        check_rules(self, rules)
        check_chunk(self)

    @property
    def loss_types(self) -> tuple[str, ...]:
        """The losses, one or more."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type


# Names under which a config may ask for these; what is not named is TRL's default.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dpo": {},
    "cdpo": {"label_smoothing": 0.1},
    "robust_dpo": {"loss_type": "robust", "label_smoothing": 0.1},
    "ipo": {"loss_type": "ipo"},
    "slic": {"loss_type": "hinge"},
    # Ji et al., arXiv 2402.00856.
    "exo": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "nca": {"loss_type": "nca_pair", "beta": 0.01},
    # Wu et al., arXiv 2405.00675: eta = 1000.
    "sppo": {"loss_type": "sppo_hard", "beta": 0.001},
    "apo_zero": {"loss_type": "apo_zero"},
    "apo_down": {"loss_type": "apo_down"},
    # Lu et al., arXiv 2406.08414.
    "discopop": {"loss_type": "discopop", "beta": 0.05},
    # Lambert et al., arXiv 2411.15124: means over tokens are small, so beta is large.
    "dpo_norm": {"loss_type": "sigmoid_norm", "beta": 5.0},
    # Liu et al., arXiv 2409.06411.
    "ld_dpo": {"ld_alpha": 0.5},
    "wpo": {"use_weighting": True},
    # Wang et al., arXiv 2411.10442.
    "mpo": {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    # Melnyk et al., arXiv 2406.05882.
    "aot": {"loss_type": "aot"},
    "aot_unpaired": {"loss_type": "aot_unpaired"},
    # Gorbatovski et al., arXiv 2404.09656.
    "tr_dpo": {"sync_ref_model": True},
}
