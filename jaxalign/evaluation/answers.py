"""What a model answers, and how that changed: the part of a result that a person can judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import jax
import numpy as np

from jaxalign.evaluation.rules import RULES, mentions
from jaxalign.models import Model
from jaxalign.sampling import Config, make_decoding, make_generate, sample_prompts, truncate_at
from jaxalign.types import Samples, Variables


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> Any:
        """Token ids as text."""
        ...


Answer = Callable[[Variables, Sequence[Sequence[int]]], list[str]]


def make_answer(model: Model, tokenizer: Decoder, config: Config, *, seed: int = 0, stop: Sequence[str] = ()) -> Answer:
    """`(variables, prompts) -> texts`; compiled programs are kept for the next call.

    Args:
      model: the model.
      tokenizer: turns ids into text.
      config: how answers are drawn.
      seed: of the draw.
      stop: strings that cut a text.
    """
    generate, decoding = jax.jit(make_generate(model, config)), make_decoding(model)

    def answer(variables: Variables, prompts: Sequence[Sequence[int]]) -> list[str]:
        samples = sample_prompts(generate, decoding(variables), prompts, jax.random.key(seed))
        return texts(tokenizer, samples, stop)

    return answer


def texts(tokenizer: Decoder, samples: Samples, stop: Sequence[str] = ()) -> list[str]:
    """Samples as text, special tokens and what follows a stop string removed."""
    tokens, lengths = np.asarray(samples.tokens), np.asarray(samples.lengths)
    decoded = (
        tokenizer.decode(row[:n].tolist(), skip_special_tokens=True) for row, n in zip(tokens, lengths, strict=True)
    )
    return [truncate_at(text, stop).strip() for text in decoded]


@dataclass(frozen=True)
class Side:
    """Answers of one model.

    Attributes:
      answers: one per prompt.
      rules: share of the answers that satisfy each rule.
      right: share of the answers that mention what a right answer must, or None without keywords.
      mean_words: mean number of words.
    """

    answers: tuple[str, ...]
    rules: dict[str, float]
    right: float | None
    mean_words: float


@dataclass(frozen=True)
class Comparison:
    """Two models' answers to the same prompts.

    Attributes:
      prompts: as a person reads them.
      before: the model that the run started from.
      after: the model that it ended with.
    """

    prompts: tuple[str, ...]
    before: Side
    after: Side

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        return asdict(self)


def check_rules(rules: Sequence[str]) -> None:
    """Raises ValueError for a rule that is not in `RULES`."""
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown:
        raise ValueError(f"compare.rules: {unknown[0]!r} is unknown; known: {', '.join(RULES)}")


def judge(answers: Sequence[str], rules: Sequence[str], keywords: Sequence[Any | None]) -> Side:
    """Measures answers.

    Args:
      answers: texts.
      rules: names in `RULES`.
      keywords: per answer the groups of words of which one each must occur, or None.
    """
    checked = [mentions(text, words) for text, words in zip(answers, keywords, strict=True) if words]
    return Side(
        answers=tuple(answers),
        rules={rule: float(np.mean([RULES[rule](text) for text in answers])) for rule in rules},
        right=float(np.mean(checked)) if checked else None,
        mean_words=float(np.mean([len(text.split()) for text in answers])),
    )


def readable(prompt: Any) -> str:
    """A prompt as a person reads it: the last message of a conversation, or the text itself."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
