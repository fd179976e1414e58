"""The sampler's config: how an online stage draws, and what ends a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxalign import models, sampling

if TYPE_CHECKING:
    from jaxalign.run.prepare import Prepared


def sampling_config(ready: Prepared, **changes: Any) -> sampling.Config:
    """How an online stage draws.

    Raises:
      ValueError: a value out of range; names the key.
    """
    method, section = ready.stage.method, ready.stage.rollout
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens", "slots", "refill", "cache_dtype")
    keys = ("rollout.stop_token_ids", "rollout.stop_sequences")
    ends = ends_of(ready.model.config, ready.data.tokenizer, section.stop_token_ids, section.stop_sequences, keys)
    return sampling.Config(
        **{
            **{name: getattr(section, name) for name in names},
            "temperature": method.temperature,
            "max_new_tokens": method.max_completion_length,
            "num_generations": method.num_generations,
            **ends,
            **changes,
        }
    )


def ends_of(
    config: models.ModelConfig,
    tokenizer: Any,
    token_ids: Sequence[int],
    sequences: Sequence[str | Sequence[int]],
    names: tuple[str, str],
) -> dict[str, Any]:
    """`eos_ids` and `stop_sequences` of the sampler's config: what ends a completion inside the loop.

    Args:
      config: the model's.
      tokenizer: a transformers tokenizer; without one (a plan has none) sequences that are texts are left out.
      token_ids: ids that end a completion besides the model's own.
      sequences: token ids, or texts, which are tokenised as they stand.
      names: what the user calls these two.

    Raises:
      ValueError: an id that the model does not have, or a sequence without tokens.
    """
    found = []
    for each in sequences:
        if isinstance(each, str):
            if tokenizer is None:
                continue
            each = tokenizer(each, add_special_tokens=False)["input_ids"]
        if not each:
            raise ValueError(f"{names[1]}: a sequence has no tokens; it would end every completion at once")
        found.append(tuple(each))
    for name, ids in ((names[0], token_ids), (names[1], [id for each in found for id in each])):
        if unknown := [id for id in ids if not 0 <= id < config.vocab_size]:
            raise ValueError(
                f"{name}: {unknown[0]} is no token id of the model, which has 0 to {config.vocab_size - 1}"
            )
    own = models.end_ids(config, tokenizer)
    return {"eos_ids": tuple(dict.fromkeys([*own, *token_ids])), "stop_sequences": tuple(dict.fromkeys(found))}
