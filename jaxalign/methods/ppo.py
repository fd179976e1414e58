"""Proximal policy optimisation with a critic, as for language models: KL in the reward, GAE, clipped policy and value.

The trainable parameters are `{"policy": ..., "value": ...}`, see `ppo_models`. Sources: Schulman et al.,
arXiv 1707.06347; Ziegler et al., arXiv 1909.08593; Huang et al., arXiv 2403.17031.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import losses
from jaxalign.methods import balance, common, sft
from jaxalign.methods.agreement import UPDATE, agreement, number_update
from jaxalign.methods.ppo_config import Config
from jaxalign.methods.ppo_estimate import estimate as estimate
from jaxalign.methods.ppo_estimate import start_carry as start_carry
from jaxalign.methods.ppo_models import CRITIC_LOADS, Models, critic_key, loads_counter, routers_of
from jaxalign.methods.ppo_models import add_critic as add_critic
from jaxalign.methods.ppo_models import policy_of as policy_of
from jaxalign.methods.ppo_models import value_of as value_of
from jaxalign.models import Model
from jaxalign.models.freezing import check_trainable
from jaxalign.packing import Document, measure_document, pack
from jaxalign.training.state import TrainState, init_state
from jaxalign.training.step import LossFn, Step, Totals
from jaxalign.training.step import make_step as make_training_step
from jaxalign.types import Array, Batch, Experience, Mean, Metrics, PyTree, Variables

KIND = "prompt"
ONLINE = True
CRITIC = True
LEARNING_RATE = 3e-6

drawn_metrics = common.no_drawn_metrics
make_logps = common.make_policy_logps


def needs_reference(config: Config) -> bool:
    """Whether log-probs of a reference enter."""
    return config.kl_coef > 0


def rollout_prompts(config: Config, batch_size: int) -> int:
    """Prompts of a rollout, for batches of `batch_size` prompts."""
    return batch_size * config.num_mini_batches


def num_updates(config: Config) -> int:
    """Optimiser steps that learn from one rollout."""
    return config.num_mini_batches * config.num_ppo_epochs


def max_rollouts(config: Config) -> int:
    """Most rollouts that are drawn for one."""
    del config
    return 1


def keep(config: Config, experience: Experience) -> np.ndarray:
    """bool `[prompts]`, whose completions are learnt from: all."""
    del config
    return np.ones(len(experience.prompts), bool)


def schedule(config: Config, prompts: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Prompts of the rollout per update: each epoch takes all of them in an order of its own."""
    orders = [rng.permutation(prompts) for _ in range(config.num_ppo_epochs)]
    return [order[start : start + batch_size] for order in orders for start in range(0, prompts, batch_size)]


def passes(config: Config, *, narrow: bool) -> dict[str, Literal["policy", "reference", "value"]]:
    """Fields that packed passes must fill, and by which model; `narrow` = computed in less than float32."""
    wanted: dict[str, Literal["policy", "reference", "value"]] = {"values": "value"}
    trainer = config.old_logps == "trainer" or (config.old_logps == "auto" and narrow)
    # The sampler's rounding would enter the KL too.
    if trainer and (num_updates(config) > 1 or needs_reference(config)):
        wanted["old_logps"] = "policy"
    if needs_reference(config):
        wanted["ref_logps"] = "reference"
    return wanted


def fields(config: Config) -> tuple[str, ...]:
    """Fields per token that the loss reads."""
    old = ("old_logps",) if num_updates(config) > 1 else ()
    return ("advantages", "returns", "values", "loss_mask", "sampler_logps", *old)


def batch_fields(config: Config, experience: Experience, micro_batches: int, update: int = 0) -> dict[str, np.ndarray]:
    """Numbers of a whole batch: which update of its rollout it is."""
    del config, experience
    return number_update(update, micro_batches)


def totals(batch: Batch) -> Totals:
    """The losses' denominators: tokens of the global minibatch, and targets of its supervised examples."""
    counts = {"loss": (common.in_loss(batch) >= 0).sum().astype(jnp.float32)}
    return {**counts, "ptx": batch.fields["ptx_mask"].sum()} if "ptx_mask" in batch.fields else counts


