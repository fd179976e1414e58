"""Stop strings, on decoded text."""

from __future__ import annotations

from collections.abc import Sequence


def truncate_at(text: str, stops: Sequence[str]) -> str:
    """The text before the earliest occurrence of any stop string; all of it where none occurs.

    Raises:
      ValueError: a stop string is empty.
    """
    if "" in stops:
        raise ValueError("a stop string is empty: it would cut every text to nothing")
    found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(found, default=len(text))]
