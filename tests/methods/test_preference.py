"""Pairs end to end: losses and metrics from the full logits of each sequence alone, in float64; settings that clash."""

import math
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.config import parse_config
from jaxalign.losses import PREFERENCE_LOSSES
from jaxalign.methods import METHODS, PRESETS, preference, reference_free
from jaxalign.training.step import accumulate, evaluate
from jaxalign.types import TokenRows
from tests.layouts import ragged_pairs, tiny_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")

PAIRS = ragged_pairs(5, seed=4)
ONE_LAYER: dict[str, Any] = {"num_layers": 1, "windows": (None,)}


def sequences(model, variables, both):
    """Per sequence log-probs of all tokens but the first, and log sum p^2 and mean logit per completion token."""
    width = max(len(prompt) + len(completion) for prompt, completion in both)
    ids, mask = np.zeros((2, len(both), width), np.int32)
    for i, parts in enumerate(both):
        tokens = np.concatenate(parts)
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
    apply = jax.jit(lambda v, rows: model.logits(v, model.apply(v, rows)[0]))
    found = np.asarray(apply(variables, TokenRows.from_padded(ids, mask)), np.float64)
    known = []
    for i, (prompt, completion) in enumerate(both):
        length, start = len(prompt) + len(completion), len(prompt) - 1
        logits = found[i, : length - 1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        known.append(
            {
                "logps": log_probs[np.arange(length - 1), ids[i, 1:length]],
                "squares": np.log(np.exp(2 * log_probs).sum(-1))[start:],
                "mean_logits": logits.mean(-1)[start:],
                "start": start,
            }
        )
    return known


@pytest.fixture(scope="module")
def case():
    """The model, its policy and reference, and what is known of each pair's sequences under both."""
    model, variables = tiny_model(**ONE_LAYER)
    reference = jax.tree.map(lambda x: x * 0.97, variables)
    both = [(pair["prompt_ids"], pair[side]) for pair in PAIRS for side in ("chosen_ids", "rejected_ids")]
    policy, fixed = (sequences(model, each, both) for each in (variables, reference))
    known = [(policy[i : i + 2], fixed[i : i + 2]) for i in range(0, len(both), 2)]
    return model, variables, reference, known


def judged(case, method, config, examples, **layout):
    """Metrics of a batch, not yet divided."""
    model, variables, reference, _ = case

    def compute(variables, reference, batch):
        if method.needs_reference(config):
            batch = method.make_reference(config, model)(reference, batch)
        return evaluate(method.make_loss(config, model), method.totals, variables, {}, batch)

    return jax.jit(compute)(variables, reference, method.make_batch(config, examples, **layout))


def run(case, method, config, **layout):
    return {name: metric.value() for name, metric in judged(case, method, config, PAIRS, **layout).items()}


def completion(known):
    return known["logps"][known["start"] :]


def sigmoid_loss(margin):
    return math.log1p(math.exp(-margin))


def test_ld_dpo(case):
    """Tokens beyond the shorter completion's length weigh 0.3, in loss, rewards and logps."""
    wanted, rewards, logps = [], [], []
    for policy, reference in case[3]:
        shared = min(len(completion(side)) for side in policy)
        weights = [np.where(np.arange(len(completion(side))) < shared, 1, 0.3) for side in policy]
        a, b = ((w * (completion(p) - completion(r))).sum() for w, p, r in zip(weights, policy, reference, strict=True))
        wanted.append(sigmoid_loss(0.1 * (a - b)))
        rewards.append(0.1 * a)
        logps.append((weights[1] * completion(policy[1])).sum())
    assert any(len(completion(p[0])) != len(completion(p[1])) for p, _ in case[3])
    metrics = run(case, preference, preference.Config(ld_alpha=0.3), micro_batch_size=2)
    assert metrics["loss"] == pytest.approx(np.mean(wanted), rel=1e-6)
    assert metrics["rewards/chosen"] == pytest.approx(np.mean(rewards), rel=1e-5)
    assert metrics["logps/rejected"] == pytest.approx(np.mean(logps), rel=1e-6)


def test_wpo_and_f_divergence(case):
    """The weight is of policy probabilities, the loss of exp'd log-ratios; rewards stay those of log-ratios."""
    wanted, rewards = [], []
    for policy, reference in case[3]:
        a, b = ((completion(p) - completion(r)).sum() for p, r in zip(policy, reference, strict=True))
        weight = math.exp(sum((completion(side) - side["squares"]).mean() for side in policy))
        wanted.append(weight * sigmoid_loss(0.1 * (math.exp(-b) - math.exp(-a))))
        rewards.append(0.1 * (a - b))
    config = preference.Config(use_weighting=True, f_divergence_type="forward_kl")
    metrics = run(case, preference, config, micro_batch_size=3)
    assert metrics["loss"] == pytest.approx(np.mean(wanted), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(np.mean(rewards), rel=1e-5)


def test_mpo(case):
    """0.8 DPO + 0.2 BCO over pairs, and the negative log-likelihood over all chosen tokens of the batch."""
    pairs, nll, tokens = [], 0.0, 0
    for policy, reference in case[3]:
        a, b = (0.1 * (completion(p) - completion(r)).sum() for p, r in zip(policy, reference, strict=True))
        pairs.append(0.8 * sigmoid_loss(a - b) + 0.2 * (sigmoid_loss(a) + sigmoid_loss(-b)))
        nll, tokens = nll - completion(policy[0]).sum(), tokens + len(completion(policy[0]))
    config = preference.Config(**PRESETS["mpo"][1])
    metrics = run(case, preference, config, micro_batch_size=2)
    assert metrics["loss"] == pytest.approx(np.mean(pairs) + nll / tokens, rel=1e-6)


def test_orpo(case):
    """The likelihood is of all tokens of prompt and chosen completion but the first; odds are of token means."""
    odds, nll, tokens = [], 0.0, 0
    for policy, _ in case[3]:
        p, q = (completion(side).mean() for side in policy)
        odds.append(p - math.log(1 - math.exp(p)) - q + math.log(1 - math.exp(q)))
        nll, tokens = nll - policy[0]["logps"].sum(), tokens + len(policy[0]["logps"])
    metrics = run(case, reference_free, reference_free.Config(loss_type="orpo", beta=0.4), micro_batch_size=2)
    ratio = -np.mean([sigmoid_loss(each) for each in odds])
    assert metrics["nll_loss"] == pytest.approx(nll / tokens, rel=1e-6)
    assert metrics["log_odds_chosen"] == pytest.approx(np.mean(odds), rel=1e-5)
    assert metrics["log_odds_ratio"] == pytest.approx(ratio, rel=1e-6)
    assert metrics["loss"] == pytest.approx(nll / tokens - 0.4 * ratio, rel=1e-6)
    # What is asked of prompts enters the likelihood alone.
    chosen = np.concatenate([policy[0]["mean_logits"] for policy, _ in case[3]])
    assert metrics["logits/chosen"] == pytest.approx(chosen.mean(), rel=1e-5)
    means = [completion(policy[0]).mean() for policy, _ in case[3]]
    assert metrics["logps/chosen"] == pytest.approx(np.mean(means), rel=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_cpo_and_alphapo(case, loss_type):
    """CPO of sums; SimPO of means whose reward AlphaPO bends. The likelihood is of the chosen completion alone."""
    options: dict[str, dict[str, Any]] = {"sigmoid": {"cpo_alpha": 0.5}, "simpo": {"alpha": 0.25, "simpo_gamma": 0.3}}
    settings = options[loss_type]
    config = reference_free.Config(loss_type=loss_type, beta=0.05, **settings)
    pairs, rewards, nll, tokens = [], [], 0.0, 0
    for policy, _ in case[3]:
        if loss_type == "sigmoid":
            a, b = (0.05 * completion(side).sum() for side in policy)
        else:
            a, b = (0.05 * (1 - math.exp(-0.25 * completion(side).mean())) / 0.25 for side in policy)
        pairs.append(sigmoid_loss(a - b - (0.3 if loss_type == "simpo" else 0)))
        rewards.append(a)
        nll, tokens = nll - completion(policy[0]).sum(), tokens + len(completion(policy[0]))
    metrics = run(case, reference_free, config, micro_batch_size=2)
    assert metrics["loss"] == pytest.approx(np.mean(pairs) + config.cpo_alpha * nll / tokens, rel=1e-6)
    assert metrics["rewards/chosen"] == pytest.approx(np.mean(rewards), rel=1e-6)
    assert metrics["nll_loss"] == pytest.approx(nll / tokens, rel=1e-6)


@pytest.mark.parametrize("name", ["orpo", "mpo"])
def test_evaluation_does_not_depend_on_the_batches(case, name):
    """Terms with denominators of their own are each merged over batches before they are divided."""
    method, config = METHODS[PRESETS[name][0]], METHODS[PRESETS[name][0]].Config(**PRESETS[name][1])
    layout = {"micro_batch_size": 3, "micro_batches": 2, "length": 128}  # one program for all
    parts = [judged(case, method, config, each, **layout) for each in (PAIRS[:1], PAIRS[1:])]
    merged = {name: metric.merge(parts[1][name]).value() for name, metric in parts[0].items()}
    whole = judged(case, method, config, PAIRS, **layout)
    assert merged == pytest.approx({name: metric.value() for name, metric in whole.items()}, rel=1e-5)
    weighted = [4 * part["loss"].value() if i else part["loss"].value() for i, part in enumerate(parts)]
    assert sum(weighted) / 5 != pytest.approx(merged["loss"], rel=1e-3)


EVERY = tuple(PREFERENCE_LOSSES)
EMPTY: dict[str, tuple[Any, dict[str, Any]]] = {
    "every loss": (preference, {"loss_type": EVERY, "label_smoothing": 0.1, "ld_alpha": 0.3}),
    "weighted": (preference, {"loss_type": ("ipo", "sigmoid_norm"), "use_weighting": True}),
    "orpo": (reference_free, {"loss_type": "orpo"}),
    "alphapo": (reference_free, {"loss_type": "simpo", "alpha": 0.25}),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_empty_completions_and_places_stay_finite(kind):
    """A pair with an empty completion, one with two, and micro-batches with empty places: value and gradient."""
    model, variables = tiny_model(**ONE_LAYER)
    method, settings = EMPTY[kind]
    config, none = method.Config(**settings), np.zeros(0, np.int32)
    examples = [PAIRS[1], {**PAIRS[2], "chosen_ids": none}, {**PAIRS[3], "chosen_ids": none, "rejected_ids": none}]
    batch = method.make_batch(config, examples, micro_batch_size=2, micro_batches=3)

    def compute(variables, batch):
        if method.needs_reference(config):
            batch = method.make_reference(config, model)(jax.tree.map(lambda x: 0.97 * x, variables), batch)
        loss, totals = method.make_loss(config, model), method.totals(batch)
        return accumulate(loss, totals, variables, {}, batch, jax.random.key(0))

    grads, metrics = jax.jit(compute)(variables, batch)
    assert np.isfinite(metrics["loss"].value())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert any(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(grads))


CLASHES = [
    (preference, {"loss_type": "sigmoud"}, r"loss_type 'sigmoud' is unknown; known: sigmoid, robust"),
    (preference, {"loss_type": ()}, "loss_type"),
    (preference, {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "loss_weights=.* must be 2 numbers"),
    (preference, {"loss_weights": (1.0, 2.0)}, "loss_weights=.* must be 1 numbers"),
    (preference, {"loss_type": "ipo", "label_smoothing": 0.1}, r"label_smoothing=0\.1 is not read here, only by"),
    (preference, {"loss_type": "exo_pair"}, r"label_smoothing=0\.0 must be in \(0, 0\.5\) with exo_pair"),
    (preference, {"label_smoothing": 0.5}, r"label_smoothing=0\.5 must be in \[0, 0\.5\)"),
    (preference, {"discopop_tau": 0.1}, r"discopop_tau=0\.1 is not read here, only by the loss discopop"),
    (preference, {"f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef=0.7 is not read"),
    (preference, {"f_divergence_type": "kl"}, "f_divergence_type 'kl' is unknown"),
    (preference, {"loss_type": ("sigmoid", "nca_pair"), "f_divergence_type": "js_divergence"}, "reverse_kl with nca_p"),
    (preference, {"ld_alpha": 1.5}, "ld_alpha"),
    (preference, {"use_weighting": True, "loss_type": "sft"}, "use_weighting=True must be false with sft"),
    (preference, {"ref_model_sync_steps": 3}, "ref_model_sync_steps=3 is not read here, only with sync_ref_model"),
    (preference, {"sync_ref_model": True, "precompute_ref_log_probs": True}, "sync_ref_model=True must be false with"),
    (preference, {"sync_ref_model": True, "ref_model_mixup_alpha": 0.0}, r"ref_model_mixup_alpha=0\.0 must be in"),
    (reference_free, {"loss_type": "dpo"}, "loss_type 'dpo' is unknown"),
    (reference_free, {"simpo_gamma": 1.0}, "simpo_gamma=1.0 is not read here, only by the loss simpo"),
    (reference_free, {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 is not read here"),
    (reference_free, {"loss_type": "orpo", "cpo_alpha": 0.0}, "cpo_alpha=0.0 is not read here"),
    (reference_free, {"loss_type": "orpo", "alpha": 0.1}, "alpha=0.1 is not read here"),
    (reference_free, {"beta": 0.0}, "beta"),
]


@pytest.mark.parametrize(("method", "settings", "message"), CLASHES)
def test_settings_that_clash(method, settings, message):
    with pytest.raises(ValueError, match=message):
        method.Config(**settings)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_method_names_and_survive_the_resolved_config(name):
    method, settings = PRESETS[name]
    config = parse_config({"model": {"path": "m"}, "data": {"path": "d"}, "method": {"name": name}})
    assert config.stages[0].method_name == method
    assert config.stages[0].method == METHODS[method].Config(**settings)
    assert parse_config(config.resolved).stages == config.stages


def test_a_preset_gives_way_to_what_is_set():
    raw = {"name": "mpo", "loss_type": ["robust", "sft"], "loss_weights": [1, 0.5], "label_smoothing": 0.2}
    stage = parse_config({"model": {"path": "m"}, "data": {"path": "d"}, "method": raw}).stages[0]
    assert stage.method == preference.Config(loss_type=("robust", "sft"), loss_weights=(1.0, 0.5), label_smoothing=0.2)
