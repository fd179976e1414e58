"""Sections of a data set's configuration: the parts of a mixture, and what is filtered out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MixturePart:
    """One data set of a mixture; what is left away is taken from the section `data`.

    Attributes:
      path: as `DataConfig.path`.
      weight: its share of the examples, relative to the other parts'; all parts have one, or none has.
      label: what reports and errors call it; its path by default.
      name: subset of a Hub data set.
      split: split to train on.
      format: key of `FORMATS`; None as in `DataConfig.format`.
      columns: our column name -> the data set's; None as in `DataConfig.columns`.
    """

    path: str | tuple[str, ...]
    weight: float | None = None
    label: str | None = None
    name: str | None = None
    split: str = "train"
    format: str | None = None
    columns: dict[str, str] | None = None

    def __post_init__(self):
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"weight={self.weight} must be positive; leave a part without weight out of the mixture")

    @property
    def title(self) -> str:
        """What reports and errors call it."""
        return self.label or (self.path if isinstance(self.path, str) else ", ".join(self.path))


@dataclass(frozen=True)
class Filters:
    """What is left out of the training data although it could be trained on; None or False: nothing.

    Attributes:
      min_completion_tokens: shortest completion.
      max_completion_tokens: longest completion.
      max_length_ratio: of a pair, tokens of the longer completion over those of the shorter.
      drop_ties: pairs whose margin is 0, or whose completions are equal after normalising.
      min_margin: least `|margin|` of a pair, or `|chosen_score - rejected_score|`.
      deduplicate: `example` keeps the first of those that are equal after normalising (Unicode NFKC, case, white
        space), `prompt` the first of each prompt.
      decontaminate: `exact` drops what shares its prompt, after normalising, with an evaluation example; `ngram` also
        what shares `ngram` words in a row with one, system messages aside.
      ngram: words in a row.
    """

    min_completion_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_length_ratio: float | None = None
    drop_ties: bool = False
    min_margin: float | None = None
    deduplicate: str | None = None
    decontaminate: str | None = None
    ngram: int = 13

    def __post_init__(self):
        least, most = self.min_completion_tokens, self.max_completion_tokens
        for name, value in (("min_completion_tokens", least), ("max_completion_tokens", most), ("ngram", self.ngram)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if least is not None and most is not None and least > most:
            raise ValueError(f"min_completion_tokens={least} exceeds max_completion_tokens={most}")
        if self.max_length_ratio is not None and self.max_length_ratio < 1:
            raise ValueError(f"max_length_ratio={self.max_length_ratio} must be at least 1")
        if self.min_margin is not None and self.min_margin < 0:
            raise ValueError(f"min_margin={self.min_margin} must not be negative; it is compared with |margin|")
        for name, allowed in (("deduplicate", ("example", "prompt")), ("decontaminate", ("exact", "ngram"))):
            if getattr(self, name) not in (None, *allowed):
                raise ValueError(f"{name}={getattr(self, name)!r}: one of {', '.join(allowed)} expected")


def check_sources(config: Any) -> None:
    """Raises ValueError where what a `DataConfig` names cannot be read together."""
    if (config.path is None) != bool(config.mixture):
        raise ValueError("path, or mixture with its parts, says what to read; set one of the two")
    if config.mixture:
        _check_mixture(config)
    elif config.mixture_temperature != 1:
        raise ValueError("mixture_temperature needs a mixture")
    if config.mixture_epoch not in ("first", "all"):
        raise ValueError(f"mixture_epoch={config.mixture_epoch!r}: one of 'first', 'all' expected")
    if config.sort_by is not None and config.shuffle:
        raise ValueError("sort_by orders the rows, and shuffle would mix them: set shuffle to false")
    held_out = config.eval_path or config.eval_split or config.eval_ratio
    if config.filters is not None and config.filters.decontaminate and not held_out:
        raise ValueError("filters.decontaminate needs evaluation data: set eval_path, eval_split or eval_ratio")
    if config.streaming:
        _check_streaming(config)


def _check_mixture(config: Any) -> None:
    titles = Counter(part.title for part in config.mixture)
    twice = [title for title, count in titles.items() if count > 1]
    if twice:
        raise ValueError(f"mixture: {titles[twice[0]]} parts are called {twice[0]!r}; give each a label of its own")
    weighed = [part.weight is not None for part in config.mixture]
    if any(weighed) and not all(weighed):
        missing = next(part.title for part in config.mixture if part.weight is None)
        raise ValueError(f"mixture: {missing} has no weight, others have; give all parts one, or none")
    if not config.mixture_temperature > 0:
        raise ValueError(f"mixture_temperature={config.mixture_temperature} must be positive")
    if all(weighed) and config.mixture_temperature != 1:
        raise ValueError("mixture_temperature makes shares of sizes; leave it away where parts have weights")
    if config.eval_split and not config.eval_path:
        raise ValueError("eval_split of a mixture: name the data set as eval_path")


def _check_streaming(config: Any) -> None:
    """What a stream, which is read once and in order, cannot give."""
    parts = config.mixture or (config,)
    refused = {
        "eval_ratio": (config.eval_ratio, "a share of rows needs their number; set eval_path"),
        "sort_by": (config.sort_by, "sorting needs all rows; sort the files"),
        "filters.deduplicate": (config.filters and config.filters.deduplicate, "it would have to remember all rows"),
        "mixture_epoch=first": (
            config.mixture_epoch == "first",
            "the parts' sizes are unknown; each repeats by itself",
        ),
        "mixture without weights": (len(parts) > 1 and parts[0].weight is None, "the parts' sizes are unknown"),
        "split": (any("[" in part.split for part in parts), "a slice needs the number of rows"),
    }
    for name, (given, why) in refused.items():
        if given:
            raise ValueError(f"{name} does not go with streaming: {why}")
    for name in ("shuffle_window", "stream_sample"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
