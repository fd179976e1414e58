"""The section `ptx_data`: supervised examples that PPO mixes into its batches."""

from __future__ import annotations

from typing import Any

from jaxalign import data, models
from jaxalign.config import Stage
from jaxalign.methods.mixing import Order, Supervised

# Keys of the section whose work is done elsewhere, and what to do instead.
ELSEWHERE = {
    "eval_path": "a run is evaluated on data.eval_path",
    "eval_split": "a run is evaluated on data.eval_split",
    "eval_ratio": "a run is evaluated on data.eval_ratio",
    "streaming": "supervised examples are drawn from a list",
    "chat_template_path": "the template is that of data.chat_template_path",
    "eos_token": "the end token is that of data.eos_token",
}


def load_supervised(stage: Stage, tokenizer: Any, config: models.ModelConfig) -> data.Data | None:
    """The stage's supervised examples; None without the section.

    Args:
      stage: the config.
      tokenizer: as the stage's prompts are encoded with it.
      config: of the policy.

    Raises:
      FileNotFoundError: no such data.
      ValueError: a key that has no meaning here, or bad data; names the key, or file and line.
    """
    section = stage.ptx_data
    if section is None:
        return None
    for key, why in ELSEWHERE.items():
        if getattr(section, key):
            raise ValueError(f"ptx_data.{key}: {why}; leave it away here")
    if section.max_length > config.max_position:
        raise ValueError(
            f"ptx_data.max_length={section.max_length} exceeds the model's context of {config.max_position}"
        )
    try:
        return data.load(section, tokenizer, "sft")
    except (FileNotFoundError, ValueError) as error:
        raise type(error)("ptx_data: " + str(error).replace("data.on_bad", "ptx_data.on_bad")) from error


def make_supervised(stage: Stage, found: data.Data | None) -> Supervised | None:
    """What the source of the stage's batches mixes in."""
    section = stage.ptx_data
    if section is None or found is None:
        return None
    order = Order(len(found.train), section.seed, section.shuffle, found.order)
    return Supervised(found.train, order, stage.method.ptx_per_prompt)
