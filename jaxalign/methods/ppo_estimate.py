"""From a rollout's scores to the advantages and returns of its tokens, on the host, with PPO's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxalign import losses
from jaxalign.methods.ppo_config import Config
from jaxalign.methods.rollout import spread
from jaxalign.sampling.generate import EOS, LENGTH
from jaxalign.types import Experience, Mean, Metrics

Carry = Mapping[str, float]
# Added to the standard deviation that scores are divided by: equal scores become 0, not rounding errors in units of it.
EPSILON = 1e-8


def start_carry(config: Config) -> dict[str, float]:
    """What goes from rollout to rollout: the KL coefficient, and number, mean and squared deviations of all scores."""
    moments = {"score_count": 0.0, "score_mean": 0.0, "score_squares": 0.0}
    return {"kl_coef": float(config.kl_coef), **(moments if config.normalize_scores == "running" else {})}


def estimate(config: Config, experience: Experience, carry: Carry) -> tuple[Experience, Metrics, dict[str, float]]:
    """Scores -> `advantages` and `returns` of tokens, the metrics of a rollout, and the next carry.

    The reward of a token is `-kl_coef * kl`, and the last one's has the score besides: `Σ r_t = s - kl_coef Σ kl_t`.
    Beyond the last token there is no value. (TRL 1.12 gives a completion that ends early one state more, after its EOS,
    which has the score as its reward and its own value; the two agree for `gamma = gae_lambda = 1`.) Returns are taken
    before advantages are whitened. A completion without a score has `loss_mask` 0 and enters no variance.

    Args:
      config: the method's.
      experience: a scored rollout with `sampler_logps`, `values`, and as the config makes it need, `ref_logps` and
        `old_logps`.
      carry: as `start_carry`.
    """
    mask, fields = experience.mask, dict(experience.fields)
    fields.setdefault("old_logps", fields["sampler_logps"])
    raw = np.asarray(losses.sum_scores(experience.scores, _weights(config, experience)), np.float64)
    scores, moments = shape_scores(config, raw, experience.finish, carry)
    in_loss = mask & ~np.isnan(scores)[:, None]
    kl = np.zeros(mask.shape, np.float32)
    if config.kl_coef:
        kl = np.asarray(losses.KL_ESTIMATORS[config.kl_estimator](fields["old_logps"], fields["ref_logps"])) * mask
    rewards = np.asarray(losses.token_rewards(np.nan_to_num(scores), kl, mask, kl_coef=carry["kl_coef"]))
    metrics = _metrics(config, experience, raw, scores, rewards, kl, carry)
    whiten = {"bessel": config.whiten_bessel}
    if config.whiten_rewards:
        rewards = losses.whiten(rewards, in_loss, shift_mean=False, **whiten)
    advantages, returns = losses.gae(
        rewards, fields["values"], in_loss, gamma=config.gamma, gae_lambda=config.gae_lambda
    )
    if config.whiten_advantages == "rollout":
        advantages = losses.whiten(advantages, in_loss, **whiten)
    learnt = {"advantages": advantages, "returns": returns, "loss_mask": in_loss}
    fields |= {name: np.asarray(values, np.float32) for name, values in learnt.items()}
    metrics |= _critic_metrics(fields, in_loss)
    following = {**carry, **moments, "kl_coef": _next_kl_coef(config, kl, carry)}
    return replace(experience, fields=fields), metrics, following


def shape_scores(
    config: Config, scores: np.ndarray, finish: np.ndarray, carry: Carry
) -> tuple[np.ndarray, dict[str, float]]:
    """Normalises and clips scores, then applies the rule for completions that did not end by themselves.

    Args:
      config: the method's.
      scores: float64 `[n]`, NaN = none; a NaN stays NaN.
      finish: int `[n]`, as in `Samples`.
      carry: with the moments so far, for `running`.

    Returns:
      float64 `[n]`, and the next moments (none if not `running`).
    """
    moments: dict[str, float] = {}
    known = scores[~np.isnan(scores)]
    if config.normalize_scores != "none":
        merged = _merge(carry if config.normalize_scores == "running" else {}, known)
        std = np.sqrt(merged["score_squares"] / max(merged["score_count"] - 1, 1))
        scores = (scores - merged["score_mean"]) / (std + EPSILON)
        moments = merged if config.normalize_scores == "running" else {}
    if config.score_clip is not None:
        scores = np.clip(scores, -config.score_clip, config.score_clip)
    endless = (finish == LENGTH) & ~np.isnan(scores)
    if config.missing_eos_penalty is not None:
        scores = np.where(endless, scores - config.missing_eos_penalty, scores)
    if config.score_without_eos is not None:
        scores = np.where(endless, config.score_without_eos, scores)
    return scores, moments


def _merge(moments: Carry, scores: np.ndarray) -> dict[str, float]:
    """Number, mean and squared deviations of old and new scores together. Source: Chan et al. (1979), eq. 2.1."""
    old, mean, squares = (moments.get(f"score_{name}", 0.0) for name in ("count", "mean", "squares"))
    count = old + len(scores)
    if not len(scores):
        return {"score_count": old, "score_mean": mean, "score_squares": squares}
    apart = float(scores.mean()) - mean
    squares += float(np.square(scores - scores.mean()).sum()) + apart**2 * old * len(scores) / count
    return {"score_count": count, "score_mean": mean + apart * len(scores) / count, "score_squares": squares}


def _next_kl_coef(config: Config, kl: np.ndarray, carry: Carry) -> float:
    if config.kl_target is None:
        return carry["kl_coef"]
    measured = float(kl.sum(1, dtype=np.float64).mean())
    return float(
        losses.update_kl_coef(
            carry["kl_coef"], measured, target=config.kl_target, horizon=config.kl_horizon, num_samples=len(kl)
        )
    )


def _weights(config: Config, experience: Experience) -> np.ndarray:
    return np.asarray(config.reward_weights or (1.0,) * experience.scores.shape[1])


def _metrics(
    config: Config,
    experience: Experience,
    raw: np.ndarray,
    scores: np.ndarray,
    rewards: np.ndarray,
    kl: np.ndarray,
    carry: Carry,
) -> dict[str, Any]:
    """TRL's `objective/*`, per completion, and what the rewards said before anything was made of it."""
    old, known = experience.fields.get("old_logps", experience.fields["sampler_logps"]), ~np.isnan(scores)
    metrics: dict[str, Any] = {
        "objective/entropy": _mean(-np.where(experience.mask, old, 0).sum(1, dtype=np.float64)),
        "val/num_eos_tokens": Mean(float((experience.finish == EOS).sum()), 1.0),
    }
    if config.kl_coef:
        per_completion = kl.sum(1, dtype=np.float64)
        metrics["objective/kl"] = _mean(per_completion)
        metrics["objective/kl_coef"] = Mean(carry["kl_coef"], 1.0)
        metrics["objective/non_score_reward"] = _mean(-carry["kl_coef"] * per_completion)
    if known.any():
        metrics["reward"] = _mean(raw[known])
        metrics["objective/scores"] = _mean(scores[known])
        sums = rewards[known].sum(1, dtype=np.float64)
        metrics["objective/rlhf_reward"] = _mean(sums)
        metrics |= {**spread("critic/score/{}", scores[known]), **spread("critic/rewards/{}", sums)}
    if known.sum() > 1:
        metrics["reward_std"] = Mean(float(raw[known].std(ddof=1)), 1.0)
    return metrics


def _critic_metrics(fields: Mapping[str, np.ndarray], in_loss: np.ndarray) -> dict[str, Any]:
    """verl's `critic/*`, per token."""
    metrics: dict[str, Any] = {}
    if not in_loss.any():
        return metrics
    tokens = {name: fields[name][in_loss].astype(np.float64) for name in ("advantages", "returns", "values")}
    for name, values in tokens.items():
        metrics |= spread(f"critic/{name}/{{}}", values)
    variance = tokens["returns"].var()
    if variance > 0:
        unexplained = (tokens["returns"] - tokens["values"]).var() / variance
        metrics["critic/vf_explained_var"] = Mean(float(1 - unexplained), 1.0)
    return metrics


def _mean(values: np.ndarray) -> Mean:
    return Mean(float(values.sum()), float(len(values)))
