"""What flows between modules: rows of tokens, predictions, batches, samples and summable metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
PyTree = Any  # dicts, tuples and dataclasses of arrays, in any nesting
Variables = dict[str, PyTree]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRows:
    """What the model reads: several documents side by side in each row.

    A query attends to a key when both lie in the same non-zero document, the key is in the trunk or in the query's own
    branch, and the key's position is not later than the query's.

    Attributes:
      tokens: int32 `[..., rows, length]`, token ids; 0 where `documents` is 0.
      positions: int32 `[..., rows, length]`, restart per document; a branch continues from its trunk's end.
      documents: int32 `[..., rows, length]`, 0 = padding, else the document's number in its row.
      branches: int32 `[..., rows, length]`, 0 = trunk (a prompt, or a whole plain document), 1, 2, ... = completions.
    """

    tokens: Array
    positions: Array
    documents: Array
    branches: Array

    @classmethod
    def from_padded(cls, input_ids: Array, attention_mask: Array) -> TokenRows:
        """Rows of one document each from padded batches, left- or right-padded; the shape is kept.

        Args:
          input_ids: int `[rows, length]`.
          attention_mask: int or bool `[rows, length]`, non-zero for real tokens.

        Returns:
          Rows whose hidden states line up with `input_ids`; positions are the exclusive cumulative sum of the mask.
        """
        mask = jnp.asarray(attention_mask).astype(jnp.int32)
        tokens = jnp.where(mask > 0, jnp.asarray(input_ids).astype(jnp.int32), 0)
        positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0) * mask
        return cls(tokens=tokens, positions=positions, documents=mask, branches=jnp.zeros_like(mask))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Predictions:
    """Which predictions a loss needs: the LM head runs only here.

    Attributes:
      sources: int32 `[..., rows, predictions]`, index in the row of the token whose hidden state predicts.
      targets: int32 `[..., rows, predictions]`, the token that it should predict.
      completions: int32 `[..., rows, predictions]`, number of the completion in the (micro-)batch; -1 = padding.
      steps: int32 `[..., rows, predictions]`, index of the target within its completion.
    """

    sources: Array
    targets: Array
    completions: Array
    steps: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One global batch, split into micro-batches that are packed alone.

    Attributes:
      rows: `TokenRows` of shape `[micro, rows, length]`.
      predictions: `Predictions` of shape `[micro, rows, predictions]`; completion numbers are local to a micro-batch.
      present: float32 `[micro, completions]`, 1 where the completion exists (a last batch may not fill its places).
      fields: further inputs of a loss by name; float32, per prediction (`[micro, rows, predictions]`, for example
        `ref_logps`), per completion (`[micro, completions]`), or a number of the whole batch, repeated (`[micro]`).
    """

    rows: TokenRows
    predictions: Predictions
    present: Array
    fields: Mapping[str, Array] = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Samples:
    """Completions drawn by the sampler: those of prompt i in the rows `i * num_generations` and on.

    Attributes:
      tokens: int32 `[n, max_new_tokens]`, the EOS or the end of a stop sequence included; 0 past `lengths`.
      lengths: int32 `[n]`, tokens drawn.
      finish: int32 `[n]`, 0 = length, 1 = EOS, 2 = stop sequence.
      sampler_logps: float32 `[n, max_new_tokens]`, log-prob under the temperature-scaled distribution, no truncation.
      log_mass: float32 `[n, max_new_tokens]`, log of the probability mass that truncation kept: the token was drawn
        with log-prob `sampler_logps - log_mass`.
      counters: int32 scalars that say what the loop did: `prompts_read` (prefills, one per prompt), `refills` (times a
        finished slot took another completion), `decode_steps`, and `drawn` (tokens; over `decode_steps * slots` it is
        how full the slots were). On a mesh they are sums over its shards, `decode_steps` the common number.
    """

    tokens: Array
    lengths: Array
    finish: Array
    sampler_logps: Array
    log_mass: Array
    counters: Mapping[str, Array] = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experience:
    """A rollout: prompts, their completions and what is known of them; numpy, the same shapes in every rollout.

    Completion c belongs to prompt `c // (n / prompts)`: groups lie together and have one size.

    Attributes:
      prompts: int32 `[prompts, width]`, right-padded.
      prompt_lengths: int32 `[prompts]`.
      examples: int64 `[prompts]`, numbers of the examples in the data set.
      tokens: int32 `[n, steps]`, this and the next two as in `Samples`.
      lengths: int32 `[n]`.
      finish: int32 `[n]`.
      scores: float64 `[n, rewards]`; NaN = none.
      fields: float32 `[n, steps]` by name, per token: `sampler_logps`, `old_logps`, `ref_logps`, `advantages`,
        `values`, ...; 0 past `lengths`.
    """

    prompts: np.ndarray
    prompt_lengths: np.ndarray
    examples: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    finish: np.ndarray
    scores: np.ndarray
    fields: dict[str, np.ndarray]

    @property
    def num_generations(self) -> int:
        """Completions per prompt."""
        return len(self.tokens) // len(self.prompts)

    @property
    def groups(self) -> np.ndarray:
        """int `[n]`, number of each completion's prompt."""
        return np.arange(len(self.tokens)) // self.num_generations

    @property
    def mask(self) -> np.ndarray:
        """bool `[n, steps]`, where there is a token."""
        return np.arange(self.tokens.shape[1])[None] < self.lengths[:, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A weighted mean that is still exact after adding parts: the sum and its weight are carried apart."""

    total: Array | float
    weight: Array | float

    def merge(self, other: Mean) -> Mean:
        """The mean over both parts."""
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> float | None:
        """The mean, or None where nothing was weighed (such a metric is absent, never 0)."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Min:
    """A minimum over parts; infinity where there was nothing."""

    least: Array | float

    def merge(self, other: Min) -> Min:
        """The minimum over both parts."""
        return Min(jnp.minimum(self.least, other.least))

    def value(self) -> float | None:
        """The minimum, or None where there was nothing."""
        return float(self.least) if np.isfinite(float(self.least)) else None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Max:
    """A maximum over parts; minus infinity where there was nothing."""

    most: Array | float

    def merge(self, other: Max) -> Max:
        """The maximum over both parts."""
        return Max(jnp.maximum(self.most, other.most))

    def value(self) -> float | None:
        """The maximum, or None where there was nothing."""
        return float(self.most) if np.isfinite(float(self.most)) else None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum:
    """A sum of means over different things, each exact after adding parts: a loss per pair plus one per token."""

    parts: tuple[Mean, ...]

    def merge(self, other: Sum) -> Sum:
        """The sum over both parts."""
        return Sum(tuple(mine.merge(theirs) for mine, theirs in zip(self.parts, other.parts, strict=True)))

    def value(self) -> float | None:
        """The sum of the means there are, or None where nothing was weighed."""
        known = [value for value in (part.value() for part in self.parts) if value is not None]
        return sum(known) if known else None


Metric = Mean | Min | Max | Sum
Metrics = Mapping[str, Metric]
