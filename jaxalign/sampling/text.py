"""Stop strings, on decoded text."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from jaxalign.sampling.choose import Config
from jaxalign.sampling.generate import STOP
from jaxalign.types import Samples

Decode = Callable[[Sequence[int]], str]


def truncate_at(text: str, stops: Sequence[str], *, keep: bool = False) -> str:
    """The text before the earliest occurrence of any stop string; all of it where none occurs.

    Args:
      text: what to cut.
      stops: strings.
      keep: leave the stop string at the end (of several that begin at one place, the shortest).

    Raises:
      ValueError: a stop string is empty.
    """
    if "" in stops:
        raise ValueError("a stop string is empty: it would cut every text to nothing")
    found = [(place, len(stop)) for stop in stops if (place := text.find(stop)) >= 0]
    place, size = min(found, default=(len(text), 0))
    return text[: place + size if keep else place]


def truncate_tokens(ids: Sequence[int], decode: Decode, stops: Sequence[str]) -> int:
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


def without_end(ids: Sequence[int], config: Config) -> Sequence[int]:
    """A completion without what ended it inside the loop: an EOS id, or the longest of the stop sequences."""
    ends = [*((id,) for id in config.eos_ids), *config.stop_sequences]
    longest = max((len(end) for end in ends if tuple(ids[-len(end) :]) == end), default=0)
    return ids[: len(ids) - longest]


def truncate_samples(samples: Samples, decode: Decode, stops: Sequence[str]) -> Samples:
    """Samples cut after the token that completes the earliest stop string, with `STOP` as their finish.

    A completion that its last token brings to a stop string is not shortened, but has finished all the same.

    Args:
      samples: on the host.
      decode: token ids as text.
      stops: strings.
    """
    if not stops:
        return samples
    lengths, finish = np.array(samples.lengths), np.array(samples.finish)
    for number, row in enumerate(np.asarray(samples.tokens)):
        ids = row[: lengths[number]].tolist()
        if _has(decode(ids), stops):
            lengths[number], finish[number] = truncate_tokens(ids, decode, stops), STOP
    kept = np.arange(samples.tokens.shape[1])[None] < lengths[:, None]
    names = ("tokens", "sampler_logps", "log_mass")
    cut = {name: np.where(kept, getattr(samples, name), 0) for name in names}
    return replace(samples, lengths=lengths, finish=finish, **cut)


def _has(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)
