"""A list of prompts through the compiled loop, in few shapes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jaxalign.sampling.generate import Generate
from jaxalign.types import Array, Samples, Variables


def bucket_width(n: int, smallest: int = 16) -> int:
    """n rounded up to a multiple of an eighth of the next power of two, or of `smallest` if that is more.

    Shapes padded to it are four per octave, and at most a fifth of one is padding: every decoded token attends to the
    padding too.
    """
    step = max(smallest, (1 << max(n - 1, 0).bit_length()) // 8)
    return max(1, -(-n // step)) * step


def sample_prompts(
    generate: Generate,
    variables: Variables,
    prompts: Sequence[Sequence[int]],
    key: Array,
    *,
    num_generations: int = 1,
    shards: int = 1,
) -> Samples:
    """Draws completions for a list of prompts.

    Args:
      generate: from `make_generate`, jitted; use the same one again, as its compiled shapes live in it.
      variables: the model's.
      prompts: token ids. Completion g of prompt i has number `i * num_generations + g`.
      key: a threefry key.
      num_generations: as the sampler's.
      shards: data shards of the sampler's mesh.

    Returns:
      numpy arrays, in the prompts' order.

    Raises:
      ValueError: no prompts, or an empty one.
    """
    if not prompts:
        raise ValueError("there are no prompts to sample from")
    sizes = np.array([len(prompt) for prompt in prompts])
    if not sizes.all():
        raise ValueError(f"prompt {int(sizes.argmin())} is empty: it needs at least one token, for example BOS")
    rows = shards * bucket_width(-(-len(prompts) // shards), 1)
    padded = np.zeros((rows, bucket_width(int(sizes.max()))), np.int32)
    lengths = np.zeros(rows, np.int32)
    lengths[: len(prompts)] = sizes
    for row, prompt in zip(padded, prompts, strict=False):
        row[: len(prompt)] = prompt
    drawn = jax.device_get(generate(variables, padded, lengths, key))
    return first_samples(drawn, len(prompts) * num_generations)


def first_samples(samples: Samples, count: int) -> Samples:
    """The first completions alone: those of prompts that were only there to fill a shape go."""
    names = ("tokens", "lengths", "finish", "sampler_logps", "log_mass")
    return Samples(**{name: getattr(samples, name)[:count] for name in names}, counters=samples.counters)
