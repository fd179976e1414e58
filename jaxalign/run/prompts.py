"""Prompts to be completed: from a file, with the columns that came with them, or a single text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import data

Row = dict[str, Any]
UNLIMITED = np.iinfo(np.int32).max  # the model's context decides, in `check_room`
SHOWN = 5


@dataclass(frozen=True)
class Prompts:
    """What is to be completed.

    Attributes:
      rows: as found: `prompt`, text or messages, and whatever columns stand beside it.
      ids: the prompts' tokens.
      places: where each stands, as errors say it.
    """

    rows: tuple[Row, ...]
    ids: tuple[list[int], ...]
    places: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns beside the prompt, those of some rows among them."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row if name != "prompt"))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.ids))


def read_prompts(tokenizer: Any, path: str | Path) -> Prompts:
    """The rows of a file with a `prompt` column, text or messages.

    Args:
      tokenizer: the model's.
      path: whatever `DataConfig.path` may be.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no rows, or no `prompt` column; rows that cannot be used, by file and line.
    """
    examples = data.inspect(data.DataConfig(path=str(path), max_length=UNLIMITED), tokenizer, "prompt").train
    _refuse([str(problem) for problem in data.problems(examples)], len(examples), "cannot be used")
    numbers = range(len(examples))
    return Prompts(
        rows=tuple(examples.row(i) for i in numbers),
        ids=tuple(examples[i]["prompt_ids"].tolist() for i in numbers),
        places=tuple("{}:{}".format(*examples.where(i)) for i in numbers),
    )


def one_prompt(tokenizer: Any, prompt: str, *, system: str | None = None, raw: bool = False) -> Prompts:
    """A single prompt: the user's message, where the tokenizer has a chat template, else text.

    Args:
      tokenizer: the model's.
      prompt: the text.
      system: a system message before it.
      raw: text in any case.

    Raises:
      ValueError: a system message without a chat template; a prompt without tokens.
    """
    asked: Any = prompt
    if not raw and tokenizer.chat_template:
        asked = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
    elif system:
        raise ValueError("--system needs a chat template, and this prompt is continued as plain text")
    encoded = data.encode(tokenizer, {"prompt": asked}, "prompt", data.DataConfig(path="", max_length=UNLIMITED))
    return Prompts(({"prompt": asked},), (encoded["prompt_ids"].tolist(),), ("--prompt",))


def check_room(prompts: Prompts, context: int, max_new_tokens: int) -> None:
    """Raises ValueError, naming file and line, where prompt and completion may not fit the model's context."""
    room = context - max_new_tokens
    if room < 1:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in the model's context of {context} tokens"
        )
    told = [
        f"{place}: the prompt has {len(ids)} tokens; the model's context of {context} leaves it {room} beside "
        f"--max-new-tokens {max_new_tokens}"
        for place, ids in zip(prompts.places, prompts.ids, strict=True)
        if len(ids) > room
    ]
    _refuse(told, len(prompts.ids), "are too long")


def _refuse(problems: Sequence[str], total: int, what: str) -> None:
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(f"{len(problems)} of {total} prompts {what}:{listed}{more}")
