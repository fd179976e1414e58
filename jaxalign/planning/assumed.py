"""Data for a plan where there are none: examples as long as the config lets them be."""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxalign import data
from jaxalign.buckets import is_url
from jaxalign.data.checks import check
from jaxalign.data.examples import from_list, take_apart
from jaxalign.methods import METHODS
from jaxalign.methods.common import is_online
from jaxalign.sections import Stage


def has_data(stage: Stage) -> bool:
    """Whether the stage's training data are on this machine, or in a bucket."""
    paths = [part.path for part in stage.data.mixture] or [stage.data.path]
    files = [file for path in paths for file in ([path] if isinstance(path, str) else path or [""])]
    return all(is_url(file) or Path(file).exists() or bool(glob.glob(file)) for file in files)


def without_data(stage: Stage) -> Stage:
    """The stage as it may be planned without data: nothing is evaluated, streamed or shown."""
    evaluation = {"eval_steps": None, "eval_on_start": False, "load_best_model_at_end": False}
    train = replace(stage.train, **evaluation, early_stopping_patience=None)
    settings = {"eval_path": None, "eval_split": None, "eval_ratio": None, "filters": None, "streaming": False}
    return replace(stage, train=train, data=replace(stage.data, **settings), log=replace(stage.log, sample_steps=None))


def assumed_data(stage: Stage) -> tuple[data.Data, str]:
    """Examples of the longest kind, enough for a step, and a line that says what they are."""
    method, longest = METHODS[stage.method_name], stage.data.max_length
    if is_online(method):
        prompt = stage.data.max_prompt_length or longest
        count = method.rollout_prompts(stage.method, stage.train.batch_size)
        steps = stage.method.max_completion_length
        line = f"no data: prompts of {prompt} tokens, every completion as long as it may be ({steps} tokens)"
    else:
        prompt, count = stage.data.max_prompt_length or longest // 2, stage.train.batch_size
        line = f"no data: examples of data.max_length={longest} tokens, {prompt} of them prompt"
    train = from_list([EXAMPLES[method.KIND](i, prompt, longest - prompt) for i in range(count)])
    if method.KIND == "unpaired":
        train = take_apart(train)
    return data.Data(train, None, check(train, None), cast("Any", None)), line


def _ids(n: int) -> np.ndarray:
    return np.zeros(max(n, 1), np.int32)


def _plain(i: int, prompt: int, completion: int) -> dict[str, np.ndarray]:
    return {"input_ids": _ids(prompt + completion), "loss_mask": np.arange(prompt + completion) >= prompt}


def _pair(i: int, prompt: int, completion: int) -> dict[str, np.ndarray]:
    return {"prompt_ids": _ids(prompt), "chosen_ids": _ids(completion), "rejected_ids": _ids(completion)}


def _ranking(i: int, prompt: int, completion: int) -> dict[str, np.ndarray]:
    return {
        "prompt_ids": _ids(prompt),
        "completion_ids": _ids(2 * completion),
        "sizes": np.full(2, completion, np.int32),
        "ranks": np.arange(2, dtype=np.int32),
        "margins": np.zeros(0, np.float32),
    }


def _steps(i: int, prompt: int, completion: int) -> dict[str, np.ndarray]:
    ends = np.arange(0, max(completion, 1), 32, dtype=np.int32)
    labels, steps = np.ones(len(ends), np.int32), np.full(1, len(ends), np.int32)
    return {
        "prompt_ids": _ids(prompt),
        "completion_ids": _ids(completion),
        "ends": ends,
        "labels": labels,
        "steps": steps,
    }


def _unpaired(i: int, prompt: int, completion: int) -> dict[str, np.ndarray]:
    sizes, labels = np.full(1, completion, np.int32), np.full(1, i % 2, np.int32)
    return {"prompt_ids": _ids(prompt), "completion_ids": _ids(completion), "sizes": sizes, "labels": labels}


def _prompt(i: int, prompt: int, completion: int) -> dict[str, np.ndarray]:
    return {"prompt_ids": _ids(prompt)}


# Kind of data -> (number, tokens of the prompt, tokens of a completion) -> an example.
EXAMPLES = {
    "sft": _plain,
    "preference": _pair,
    "ranking": _ranking,
    "stepwise": _steps,
    "unpaired": _unpaired,
    "prompt": _prompt,
}
