"""Schedules, decay mask, clipping and AdamW against what transformers and torch compute, written out in numpy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.training import optimizer


def tree(seed: int, spread: float = 1.0) -> dict:
    """A stacked model in small: two layers in a segment, an embedding, a final norm."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(spread * rng.normal(size=shape), jnp.float32)

    return {
        "embed": {"embedding": draw(7, 4)},
        "segment_0": {
            "block_0": {
                "attention_norm": {"scale": draw(2, 4), "bias": draw(2, 4)},
                "attention": {"query": {"kernel": draw(2, 4, 2, 3), "bias": draw(2, 2, 3)}},
            }
        },
        "final_norm": {"scale": draw(4)},
    }


def clip(max_norm: float, grads: dict) -> Any:
    return optimizer.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())[0]


def train(config: optimizer.Config, num_steps: int, params: dict, grads_by_step: list) -> Any:
    transform, _ = optimizer.make_optimizer(config, num_steps)
    update = jax.jit(transform.update)
    state, now = transform.init(params), params
    for grads in grads_by_step:
        updates, state = update(grads, state, now)
        now = optax.apply_updates(now, updates)
    return now


def expected_factor(kind: str, step: int, warmup: int, steps: int) -> float:
    """transformers/optimization.py, the four lambdas."""
    if kind != "constant" and step < warmup:
        return step / max(1, warmup)
    if kind == "linear":
        return max(0.0, (steps - step) / max(1, steps - warmup))
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))
    return 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (4, 10), (10, 10), (15, 10), (1, 1), (100, 5000)])
def test_schedules_are_those_of_transformers(kind, warmup, steps):
    config = optimizer.Config(learning_rate=3e-4, lr_scheduler_type=kind, warmup_steps=warmup)
    schedule = jax.jit(optimizer.make_schedule(config, steps))
    for step in [*range(min(steps, 30)), steps - 1]:
        np.testing.assert_allclose(schedule(step), 3e-4 * expected_factor(kind, step, warmup, steps), rtol=1e-6, atol=0)


def test_linear_without_warmup_starts_at_the_peak_and_ends_at_zero():
    schedule = optimizer.make_schedule(optimizer.Config(learning_rate=2e-5), 4)
    np.testing.assert_allclose([float(schedule(i)) for i in range(5)], [2e-5, 1.5e-5, 1e-5, 5e-6, 0.0], rtol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 10])
def test_decaying_schedules_stay_at_zero_past_the_end(kind, warmup):
    schedule = optimizer.make_schedule(optimizer.Config(lr_scheduler_type=kind, warmup_steps=warmup), 10)
    assert [float(schedule(step)) for step in (10, 11, 50)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("steps", "ratio", "num_steps", "expected"), [(0, 0.1, 101, 11), (5, 0.5, 100, 5), (0, 0.0, 9, 0), (0, 1.0, 9, 9)]
)
def test_warmup_ratio_is_rounded_up_and_steps_go_first(steps, ratio, num_steps, expected):
    config = optimizer.Config(warmup_steps=steps, warmup_ratio=ratio)
    assert optimizer.warmup_length(config, num_steps) == expected


