"""What a stage may not ask for of streamed data."""

from __future__ import annotations

from jaxalign import data
from jaxalign.config import Stage
from jaxalign.methods import METHODS
from jaxalign.methods.common import is_online, trains_scores


def check_streaming(stage: Stage, found: data.Data) -> None:
    """Raises ValueError, naming the key, where a stage asks for what a stream cannot give."""
    if found.stream is None:
        return
    method = METHODS[stage.method_name]
    if is_online(method):
        raise ValueError(f"data.streaming: {stage.method_name} draws from a list of prompts; set it to false")
    if getattr(stage.method, "precompute_ref_log_probs", False):
        raise ValueError(
            "method.precompute_ref_log_probs does not go with data.streaming: it is a pass over all data; set it to "
            "false, and the reference runs on every batch"
        )
    if trains_scores(method) and stage.method.normalize:
        raise ValueError("method.normalize does not go with data.streaming: it is a pass over training data")
    if stage.train.max_steps < 1:
        raise ValueError("train.max_steps is needed with data.streaming: nobody knows how long an epoch is")
    if found.eval is not None and stage.train.eval_steps is None:
        raise ValueError("train.eval_steps is needed with data.streaming: nobody knows where an epoch ends")
