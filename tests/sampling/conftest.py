"""A small model that is neither flat nor peaked, prompts of ragged lengths, and how draws are compared."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import ModelConfig, Rope, build
from jaxalign.sampling import Config, make_decoding
from jaxalign.sampling.logits import perturb, scale, truncate
from jaxalign.types import TokenRows

CONFIG = ModelConfig(
    family="qwen2",
    vocab_size=97,
    embed_dim=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    mlp_dim=80,
    max_position=512,
    rope=Rope(theta=1000.0),
    windows=(7, None, 7, None),
    qkv_bias=True,
)


def spread(shapes, rng):
    """Random leaves large enough that logits differ by more than 1 and every part of a block matters."""

    def draw(path, leaf):
        if path[-1].key == "scale":
            return (1 + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32)
        return (0.2 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def small():
    """The small model, its variables, as the sampler takes them too, and 10 prompts of 1 to 23 tokens."""
    model, rng = build(CONFIG), np.random.default_rng(2)
    variables = spread(jax.eval_shape(model.init, jax.random.key(0)), rng)
    sizes = [1, 23, 5, 16, 2, 9, 17, 12, 3, 20]
    prompts = [rng.integers(1, CONFIG.vocab_size, size).astype(np.int32) for size in sizes]
    rows = TokenRows.from_padded(prompts[1][None], np.ones((1, 23), np.int32))
    logits = jax.jit(lambda v: model.logits(v, model.apply(v, rows)[0]))(variables)
    assert 1 < np.asarray(logits).std(-1).min() < np.asarray(logits).std(-1).max() < 5
    return SimpleNamespace(
        model=model,
        narrow=build(CONFIG, compute_dtype="bfloat16"),
        variables=variables,
        decoding=make_decoding(model)(variables),
        prompts=prompts,
    )


@pytest.fixture(scope="session")
def pad():
    """`(prompts, width) -> (padded [n, width], lengths [n])`."""

    def pad(prompts, width=32):
        padded = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        return padded, np.array([len(prompt) for prompt in prompts], np.int32)

    return pad


@pytest.fixture(scope="session")
def redraw():
    """Draws every token of one completion anew from a forward pass without cache, batch mates or padding.

    `(model, variables, config, prompt, completion, completion_key) -> (tokens, margins, boundaries)`: per step the
    best token, how far the two best perturbed logits lie apart, and how near truncation came to another set: the gap
    between kept and dropped log-probs and, under top-p, between any cumulative mass and its bound.
    """

    @partial(jax.jit, static_argnums=(0, 2))
    def forward(model, variables, config, rows, sources, key):
        hidden, _, _ = model.apply(variables, rows)
        log_probs = scale(model.logits(variables, hidden[0, sources]), config.temperature)
        kept, _ = truncate(log_probs, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(sources)))
        return log_probs, kept, *jax.lax.top_k(perturb(log_probs, kept, keys), 2)

    def redraw(model, variables, config: Config, prompt, completion, key):
        count, row = len(completion), np.zeros((1, 64), np.int32)
        row[0, : len(prompt) + count] = np.concatenate([prompt, completion])
        rows = TokenRows.from_padded(row, np.arange(64)[None] < len(prompt) + count)
        sources = np.minimum(len(prompt) - 1 + np.arange(config.max_new_tokens), 63)
        drawn = jax.device_get(forward(model, variables, config, rows, sources, key))
        log_probs, kept, best, ids = (x[:count] for x in drawn)
        return ids[:, 0], best[:, 0] - best[:, 1], _boundaries(config, log_probs, kept)

    return redraw


def _boundaries(config, log_probs, kept):
    least = np.where(kept, log_probs, np.inf).min(-1)
    apart = least - np.where(kept, -np.inf, log_probs).max(-1)
    if config.top_p < 1:
        ordered = np.sort(np.exp(log_probs.astype(np.float64)), axis=-1)[:, ::-1]
        if config.top_k:
            ordered = ordered[:, : config.top_k] / ordered[:, : config.top_k].sum(-1, keepdims=True)
        apart = np.minimum(apart, np.abs(ordered.cumsum(-1) - config.top_p).min(-1))
    return apart


@pytest.fixture(scope="session")
def assert_same_draws(redraw):
    """Guarantee 2, as worded: two runs of one completion may part only at a near tie.

    `(model, variables, config, prompt, key, one, other)` with one and other its tokens; returns where they part.
    """

    def check(model, variables, config, prompt, key, one, other):
        shared = min(len(one), len(other))
        parted = np.flatnonzero(one[:shared] != other[:shared])
        if len(parted) == 0:
            assert len(one) == len(other)
            return None
        first = int(parted[0])
        _, margins, boundaries = redraw(model, variables, config, prompt, one[: first + 1], key)
        assert margins[first] < 1e-3 or boundaries[first] < 1e-4, (first, margins[first], boundaries[first])
        return first

    return check