def test_decay_mask_leaves_out_norms_and_biases_even_when_stacked():
    mask = optimizer.decay_mask(tree(0))
    assert mask == {
        "embed": {"embedding": True},
        "segment_0": {
            "block_0": {
                "attention_norm": {"scale": False, "bias": False},
                "attention": {"query": {"kernel": True, "bias": False}},
            }
        },
        "final_norm": {"scale": False},
    }


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 1e-7, 1e3])
@pytest.mark.parametrize("spread", [1e-7, 0.01, 30.0])
def test_clipping_is_torch_clip_grad_norm(max_norm, spread):
    grads = tree(1, spread)
    flat = np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(grads)])
    factor = min(1.0, max_norm / (np.sqrt((flat**2).sum()) + 1e-6))
    clipped = clip(max_norm, grads)
    for got, grad in zip(jax.tree.leaves(clipped), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(got, factor * np.asarray(grad, np.float64), rtol=1e-6)


def test_clipping_keeps_dtypes_and_passes_nan_on():
    grads = {"a": jnp.full((3,), 4.0, jnp.bfloat16), "b": jnp.ones((2,))}
    clipped = clip(1.0, grads)
    assert clipped["a"].dtype == jnp.bfloat16
    bad = clip(1.0, {**grads, "b": jnp.array([jnp.nan, 1.0])})
    assert np.isnan(np.asarray(bad["a"], np.float32)).all()


def torch_adamw(params, grads_by_step, config, steps):
    """torch.optim.AdamW with clip_grad_norm_, float64."""
    flat, rebuild = jax.tree.flatten(params)
    decayed = jax.tree.leaves(optimizer.decay_mask(params))
    p = [np.asarray(x, np.float64) for x in flat]
    m, v = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for t, grads in enumerate(grads_by_step):
        g = [np.asarray(x, np.float64) for x in jax.tree.leaves(grads)]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        lr = config.learning_rate * expected_factor("cosine", t, config.warmup_steps, steps)
        for i in range(len(p)):
            clipped = g[i] * min(1.0, config.max_grad_norm / (norm + 1e-6))
            p[i] = p[i] * (1 - lr * config.weight_decay * decayed[i])
            m[i] = config.adam_beta1 * m[i] + (1 - config.adam_beta1) * clipped
            v[i] = config.adam_beta2 * v[i] + (1 - config.adam_beta2) * clipped**2
            scale = np.sqrt(v[i] / (1 - config.adam_beta2 ** (t + 1))) + config.adam_epsilon
            p[i] = p[i] - lr * m[i] / (1 - config.adam_beta1 ** (t + 1)) / scale
    return jax.tree.unflatten(rebuild, p)


def test_adamw_is_torch_adamw():
    config = optimizer.Config(
        learning_rate=0.05,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.3,
        adam_beta2=0.95,
        adam_epsilon=1e-3,
    )
    params, steps = tree(2), 8
    grads = [tree(10 + i, spread) for i, spread in enumerate([1.0, 0.01, 5.0, 1e-4, 1.0, 0.3, 2.0, 0.1])]
    got = train(config, steps, params, grads)
    expected = torch_adamw(params, grads, config, steps)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_the_place_of_epsilon_in_tensorflow():
    """A gradient of 1, b1 0.9, b2 0.999, epsilon 0.1: m 0.1, v 0.001, so that sqrt(1 - b2) is 0.0316228.

    The first update is 0.0316228 / 0.1 × 0.1 / (0.0316228 + 0.1) = 0.240253 (torch: 1 / 1.1). The second, of the
    gradient -1: m = 0.09 - 0.1 = -0.01, v = 0.000999 + 0.001 = 0.001999, whose root is 0.0447102, as is
    sqrt(1 - b2^2): 0.0447102 / 0.19 × -0.01 / 0.1447102 = -0.0162612. After thousands of steps the two are one.
    """
    config = optimizer.Config(name="adamw_tf", adam_epsilon=0.1, max_grad_norm=None, learning_rate=1.0)
    transform, other = (optimizer.OPTIMIZERS[name](config) for name in ("adamw_tf", "adamw"))
    params = {"kernel": jnp.zeros((), jnp.float32)}
    state, found = transform.init(params), []
    updates: Any
    first: Any
    for gradient in (1.0, -1.0):
        updates, state = transform.update({"kernel": jnp.float32(gradient)}, state, params)
        found.append(float(updates["kernel"]))
    assert found == pytest.approx([0.240253, -0.0162612], rel=1e-4)
    first, _ = other.update({"kernel": jnp.float32(1.0)}, other.init(params), params)
    assert float(first["kernel"]) == pytest.approx(1 / 1.1, rel=1e-5)
    assert isinstance(state, optax.ScaleByAdamState)
    late, both = state._replace(count=jnp.int32(20_000)), []
    for each in (transform, other):
        updates, _ = each.update({"kernel": jnp.float32(0.5)}, late, params)
        both.append(float(updates["kernel"]))
    assert both[0] == pytest.approx(both[1], rel=1e-5)


def test_first_update_with_warmup_changes_nothing_and_no_clipping_when_off():
    params, grads = tree(3), tree(4, 100.0)
    for max_norm in (0.0, None):
        config = optimizer.Config(warmup_steps=3, max_grad_norm=max_norm, weight_decay=0.1)
        transform, _ = optimizer.make_optimizer(config, 10)
        state = transform.init(params)
        updates, state = transform.update(grads, state, params)
        assert all(not np.asarray(x).any() for x in jax.tree.leaves(updates))
        moments = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))[0]
        np.testing.assert_allclose(moments.mu["final_norm"]["scale"], 0.1 * grads["final_norm"]["scale"], rtol=1e-6)


