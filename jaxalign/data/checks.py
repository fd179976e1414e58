"""Bad data stops at the door: what is wrong, in which file and line, how often; and what the rest looks like."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxalign.data.examples import Examples
    from jaxalign.data.margins import LengthBias
    from jaxalign.data.mixture import Share

SHOWN = 10
BARS = " ▁▂▃▄▅▆▇█"
QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Problem:
    """One row that cannot be used.

    Attributes:
      path: its file.
      line: its line, 1-based; a row number for files that have no lines.
      kind: a few words that are the same for all rows with this problem.
      detail: what is wrong with this row.
    """

    path: str
    line: int
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.detail}"


@dataclass(frozen=True)
class Lengths:
    """How long the parts of examples are, in tokens.

    Attributes:
      tokens: sum over all examples.
      mean: per example.
      quantiles: `min`, `p50`, `p90`, `p99` and `max`.
      edges: `[bins + 1]`, of the histogram.
      counts: `[bins]`, examples per bin.
    """

    tokens: int
    mean: float
    quantiles: dict[str, int]
    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """The training or the evaluation data.

    Attributes:
      rows: rows read.
      used: rows without a problem.
      problems: rows by kind of problem.
      shown: the first problems of each kind.
      cut_examples: examples that truncation shortened.
      cut_tokens: tokens that it removed.
      lengths: of the used rows, by part: `prompt`, `completion` (or `chosen` and `rejected`), `total`.
      labels: of `unpaired` data, how many used examples are `desirable` and `undesirable`.
    """

    rows: int
    used: int
    problems: dict[str, int]
    shown: tuple[Problem, ...]
    cut_examples: int
    cut_tokens: int
    lengths: dict[str, Lengths]
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a data set is like, computed but not rendered.

    Attributes:
      train: the training data.
      eval: the evaluation data, if any.
      leaked: evaluation examples whose prompt is also in the training data, word for word.
      packing: measures of packing, as given by the caller's function.
      filters: training examples that each filter removed.
      parts: the parts of a mixture, by title.
      bias: how lengths and preferences go together, if that was asked for.
      note: what else is to be known of these numbers.
    """

    train: Part
    eval: Part | None = None
    leaked: int = 0
    packing: dict[str, float] = field(default_factory=dict)
    filters: dict[str, int] = field(default_factory=dict)
    parts: dict[str, Share] = field(default_factory=dict)
    bias: LengthBias | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain dicts, lists and numbers, for JSON."""
        return asdict(self)

    def lines(self, *, problems: bool = True, histograms: bool = False) -> list[str]:
        """It as lines of plain text.

        Args:
          problems: the first rows of each kind of problem.
          histograms: of the lengths.
        """
        lines = _describe("train", self.train, problems, histograms)
        if self.eval is not None:
            lines += [*_describe("eval", self.eval, problems, histograms)]
            lines += [f"eval examples whose prompt is in train: {self.leaked}"]
        lines += [f"filter {name}: {count} training examples removed" for name, count in self.filters.items()]
        lines += [_describe_share(title, share) for title, share in self.parts.items()]
        lines += [self.bias.line()] if self.bias is not None else []
        lines += [self.note] if self.note else []
        return lines + [f"packing {name}: {value:.4g}" for name, value in self.packing.items()]


def check(
    train: Examples,
    evaluation: Examples | None = None,
    packing: Callable[[Mapping[str, np.ndarray]], Mapping[str, float]] | None = None,
) -> Report:
    """Counts problems, measures lengths, and looks for prompts that training and evaluation share.

    Args:
      train: encoded examples, the bad ones among them.
      evaluation: encoded examples to evaluate on.
      packing: takes the lengths of the good training examples (int64 `[examples]` by part, see `Examples.lengths`), and
        returns measures by name.
    """
    leaked = 0
    if evaluation is not None:
        leaked = int(np.isin(evaluation.good().keys, train.good().keys).sum())
    good = train.good()
    measures = dict(packing(good.lengths)) if packing is not None and len(good) else {}
    return Report(_part(train), None if evaluation is None else _part(evaluation), leaked, measures)


def admit(examples: Examples, on_bad: str, name: str = "train") -> Examples:
    """The examples that may be trained on.

    Args:
      examples: encoded, the bad ones among them.
      on_bad: `stop` or `drop`.
      name: of the data, for the error.

    Returns:
      `examples` without the bad ones.

    Raises:
      ValueError: there are bad examples and `on_bad` is `stop`, or no example is left. It lists the number of each
        kind, and file and line of the first ones.
    """
    good = examples.good()
    if len(good) == len(examples) or (on_bad == "drop" and len(good)):
        return good
    counts = _counts(examples)
    listed = "".join(f"\n  {problem}" for problem in problems(examples, SHOWN))
    more = sum(counts.values()) - SHOWN
    kinds = ", ".join(f"{kind} ({count})" for kind, count in counts.items())
    left = "nothing is left" if not len(good) else "data.on_bad=drop leaves them out"
    raise ValueError(
        f"{name} data: {sum(counts.values())} of {len(examples)} examples cannot be used, {left}: {kinds}{listed}"
        + (f"\n  and {more} more" if more > 0 else "")
    )


def check_labels(train: Examples) -> None:
    """Raises ValueError where training examples are all desirable, or all undesirable: nothing would hold them back."""
    labels = train.labels
    if (labels == labels[0]).all():
        word, other = (
            ("desirable (label true)", "undesirable") if labels[0] else ("undesirable (label false)", "desirable")
        )
        path, line = train.where(0)
        raise ValueError(
            f"training data: all {len(train)} examples are {word}, the first is {path}:{line}; add {other} ones, or "
            "learn from the desirable ones alone with method.name=sft"
        )


def check_steps(train: Examples) -> None:
    """Raises ValueError where the steps of all training examples are right, or all wrong: there is nothing to tell."""
    first = train[0]["labels"][0]
    if all((example["labels"] == first).all() for example in train):
        word, other = ("right (true)", "wrong") if first else ("wrong (false)", "right")
        path, line = train.where(0)
        raise ValueError(
            f"training data: the steps of all {len(train)} examples are {word}, the first is {path}:{line}; a process "
            f"reward model needs {other} ones too: look at `labels`"
        )


def weight_ranges(labels: np.ndarray) -> dict[str, tuple[float, float]]:
    """Weights with which both kinds of examples matter: either `desirable_weight` or `undesirable_weight`, the other 1.

    `1 <= desirable_weight * desirable / (undesirable_weight * undesirable) <= 4 / 3`, from Ethayarajh et al., arXiv
    2402.01306, eq. 8.

    Args:
      labels: int `[examples]`, 1 = desirable; both kinds are there.
    """
    desirable = int(labels.sum())
    share = (len(labels) - desirable) / desirable
    return {"desirable_weight": (share, share * 4 / 3), "undesirable_weight": (0.75 / share, 1 / share)}


def problems(examples: Examples, most: int | None = None) -> list[Problem]:
    """The first bad ones among encoded examples, at most `most`."""
    return [_problem(examples, i) for i in _bad(examples)[:most]]


def _bad(examples: Examples) -> list[int]:
    return np.flatnonzero(examples.bad).tolist()


def _problem(examples: Examples, i: int) -> Problem:
    path, line = examples.where(i)
    return Problem(path, line, *examples.reason(i))


def _counts(examples: Examples) -> dict[str, int]:
    """Bad examples by kind, the most frequent first."""
    return dict(Counter(examples.reason(i)[0] for i in _bad(examples)).most_common())


def _part(examples: Examples) -> Part:
    good, counts = examples.good(), _counts(examples)
    shown = {kind: [] for kind in counts}
    for i in _bad(examples):
        listed = shown[examples.reason(i)[0]]
        if len(listed) < SHOWN:
            listed.append(_problem(examples, i))
    return Part(
        rows=len(examples),
        used=len(good),
        problems=counts,
        shown=tuple(problem for listed in shown.values() for problem in listed),
        cut_examples=int((good.cut > 0).sum()),
        cut_tokens=int(good.cut.sum()),
        lengths={name: measure(values) for name, values in good.lengths.items()} if len(good) else {},
        labels=_count_labels(good) if good.members is not None else {},
    )


def _count_labels(examples: Examples) -> dict[str, int]:
    desirable = int(examples.labels.sum())
    return {"desirable": desirable, "undesirable": len(examples) - desirable}


def measure(lengths: np.ndarray, bins: int = 20) -> Lengths:
    """The distribution of int `[examples]` lengths, in up to `bins` bins of whole tokens."""
    width = max(-(-int(lengths.max() + 1) // bins), 1)
    edges = np.arange(0, int(lengths.max()) + width + 1, width)
    counts, _ = np.histogram(lengths, edges)
    quantiles = np.quantile(lengths, list(QUANTILES.values()), method="higher")
    return Lengths(
        tokens=int(lengths.sum()),
        mean=float(lengths.mean()),
        quantiles=dict(zip(QUANTILES, map(int, quantiles), strict=True)),
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
    )


def _describe(name: str, part: Part, problems: bool, histograms: bool) -> list[str]:
    lines = [f"{name}: {part.used} of {part.rows} examples can be used"]
    lines += [f"  {kind}: {count}" for kind, count in part.problems.items()]
    lines += [f"    {problem}" for problem in part.shown if problems]
    if part.cut_examples:
        lines.append(f"  truncation shortened {part.cut_examples} examples by {part.cut_tokens} tokens")
    if part.labels:
        lines.append("  " + ", ".join(f"{kind}: {count}" for kind, count in part.labels.items()))
    if all(part.labels.values()) and part.labels and name == "train":
        labels = np.repeat([1, 0], [part.labels["desirable"], part.labels["undesirable"]])
        ranges = [f"{key} from {low:.3g} to {high:.3g}" for key, (low, high) in weight_ranges(labels).items()]
        lines.append(f"  both kinds weigh about the same with method.{' or method.'.join(ranges)}, the other weight 1")
    for what, lengths in part.lengths.items():
        spread = ", ".join(f"{at} {value}" for at, value in lengths.quantiles.items())
        lines.append(f"  {what} tokens: {lengths.tokens} in all, mean {lengths.mean:.1f}, {spread}")
        lines += [f"    {_bars(lengths)}"] if histograms else []
    return lines


def _bars(lengths: Lengths) -> str:
    """A histogram as a line: one bar per bin, as high as its count beside the largest; a bin with one example shows."""
    most, width = max(lengths.counts), lengths.edges[1] - lengths.edges[0]
    bars = "".join(BARS[math.ceil(count / most * (len(BARS) - 1))] for count in lengths.counts)
    return (
        f"{lengths.edges[0]} |{bars}| {lengths.edges[-1]}, {width} token(s) per bar, at most {most} example(s) in one"
    )


def _describe_share(title: str, share: Share) -> str:
    epoch = "" if share.per_epoch is None else f", {share.per_epoch} per epoch"
    return f"part {title}: {share.used} of {share.rows} examples, {share.weight:.1%} of training{epoch}"
