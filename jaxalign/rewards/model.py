"""Scores of whole texts from a reward model: ours, or anybody's `AutoModelForSequenceClassification` folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.models import Model, ModelConfig
from jaxalign.placing import first_fit
from jaxalign.sharding import batch_shardings, data_shards, replicated
from jaxalign.types import Array, Predictions, TokenRows, Variables

CALL_TOKENS = 16_384
Scorer = Callable[[Sequence[Sequence[int] | np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Call:
    """Texts that go through the model together.

    Attributes:
      rows: int32 `[1, rows, length]` each; the last rows may be padding.
      sources: int32 `[1, rows, most]`, index in its row of each text's last token.
      texts: int64 `[rows, most]`, the text's number; -1 = none.
    """

    rows: TokenRows
    sources: np.ndarray
    texts: np.ndarray


def make_scorer(
    model: Model, variables: Variables, *, mesh: Mesh | None = None, call_tokens: int = CALL_TOKENS
) -> Scorer:
    """A function that scores token sequences, prompt and completion together, with a reward model.

    A score is read where transformers reads it: at the last token that is not `model.config.pad_id`. Texts are packed
    into rows of few different shapes, so that few programs compile.

    Args:
      model: with a score head.
      variables: its variables; on `mesh`, if there is one.
      mesh: whose data axes split the rows. On several processes, all call the scorer with the same texts.
      call_tokens: tokens that go through the model at once (a longer text alone).

    Returns:
      `texts -> float32 [texts]`. It raises ValueError for a text without tokens, or with more than the model's context,
      and names its number.
    """
    config, shards = model.config, 1 if mesh is None else data_shards(mesh)
    run = make_reader(model, mesh)

    def score(texts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        kept = [_until_read(config, number, text) for number, text in enumerate(texts)]
        scores = np.zeros(len(kept), np.float32)
        if not kept:
            return scores
        calls = pack_texts(kept, call_tokens, shards)
        parts = ((call.rows, call.sources) for call in calls)
        found = [run(variables, *(part if mesh is None else _place(mesh, part))) for part in parts]
        for call, values in zip(calls, found, strict=True):
            scores[call.texts[call.texts >= 0]] = np.asarray(values)[call.texts >= 0]
        return scores

    return score


def make_reader(model: Model, mesh: Mesh | None = None) -> Any:
    """`(variables, rows, sources) -> float32 [rows, texts]`, jitted: the scores of a `Call`; see `make_scorer`."""
    config = model.config
    if config.score_labels != 1:
        raise ValueError("this is a process reward model, which judges steps and no whole text")
    if not config.score_head:
        raise ValueError("this model has no score head: give a reward model, or models.add_score_head and train it")

    def read(variables: Variables, rows: TokenRows, sources: Array) -> jax.Array:
        rows, sources = jax.tree.map(lambda x: x[0], (rows, sources))
        hidden, _, _ = model.apply(variables, rows)
        asked = Predictions(*[jnp.asarray(sources)] * 4)  # of which the score head reads the sources alone
        return model.predict(lambda own, states, _: model.scores(own, states), variables, hidden, asked)

    return jax.jit(read, out_shardings=None if mesh is None else replicated(mesh))


def pack_texts(texts: Sequence[np.ndarray], call_tokens: int, shards: int = 1) -> list[Call]:
    """Packs texts (at least one) into rows, first-fit decreasing, and the rows into calls.

    All calls have rows of one length, and all but the last as many of them as `call_tokens` allows; the last is rounded
    up to a power of two. Rows per call are a multiple of `shards`.
    """
    length = _round_up(max(map(len, texts)), 64)
    placed = first_fit([len(text) for text in texts], length)
    most_rows = max(call_tokens // length // shards, 1) * shards
    most_texts = _power_of_two(max(map(len, placed)), 4)
    calls = []
    for start in range(0, len(placed), most_rows):
        members = placed[start : start + most_rows]
        rows = min(_power_of_two(-(-len(members) // shards)) * shards, most_rows)
        calls.append(_lay_out(texts, members, rows, length, most_texts))
    return calls


def _lay_out(
    texts: Sequence[np.ndarray], placed: Sequence[Sequence[int]], rows: int, length: int, most_texts: int
) -> Call:
    tokens, positions, documents = (np.zeros((rows, length), np.int32) for _ in range(3))
    sources, numbers = np.zeros((rows, most_texts), np.int32), np.full((rows, most_texts), -1, np.int64)
    for row, members in enumerate(placed):
        end = 0
        for place, number in enumerate(members):
            start, end = end, end + len(texts[number])
            tokens[row, start:end], positions[row, start:end] = texts[number], np.arange(end - start)
            documents[row, start:end] = place + 1
            sources[row, place], numbers[row, place] = end - 1, number
    packed = TokenRows(tokens[None], positions[None], documents[None], np.zeros_like(tokens)[None])
    return Call(packed, sources[None], numbers)


def _power_of_two(n: int, least: int = 1) -> int:
    return max(1 << (n - 1).bit_length(), least)


def _round_up(n: int, least: int) -> int:
    """The smallest of 1, 1.5, 2, 3, 4, 6, 8, ... times `least` that is >= n."""
    above = _power_of_two(n, least)
    return above * 3 // 4 if above > least and n <= above * 3 // 4 else above


def check_same_tokenizer(policy: Any, reward: Any) -> None:
    """Checks that the token ids of a policy mean the same to a reward model.

    Args:
      policy: the policy's transformers tokenizer.
      reward: the reward model's.

    Raises:
      ValueError: another vocabulary, BOS or EOS; says where they differ and what to do.
    """
    ours, theirs = policy.get_vocab(), reward.get_vocab()
    other = sorted(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
    problems = []
    if other:
        token = other[0]
        shown = (
            f"{token!r} is {ours.get(token, 'absent')} in the policy's and {theirs.get(token, 'absent')} in the other"
        )
        problems.append(f"{len(other)} of {len(ours)} tokens, for example {shown}")
    for name in ("bos_token", "eos_token"):
        mine, its = getattr(policy, name), getattr(reward, name)
        if mine != its:
            problems.append(f"{name} is {mine!r} in the policy's and {its!r} in the other")
    if problems:
        raise ValueError(
            f"the reward model has another tokenizer than the policy: {'; '.join(problems)}. Its scores of the "
            "policy's tokens would mean nothing. Take a reward model with the policy's tokenizer (the method `reward` "
            "trains one from the policy's own checkpoint), or score texts with a reward function"
        )


def _until_read(config: ModelConfig, number: int, text: Sequence[int] | np.ndarray) -> np.ndarray:
    """A text up to the token whose hidden state is scored; what comes after it changes nothing."""
    ids = np.asarray(text, np.int32)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"text {number} has no tokens; a score needs at least one")
    if config.pad_id is not None:
        real = np.flatnonzero(ids != config.pad_id)
        ids = ids[: real[-1] + 1 if len(real) else 1]
    if len(ids) > config.max_position:
        raise ValueError(f"text {number} has {len(ids)} tokens, more than the model's context of {config.max_position}")
    return ids


def _place(mesh: Mesh, part: Any) -> Any:
    """Host arrays that every process has, split over the mesh."""

    def place(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, part, batch_shardings(mesh, part))
