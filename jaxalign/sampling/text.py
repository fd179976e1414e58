"""Stop strings, on decoded text."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence


def truncate_at(text: str, stops: Sequence[str]) -> str:
    """The text before the earliest occurrence of any stop string; all of it where none occurs.

    Raises:
      ValueError: a stop string is empty.
    """
    if "" in stops:
        raise ValueError("a stop string is empty: it would cut every text to nothing")
    found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(found, default=len(text))]


def truncate_tokens(ids: Sequence[int], decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> int:
    """How many tokens a completion has up to and with the one that completes the earliest stop string.

    Args:
      ids: the completion.
      decode: token ids as text.
      stops: strings.

    Returns:
      `len(ids)` where no stop string occurs.
    """
    if not stops or truncate_at(text := decode(ids), stops) == text:
        return len(ids)
    # The text of a prefix can only grow a stop: the shortest that has one is found by halving.
    return bisect.bisect_left(range(1, len(ids)), True, key=lambda n: _has(decode(ids[:n]), stops)) + 1


def _has(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)