def make_loss(config: Config, models: Models) -> LossFn:
    """The loss of a micro-batch: means over the global minibatch's tokens of the policy's and the critic's loss.

    `policy + vf_coef value - entropy_coef entropy`, and with `ptx_coef` that times the mean negative log-prob of the
    supervised targets, at temperature 1; with experts the load-balancing losses of the policy and of a critic of its
    own. The batch carries `fields(config)`, the advantages as `whiten_batch` has them.
    """
    bounds = {"epsilon_low": config.epsilon, "epsilon_high": config.upper}
    dual = {} if config.dual_clip is None else {"dual_clip": config.dual_clip}
    policy_loss = partial(losses.POLICY_LOSSES["dual" if dual else "clip"], **bounds, **dual)
    routers = routers_of(config, models)

    def loss(params: PyTree, frozen: PyTree, batch: Batch, totals: Totals, key: jax.Array | None):
        known, completions = batch.fields, common.in_loss(batch)
        read = _read(config, models, params, frozen, batch, None if config.disable_dropout else key)
        logps = read.tokens.logps
        old = known.get("old_logps", jax.lax.stop_gradient(logps))
        log_ratios = losses.RATIO_LEVELS["token"](logps, old, completions, batch.present.shape[0])
        terms = policy_loss(log_ratios, known["advantages"], logps)
        critic = losses.value_loss(read.values, known["values"], known["returns"], epsilon=config.epsilon_value)
        per_token = terms.loss + config.vf_coef * critic.loss
        if config.entropy_coef:
            per_token = per_token - config.entropy_coef * read.tokens.entropy
        value = losses.ratio(jnp.where(completions >= 0, per_token, 0).sum(), totals["loss"])
        metrics = _metrics(batch, read.tokens, log_ratios, terms, critic)
        if config.ptx_coef:
            nll = -read.supervised_logps * known["ptx_mask"]
            value = value + config.ptx_coef * losses.ratio(nll.sum(), totals["ptx"])
            metrics["loss/ptx_avg"] = common.masked_mean(nll, known["ptx_mask"])
        for each in routers:
            aux = read.aux[each.loads]
            value, metrics = balance.add(
                each.weight, each.model, batch, aux, value, metrics, loads=each.loads, name=each.name
            )
        return value, jax.lax.stop_gradient(metrics)

    counts = {each.loads: loads_counter(config, each) for each in routers}
    return balance.prepare(loss, counts) if counts else loss


def whiten_batch(config: Config, batch: Batch) -> Batch:
    """Whitens the advantages over the tokens of a global minibatch, where the config asks for that."""
    if config.whiten_advantages != "minibatch":
        return batch
    known = batch.fields
    white = losses.whiten(known["advantages"], known["loss_mask"], bessel=config.whiten_bessel)
    return replace(batch, fields={**known, "advantages": white})


class Stoppable(NamedTuple):
    """What stands in the place of the optimiser's state where there is a `target_kl`.

    Attributes:
      stopped: bool scalar, whether an update of the current epoch was too far from the policy that drew.
      optimizer: the optimiser's state.
    """

    stopped: Array
    optimizer: PyTree


def make_step(
    config: Config,
    models: Models,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Array], Array] | None = None,
) -> Step:
    """`(state, frozen, batch) -> (state, metrics)`; jit it and donate the state.

    With `target_kl`, an update on whose minibatch `policy/approxkl_avg` is above it, and all that follow in the same
    epoch, change neither parameters nor the optimiser's state, but are counted; `policy/stopped` is the share of such
    updates. That an epoch is stopped is part of the train state (see `init`), and so of a checkpoint.
    """
    update = make_training_step(make_loss(config, models), totals, optimizer, learning_rate)

    def step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = whiten_batch(config, batch)
        if config.target_kl is None:
            return update(state, frozen, batch)
        before: Stoppable = state.opt_state
        updated, metrics = update(replace(state, opt_state=before.optimizer), frozen, batch)
        kl = metrics["policy/approxkl_avg"]
        assert isinstance(kl, Mean)
        begins = batch.fields[UPDATE][0] % config.num_mini_batches == 0
        stopped = (before.stopped & ~begins) | (jnp.asarray(kl.total) > config.target_kl * kl.weight)
        held = partial(jax.tree.map, lambda old, new: jnp.where(stopped, old, new))
        params, after = held(state.params, updated.params), held(before.optimizer, updated.opt_state)
        metrics = {**metrics, "policy/stopped": Mean(stopped.astype(jnp.float32), jnp.ones((), jnp.float32))}
        return replace(updated, params=params, opt_state=Stoppable(stopped, after)), metrics

    return step


def make_values(config: Config, model: Model) -> Callable[[Variables, Batch], jax.Array]:
    """`(variables, batch) -> values`, float32 `[micro, rows, predictions]`: of the state in which a token is drawn."""
    del config

    def one(variables: Variables, batch: Batch) -> jax.Array:
        return common.read_scores(model, variables, batch)[0]

    return lambda variables, batch: jax.lax.map(partial(one, variables), replace(batch, fields={}))


def init(
    config: Config,
    models: Models,
    variables: Mapping[str, Variables],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
) -> tuple[TrainState, PyTree]:
    """The state at step 0 and the frozen variables by role; models and variables as `add_critic` gives them.

    With `target_kl` the state's `opt_state` is a `Stoppable`.
    """
    del models
    parts = {role: common.split_variables(each) for role, each in variables.items()}
    params = {role: trainable for role, (trainable, _) in parts.items()}
    check_trainable(params)
    state, frozen = init_state(params, optimizer, key), {role: frozen for role, (_, frozen) in parts.items()}
    if config.target_kl is not None:
        state = replace(state, opt_state=Stoppable(jnp.zeros((), bool), state.opt_state))
    return state, frozen