def adafactor_by_hand(param, grads, config, lr):
    """transformers' Adafactor (no factoring, no parameter scale) on one layer, float64."""
    p, v = np.asarray(param, np.float64), 0.0
    for t, grad in enumerate(grads):
        g = np.asarray(grad, np.float64)
        decay = 1 - (t + 1) ** -config.adafactor_decay_rate
        v = decay * v + (1 - decay) * (g**2 + 1e-30)
        update = g / np.sqrt(v)
        update /= max(1.0, np.sqrt((update**2).mean()) / config.adafactor_clip_threshold)
        p = p - lr * config.weight_decay * p - lr * update
    return p


def test_adafactor_clips_layer_by_layer_and_decays_times_the_learning_rate():
    config = optimizer.Config(
        name="adafactor",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        weight_decay=0.2,
        max_grad_norm=0,
        adafactor_clip_threshold=0.7,
    )
    params = tree(5)
    grads = [tree(20 + i, spread) for i, spread in enumerate([0.1, 10.0, 1.0])]
    got = train(config, 3, params, grads)

    def kernel(t):
        return t["segment_0"]["block_0"]["attention"]["query"]["kernel"]

    for layer in range(2):
        expected = adafactor_by_hand(kernel(params)[layer], [kernel(g)[layer] for g in grads], config, 0.1)
        np.testing.assert_allclose(kernel(got)[layer], expected, rtol=1e-4, atol=1e-6)
    expected = adafactor_by_hand(params["embed"]["embedding"], [g["embed"]["embedding"] for g in grads], config, 0.1)
    np.testing.assert_allclose(got["embed"]["embedding"], expected, rtol=1e-4, atol=1e-6)


def test_adafactor_factors_large_matrices_and_scales_by_the_parameter():
    config = optimizer.Config(name="adafactor", adafactor_min_dim_size_to_factor=4, adafactor_scale_parameter=True)
    params = {"kernel": jnp.full((8, 6), 3.0)}
    transform, _ = optimizer.make_optimizer(config, 3)
    assert sum(x.size for x in jax.tree.leaves(transform.init(params))) < params["kernel"].size
    got = train(config, 3, params, [{"kernel": jnp.ones((8, 6))}])
    np.testing.assert_allclose(got["kernel"] - 3.0, -2e-5 * 3.0, rtol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, "optimizer.name: 'adam' is unknown; choose one of adamw, adamw_tf, adafactor"),
        ({"lr_scheduler_type": "poly"}, "optimizer.lr_scheduler_type"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, r"optimizer\.warmup_steps: .*constant_with_warmup"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, r"optimizer\.warmup_ratio: .*constant_with_warmup"),
        ({"name": "adafactor", "adam_beta2": 0.95}, r"optimizer\.adam_beta2: adafactor does not read it"),
        ({"adafactor_scale_parameter": True}, r"optimizer\.adafactor_scale_parameter: adamw does not read it"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        optimizer.make_optimizer(optimizer.Config(**change), 10)


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="num_steps"):
        optimizer.make_optimizer(optimizer.Config(), 0)
