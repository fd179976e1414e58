"""Pairs and their margins: how much better the chosen completion was judged, and what its length has to do with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.data.formats import Bad

if TYPE_CHECKING:
    from jaxalign.data.examples import Examples

SCORES = ("chosen_score", "rejected_score")


@dataclass(frozen=True)
class LengthBias:
    """How lengths and preferences go together in pairs.

    Attributes:
      pairs: how many.
      chosen_longer: share whose chosen completion has more tokens.
      equal: share whose completions have as many.
      mean_difference: chosen tokens less rejected ones, on average.
      margins: pairs with a margin.
      correlation: Pearson's, of the difference in tokens with the margin; None where it is not defined.
    """

    pairs: int
    chosen_longer: float
    equal: float
    mean_difference: float
    margins: int
    correlation: float | None

    def line(self) -> str:
        """As a line of plain text."""
        text = (
            f"length bias: chosen is longer in {self.chosen_longer:.1%} of {self.pairs} pairs, as long in "
            f"{self.equal:.1%}, by {self.mean_difference:+.1f} tokens on average"
        )
        if self.correlation is not None:
            text += f"; correlation with the margin {self.correlation:+.3f} ({self.margins} pairs have one)"
        return text


def margin_of(row: Mapping[str, Any]) -> float | None:
    """The column `margin`, or `chosen_score` less `rejected_score`; None where neither is there.

    Raises:
      Bad: one of them is no number.
    """
    if row.get("margin") is not None:
        return _number(row["margin"], "margin")
    if any(row.get(name) is None for name in SCORES):
        return None
    chosen, rejected = (_number(row[name], name) for name in SCORES)
    return chosen - rejected


def length_bias(examples: Examples) -> LengthBias | None:
    """The length bias of the good ones among encoded pairs; None where there are none."""
    good = _pairs(examples.good())
    if not len(good):
        return None
    difference = np.asarray([pair_tokens(good[i]) for i in range(len(good))], np.float64) @ [1, -1]
    margins = [None if good.rows is None else margin_of(good.row(i)) for i in range(len(good))]
    known = np.asarray([margin is not None for margin in margins])
    values = np.asarray([margin for margin in margins if margin is not None], np.float64)
    correlation = None
    if known.sum() > 1 and np.ptp(values) > 0 and np.ptp(difference[known]) > 0:
        correlation = float(np.corrcoef(difference[known], values)[0, 1])
    return LengthBias(
        pairs=len(good),
        chosen_longer=float((difference > 0).mean()),
        equal=float((difference == 0).mean()),
        mean_difference=float(difference.mean()),
        margins=int(known.sum()),
        correlation=correlation,
    )


def pair_tokens(example: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Tokens of the chosen and of the rejected completion of an encoded pair, or of a ranking of two."""
    if "chosen_ids" in example:
        return len(example["chosen_ids"]), len(example["rejected_ids"])
    chosen, rejected = example["sizes"][np.argsort(example["ranks"], kind="stable")].tolist()
    return chosen, rejected


def _pairs(examples: Examples) -> Examples:
    if "ranks" in examples.arrays:
        return examples.select(np.flatnonzero(examples.arrays["sizes"].lengths[examples.index] == 2))
    return examples if "chosen_ids" in examples.arrays else examples.select(np.zeros(0, np.int64))


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise Bad("wrong type", f"`{name}` is {value!r}; a finite number expected")
    return float(value)
