"""What the backward pass keeps of a block's forward pass; the rest it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax

from jaxalign.models.splash import OUTPUT_NAME

Remat = Literal["none", "full", "attention", "dots", "dots_attention", "offload", "dots_offload"]

# The residual stream before each repeat of a segment.
INPUT_NAME = "block_input"

_policies = jax.checkpoint_policies
_attention = _policies.save_only_these_names(OUTPUT_NAME)
_dots = _policies.dots_with_no_batch_dims_saveable
# `none` is no policy: nothing is computed again then.
POLICIES: dict[str, Callable[..., bool]] = {
    "full": _policies.nothing_saveable,
    "attention": _attention,
    "dots": _dots,
    "dots_attention": _policies.save_from_both_policies(_dots, _attention),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT_NAME, OUTPUT_NAME],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots_offload": _policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}
OFFLOADING = ("offload", "dots_offload")