def to_document(config: Config, example: common.Example) -> Document:
    """A prompt as trunk and its completions as branches.

    Args:
      config: the method's.
      example: `prompt_ids` int32; `completion_ids`, one int32 array per completion; `advantages`, `returns`, `values`
        and, where more than one update is made per rollout, `old_logps`: one float32 array per completion each, per
        token; `loss_mask` likewise, all tokens by default; `sampler_logps` likewise, for a metric.
    """
    branches = tuple(np.asarray(ids, np.int32) for ids in example["completion_ids"])
    ones = [np.ones(len(ids), np.float32) for ids in branches]
    given = {"loss_mask": ones, "sampler_logps": [np.full(len(ids), np.nan, np.float32) for ids in branches], **example}
    known = {name: tuple(np.asarray(each, np.float32) for each in given[name]) for name in fields(config)}
    return Document(np.asarray(example["prompt_ids"], np.int32), branches, fields=known)


def to_supervised(example: common.Example) -> Document:
    """A supervised example as `ptx_coef` mixes it in: `input_ids` int32 and `loss_mask` bool, as in `sft.to_document`.

    The fields of a rollout are 0 on its targets, so that they are in no loss but their own.
    """
    document = sft.to_document(sft.Config(), example)
    return replace(document, fields={"ptx_mask": (np.ones(measure_document(document).predictions, np.float32),)})


def make_batch(
    config: Config,
    groups: Sequence[common.Example],
    supervised: Sequence[common.Example] = (),
    *,
    update: int = 0,
    **layout: Any,
) -> Batch:
    """Packs groups (see `to_document`), then supervised examples, into the batch of a rollout's `update`, from 0.

    `layout` as `packing.pack`.
    """
    documents = [*(to_document(config, group) for group in groups), *map(to_supervised, supervised)]
    size = max(len(each.branches) for each in documents)
    batch = pack(documents, completions=size, share_prompt=config.share_prompt, **layout)
    return replace(batch, fields={**batch.fields, **number_update(update, len(batch.present))})


class _Reading(NamedTuple):
    """What the models say of a micro-batch's predictions; `supervised_logps` are 0 without `ptx_coef`.

    `aux` is what `Model.apply` says, of the policy and of a critic of its own, by the field of their routers' loads.
    """

    tokens: losses.TokenStatistics
    values: jax.Array
    supervised_logps: jax.Array | float
    aux: Mapping[str, Mapping[str, Array]]


def _read(
    config: Config, models: Models, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array | None
) -> _Reading:
    policy, value = policy_of(params, frozen), value_of(params, frozen)
    weights = balance.token_weights(batch)
    hidden, _, aux = models.policy.apply(policy, batch.rows, key=key, weights=weights)
    read: dict[str, Mapping[str, Array]] = {balance.LOADS: aux}
    if config.critic == "separate":
        values, read[CRITIC_LOADS] = common.read_scores(models.value, value, batch, critic_key(key))
    else:
        values = common.scores_of(models.value, value, hidden, batch.predictions)

    def statistics(**options: Any) -> losses.TokenStatistics:
        head = partial(common.statistics, models.policy, **options)
        return models.policy.predict(head, policy, hidden, batch.predictions)

    chunk, entropy = config.logits_chunk, config.entropy_coef > 0
    tokens = statistics(temperature=config.temperature, chunk=chunk, entropy_gradient=entropy)
    if not config.ptx_coef:
        return _Reading(tokens, values, 0.0, read)
    if "ptx_mask" not in batch.fields:
        raise ValueError(f"ptx_coef={config.ptx_coef}, but the batch has no supervised examples; see ppo.make_batch")
    return _Reading(tokens, values, statistics(chunk=chunk).logps, read)


def _metrics(
    batch: Batch,
    tokens: losses.TokenStatistics,
    log_ratios: Array,
    terms: losses.PolicyTerms,
    critic: losses.ValueTerms,
) -> dict[str, Any]:
    """TRL's names, over the tokens in the loss; `val/ratio_var` is about 1, the ratio's expectation."""
    mask = (common.in_loss(batch) >= 0).astype(jnp.float32)
    ratios = losses.prob_ratios(log_ratios)
    clipped = [each for each in (terms.clipped_low, terms.clipped_high) if each is not None]
    known = {
        "policy/approxkl_avg": jnp.square(log_ratios) / 2,
        "policy/clipfrac_avg": sum(clipped),
        "policy/entropy_avg": tokens.entropy,
        "loss/policy_avg": terms.loss,
        "loss/value_avg": critic.loss,
        "val/clipfrac_avg": critic.clipped,
        "val/ratio": ratios,
        "val/ratio_var": jnp.square(ratios - 1),
    }
    if terms.capped is not None:
        known["actor/pg_clipfrac_lower"] = terms.capped
    metrics: dict[str, Any] = {name: common.masked_mean(values, mask) for name, values in known.items()}
    return {**metrics, **agreement(tokens.logps, batch, mask)}
