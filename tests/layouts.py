"""Small models and ragged examples on which layouts are compared."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models import ModelConfig, Rope, build
from jaxalign.models.config import DType

VOCAB = 97


# A dense layer and two sparse ones, with a shared expert: changes for `tiny_model`.
SPARSE = {
    "num_layers": 3,
    "windows": (None, 9, 9),
    "sparse_layers": (False, True, True),
    "num_experts": 8,
    "experts_per_token": 2,
    "expert_mlp_dim": 24,
    "shared_mlp_dim": 16,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.1,
}


def tiny_config(**changes) -> ModelConfig:
    """Numbers that differ when anything is wrong: grouped heads, qk-norm, windows that bite, an untied head."""
    settings = {
        "family": "qwen3",
        "vocab_size": VOCAB,
        "embed_dim": 32,
        "num_layers": 5,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mlp_dim": 64,
        "max_position": 512,
        "rope": Rope(1000.0),
        "windows": (None, 9, None, 9, 9),
        "qk_norm": True,
        "qkv_bias": True,
    }
    return ModelConfig(**{**settings, **changes})


def tiny_model(seed: int = 0, *, dtype: DType = "float32", spread: float = 10.0, **changes):
    """A model and variables with a logit spread of about 1 or more, norms and biases away from their defaults."""
    model, variables = _drawn(seed, dtype, spread, tuple(sorted(changes.items())))
    return model, jax.tree.map(lambda leaf: leaf, variables)  # dicts of its own


@cache
def _drawn(seed: int, dtype: DType, spread: float, changes: tuple[tuple[str, Any], ...]):
    """By numpy, and once for each set of changes: `Model.init` takes longer to compile than most tests."""
    model = build(tiny_config(**dict(changes)), param_dtype=dtype, compute_dtype=dtype)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise, name = rng.standard_normal(leaf.shape), path[-1].key
        if name in ("kernel", "embedding"):
            size = leaf.shape[0] ** -0.5 if path[-2].key == "score" else 0.02
            return jnp.asarray(spread * size * noise, leaf.dtype)
        mean = name == "scale" and not model.config.norm_plus_one
        return jnp.asarray(mean + 0.2 * noise, leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def ragged_pairs(count: int, seed: int = 0, prompt: int = 40, completion: int = 30) -> list[dict[str, np.ndarray]]:
    """Preference pairs of very different lengths, single-token completions among them."""
    rng = np.random.default_rng(seed)

    def ids(longest):
        return rng.integers(1, VOCAB, 1 + int(longest * rng.random() ** 2)).astype(np.int32)

    pairs = [
        {"prompt_ids": ids(prompt), "chosen_ids": ids(completion), "rejected_ids": ids(completion)}
        for _ in range(count)
    ]
    pairs[0]["chosen_ids"] = pairs[0]["chosen_ids"][:1]
    return pairs


def ragged_thumbs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Completions with labels, of very different lengths; the first three desirable, of the others every second."""
    rng = np.random.default_rng(seed)

    def ids(longest):
        return rng.integers(1, VOCAB, 1 + int(longest * rng.random() ** 2)).astype(np.int32)

    return [{"prompt_ids": ids(40), "completion_ids": ids(30), "label": i < 3 or i % 2 == 0} for i in range(count)]


def ragged_rankings(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """2 to 7 ranked completions per prompt, of very different lengths, with ties and margins; a single pair first."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        k = 2 if i == 0 else int(rng.integers(2, 8))
        sizes = 1 + (20 * rng.random(k) ** 2).astype(np.int32)
        ranks = rng.integers(0, 4, k).astype(np.int32)
        ranks[:2] = rng.permutation([0, 3])  # at least one pair
        examples.append(
            {
                "prompt_ids": rng.integers(1, VOCAB, 1 + int(30 * rng.random())).astype(np.int32),
                "completion_ids": rng.integers(1, VOCAB, int(sizes.sum())).astype(np.int32),
                "sizes": sizes,
                "ranks": ranks,
                "margins": rng.random(k).astype(np.float32),
            }
        )
    return examples


def ragged_texts(count: int, seed: int = 0, longest: int = 60) -> list[dict[str, np.ndarray]]:
    """Texts with several stretches of targets, as multi-turn chats have."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        ids = rng.integers(1, VOCAB, 3 + int(longest * rng.random())).astype(np.int32)
        mask = np.repeat(rng.random(len(ids) // 3 + 1) < 0.6, 3)[: len(ids)]
        mask[-1] = True
        examples.append({"input_ids": ids, "loss_mask": mask})
    return examples


def ragged_steps(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """1 to 6 steps of 1 to 15 tokens, separators of 2 tokens, labels of both kinds."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        sizes = 2 + rng.integers(1, 16, rng.integers(1, 7))
        examples.append(
            {
                "prompt_ids": rng.integers(1, VOCAB, rng.integers(1, 30)).astype(np.int32),
                "completion_ids": rng.integers(1, VOCAB, sizes.sum()).astype(np.int32),
                "ends": (np.cumsum(sizes) - 1).astype(np.int32),
                "labels": (rng.random(len(sizes)) < 0.6).astype(np.int32),
            }
        )
    return examples


def flat(tree) -> np.ndarray:
    """All leaves in one float64 vector."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def relative(a, b) -> float:
    """Distance of two trees over the norm of the second."""
    a, b = flat(a), flat(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
