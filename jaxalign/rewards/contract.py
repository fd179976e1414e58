"""What a reward is: a function of a batch of completions, with its name, its options and the columns that it reads."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Text = str | Sequence[Mapping[str, Any]]
"""A prompt or completion: text, or a list of messages."""
Scores = Sequence[float | Exception | None]
"""One score per completion; None where there is none to give, an exception where this completion's scoring failed."""
RewardFunction = Callable[..., Scores | Awaitable[Scores]]

_GIVEN = ("prompts", "completions")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class RewardError(RuntimeError):
    """A reward function failed, or returned what is no score; names the function and the sample."""


@dataclass(frozen=True)
class Reward:
    """A reward function made ready; calling it is calling the function, so that other trainers take it too.

    Attributes:
      name: in metrics and errors.
      function: `(prompts, completions, **columns) -> scores`, or the same as `async def`.
      options: hyper-parameters, passed by keyword.
      reads: columns that the function needs without naming them in its signature.
      longest: of a function that ends its own work in time: the seconds that it takes at most for so many completions.
        The time limit of a call is never less than that.
    """

    name: str
    function: RewardFunction
    options: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    longest: Callable[[int], float] | None = None

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Sequence[Any]) -> Any:
        """The function's scores, or an awaitable of them; raises ValueError for a missing column."""
        self.check_columns(columns)
        given = {"prompts": prompts, "completions": completions, **columns}
        return self.function(**{**{name: given[name] for name in self._taken(given)}, **self.options})

    @property
    def is_async(self) -> bool:
        """Whether the function is an `async def`."""
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(type(self.function).__call__)

    def required(self) -> tuple[str, ...]:
        """Names of the columns without which the function cannot be called."""
        named = [
            name
            for name, parameter in parameters(self.function).items()
            if parameter.default is inspect.Parameter.empty and name not in _GIVEN and name not in self.options
        ]
        return (*named, *(name for name in self.reads if name not in named))

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises ValueError when a column that the function needs is not among these."""
        missing = [name for name in self.required() if name not in columns]
        if missing:
            known = ", ".join(sorted(columns)) or "none"
            raise ValueError(f"reward {self.name!r} needs the column {missing[0]!r}; there are: {known}")

    def _taken(self, given: Collection[str]) -> list[str]:
        """Of what is given, what the function takes: a keyword-only parameter with a default is never a column."""
        known = parameters(self.function)
        free = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(self.function).parameters.values())
        options = {n for n, p in known.items() if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
        return [name for name in given if (free or name in known) and name not in options and name not in self.options]


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function that can be passed by keyword."""
    return {name: p for name, p in inspect.signature(function).parameters.items() if p.kind in _NAMED}


def option_names(function: Callable[..., Any]) -> list[str]:
    """Parameters that can be options: those with a default, and those that can only be passed by keyword."""
    return [
        name
        for name, p in parameters(function).items()
        if name not in (*_GIVEN, "completion_ids") and (p.default is not p.empty or p.kind is p.KEYWORD_ONLY)
    ]


def text_of(message: Text) -> str:
    """The text of a prompt or completion: of a conversation, that of its last message."""
    if isinstance(message, str):
        return message
    content = message[-1]["content"] if message else ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content or ())
