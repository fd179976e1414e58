"""The score head: a causal model turned into a reward or value model, and how Hugging Face's configs name one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxalign.models.config import ModelConfig
from jaxalign.types import Variables

if TYPE_CHECKING:
    from jaxalign.models.transformer import Model


CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")  # of texts, of tokens
# Families of which transformers has a class `...ForTokenClassification` with the head `score` and a bias.
TOKEN_CLASSIFIERS = {
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "phi", "phi3"),
    *("smollm3", "starcoder2", "stablelm", "glm", "glm4", "exaone4", "deepseek_v3", "gpt_oss"),
}


def add_score_head(
    model: Model,
    variables: Variables,
    key: jax.Array,
    *,
    std: float | None = None,
    keep_lm_head: bool = False,
    labels: int = 1,
) -> tuple[Model, Variables]:
    """A language model as a scorer: one number per hidden state, see `Model.scores`.

    Args:
      model: with an LM head.
      variables: its variables; the result shares their arrays.
      key: of the new head's draw.
      std: standard deviation of the head, by default `1 / sqrt(embed_dim + 1)`, which suits a reward model; 0 for a
        value model, whose first values then are 0. Source: Ziegler et al., arXiv 1909.08593, their code.
      keep_lm_head: keep the LM head beside it (a policy that shares its blocks with its value model); else an LM head
        of its own (not tied) is left out.
      labels: outputs of the head, see `ModelConfig.score_labels`.

    Returns:
      The model, in the same dtypes, and its variables: the head is `params["score"]["kernel"]`, `[embed_dim, labels]`,
      with two labels beside a `bias`, `[labels]`, of zeros.

    Raises:
      ValueError: the model has a score head; or two labels, and transformers has no such class of the family.
    """
    scorer = model.rebuild(score_config(model.config, keep_lm_head=keep_lm_head, labels=labels))
    params = {name: leaf for name, leaf in variables["params"].items() if keep_lm_head or name != "head"}
    dtype = params["embed"]["embedding"].dtype
    head = init_score_head(key, scorer.config, std=std, dtype=dtype)
    return scorer, {**variables, "params": {**params, "score": head}}


def drop_score_head(model: Model, variables: Variables) -> tuple[Model, Variables]:
    """The language model of one with both heads.

    Raises:
      ValueError: there is no LM head.
    """
    if not model.config.lm_head:
        raise ValueError("this reward or value model has no LM head to keep")
    params = {name: leaf for name, leaf in variables["params"].items() if name != "score"}
    config = replace(model.config, score_head=False, score_labels=1, score_bias=0.0)
    return model.rebuild(config), {**variables, "params": params}


def drop_lm_head(model: Model, variables: Variables) -> tuple[Model, Variables]:
    """The reward or value model of one with both heads.

    Raises:
      ValueError: there is no score head.
    """
    if not model.config.score_head:
        raise ValueError("this language model has no score head to keep")

    def keep(tree: Any) -> Any:
        return {name: part for name, part in tree.items() if name != "head"}

    parts = {kind: keep(tree) if kind in ("params", "frozen") else tree for kind, tree in variables.items()}
    return model.rebuild(replace(model.config, lm_head=False)), parts


def score_config(config: ModelConfig, *, keep_lm_head: bool = False, labels: int = 1) -> ModelConfig:
    """The config that `add_score_head` gives a model of this one; errors as there."""
    if config.score_head:
        raise ValueError("the model has a score head already")
    if labels == 2 and config.family not in TOKEN_CLASSIFIERS:
        raise ValueError(
            f"transformers has no token classifier of the family {config.family!r}, which a head with two labels is "
            "exported as; take a model of another family"
        )
    # transformers would read the score before EOS if that were the padding token, see `identity.with_padding`.
    pad = None if config.pad_id in config.eos_ids and not keep_lm_head else config.pad_id
    lm_head = config.lm_head and keep_lm_head
    return replace(config, lm_head=lm_head, score_head=True, score_labels=labels, score_bias=0.0, pad_id=pad)


def init_score_head(
    key: jax.Array, config: ModelConfig, *, std: float | None = None, dtype: Any = "float32"
) -> dict[str, jax.Array]:
    """A score head: its kernel normal with standard deviation `std`, by default `1 / sqrt(embed_dim + 1)`."""
    shape = (config.embed_dim, config.score_labels)
    scale = 1 / math.sqrt(config.embed_dim + 1) if std is None else std
    kernel = (scale * jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32))).astype(dtype)
    return {"kernel": kernel} | ({"bias": jnp.zeros(shape[1:], dtype)} if config.score_labels == 2 else {})


def rescale_scores(config: ModelConfig, params: Any, mean: float, std: float) -> tuple[ModelConfig, Any]:
    """Scores `(s - mean) / std`: the gain goes into the head, the rest into `ModelConfig.score_bias`.

    Args:
      config: of a model with a score head.
      params: its parameters, `variables["params"]`.
      mean: of the scores as they are.
      std: their standard deviation.

    Raises:
      ValueError: `std` is not above 0, or the head has two labels.
    """
    if config.score_labels != 1:
        raise ValueError("log-odds of steps are not rescaled: they would be odds of nothing")
    if not std > 0:
        raise ValueError(f"scores with a standard deviation of {std} cannot be brought to 1: they are all the same")
    kernel = params["score"]["kernel"]
    scaled = {**params, "score": {"kernel": (kernel / std).astype(kernel.dtype)}}
    return replace(config, score_bias=(config.score_bias - mean) / std), scaled


def read_heads(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Which heads there are, as fields of `ModelConfig`, by the class that a config.json names.

    Raises:
      ValueError: a classifier of texts with more labels than one, or of tokens with other than two, or without bias.
    """
    named = [name for name in hf.get("architectures") or () if name.endswith(CLASSIFIERS)]
    if not named:
        return {}
    # Where both keys are missing there are two labels: transformers' default, which it does not write.
    labels = len(hf["id2label"]) if hf.get("id2label") is not None else hf.get("num_labels", 2)
    if named[0].endswith(CLASSIFIERS[1]):
        if labels != 2 or not hf.get("token_classification_bias", True):
            raise ValueError(
                f"config.json: {named[0]} has num_labels={labels}; a process reward model judges steps right or wrong "
                "(num_labels=2) and its head has a bias"
            )
        return {"lm_head": False, "score_head": True, "score_labels": 2}
    if labels != 1:
        raise ValueError(
            f"config.json: {named[0]} has num_labels={labels}; a reward model gives one score per text (num_labels=1)"
        )
    return {"lm_head": False, "score_head": True, "score_bias": float(hf.get("score_bias", 0.0))}


def write_heads(config: ModelConfig, architecture: str, classifier: str) -> dict[str, Any]:
    """The inverse of `read_heads`.

    Args:
      config: the model.
      architecture: transformers' class of the family with an LM head.
      classifier: its class with a score head.

    Raises:
      ValueError: both heads; no class of transformers has both.
    """
    if not config.score_head:
        return {"architectures": [architecture]}
    if config.lm_head:
        raise ValueError(
            "transformers has no model with both an LM head and a score head: export the language model alone "
            "(models.drop_score_head)"
        )
    if config.score_labels == 2:
        names = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
        return {
            "architectures": [classifier.replace(*CLASSIFIERS)],
            "num_labels": 2,
            **names,
            "classifier_dropout": 0.0,
        }
    # transformers knows no bias: its scores come without it, which ranks alike.
    bias = {"score_bias": config.score_bias} if config.score_bias else {}
    labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {"architectures": [classifier], **labels, **bias}
