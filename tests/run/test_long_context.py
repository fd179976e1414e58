"""A model with longrope: its original context, and the longer one that a config may ask for."""

import json
import shutil

import pytest

from jaxalign.config import parse_config
from jaxalign.run import prepare, run
from tests.models.tiny import CONFIGS, write_folder


@pytest.fixture
def longrope(settings, tiny_folder):
    settings["model"]["path"] = str(tiny_folder)
    settings["data"]["max_length"] = 128
    settings["train"] |= {"max_steps": 1, "save_steps": 1, "eval_steps": 1}
    return settings


@pytest.fixture
def tiny_folder(tiny, tmp_path):
    """Phi 3 of a context of 32 tokens, or 128, with the tokenizer of the other tiny model."""
    folder = tmp_path / "phi3"
    shutil.copytree(tiny, folder)
    write_folder(folder, CONFIGS["phi3-long"] | {"vocab_size": 320})
    return folder


def test_the_longer_context_is_asked_for(longrope, tiny_folder):
    """Dialogues of some 60 tokens: too long for 32, so a run says what to set; with it they train."""
    with pytest.raises(ValueError, match=r"max_length=128 exceeds .* of 32; model\.long_context: true .* for 128"):
        prepare(parse_config(longrope).stages[0])
    longrope["model"]["long_context"] = True
    ready = prepare(parse_config(longrope).stages[0])
    assert ready.model.config.max_position == 128 and ready.data.train.lengths["total"].max() > 32
    assert all(rope is not None and rope.long for rope in ready.model.config.layer_ropes)
    folder = run(parse_config(longrope)).folder / "export"
    ours, theirs = (json.loads((each / "config.json").read_text()) for each in (folder, tiny_folder))
    names = ("max_position_embeddings", "original_max_position_embeddings")
    assert [ours[name] for name in names] == [theirs[name] for name in names] == [128, 32]


def test_a_model_without_longrope_has_one_context(settings):
    settings["model"]["long_context"] = True
    with pytest.raises(ValueError, match=r"model\.long_context: a llama model without longrope has one context only"):
        prepare(parse_config(settings).stages[0])
