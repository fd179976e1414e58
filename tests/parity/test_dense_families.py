# pyright: reportMissingImports=false
"""The dense families through a whole life: read, trained for a step, written, and read by transformers."""

from __future__ import annotations

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models
from jaxalign.methods import sft
from jaxalign.models.families import FAMILIES
from jaxalign.training import optimizer as optimizers
from jaxalign.types import TokenRows
from tests.layouts import ragged_texts, relative
from tests.models import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

NAMES = (
    "gemma", "gemma2", "gemma3", "phi3", "pythia", "olmo2", "smollm3", "granite", "starcoder2", "cohere2", "stablelm",
    "glm4",
)  # fmt: skip
CLASSIFIERS = [name for name in NAMES if FAMILIES[tiny.CONFIGS[name]["model_type"]].in_transformers]
TOKENS = np.random.default_rng(5).integers(4, 160, (1, 40))
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def uncompiled():
    """Operation by operation, which the families share; each family's own programs would take minutes."""
    with jax.disable_jit():
        yield


def loaded(folder: Path, name: str):
    tiny.write_folder(folder, tiny.CONFIGS[name] | {"num_hidden_layers": 2})
    return models.load(folder)


def read_by_torch(folder: Path, auto) -> np.ndarray:
    """What transformers computes of `TOKENS` from a folder; every tensor of it must be known and none missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = auto.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(TOKENS)).logits.numpy()


def ours(model, variables) -> jax.Array:
    return model.apply(variables, TokenRows.from_padded(jnp.asarray(TOKENS), jnp.ones_like(jnp.asarray(TOKENS))))[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_step_in_transformers(name, tmp_path):
    model, variables = loaded(tmp_path / "in", name)
    before = jax.device_get(variables["params"])
    optimizer, schedule = optimizers.make_optimizer(optimizers.Config(learning_rate=1e-2), 1)
    config = sft.Config()
    state, frozen = sft.init(config, model, variables, optimizer, jax.random.key(0))
    batch = sft.make_batch(config, ragged_texts(3, longest=30))
    state, metrics = sft.make_step(config, model, optimizer, schedule)(state, frozen, batch)
    assert (metrics["loss"].value() or 0.0) > 1
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before, state.params["params"])), strict=True)]
    # The step reached every parameter.
    assert min(moved) > 1e-4 and relative(state.params["params"], before) > 1e-3
    models.save(tmp_path / "out", model, state.params, None)
    wanted = model.logits(state.params, ours(model, state.params))
    assert wanted.std(-1).min() > 1
    found = read_by_torch(tmp_path / "out", transformers.AutoModelForCausalLM)
    assert np.abs(found - wanted).max() < TOLERANCE


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_score_head_in_transformers(name, tmp_path):
    model, variables = models.add_score_head(*loaded(tmp_path / "in", name), jax.random.key(2), std=1.0)
    models.save(tmp_path / "out", model, variables, None)
    wanted = model.scores(variables, ours(model, variables))[0, -1]
    found = read_by_torch(tmp_path / "out", transformers.AutoModelForSequenceClassification)
    assert np.abs(found - wanted).max() < TOLERANCE and abs(float(wanted)) > 0.1


def test_the_text_part_of_gemma3(tmp_path):
    """A checkpoint with a model of images, as transformers writes it: the text part, the same logits."""
    text = {key: value for key, value in tiny.CONFIGS["gemma3"].items() if key != "model_type"}
    # transformers' class with images leaves the cap out.
    text["final_logit_softcapping"] = None
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(0.0, 0.2)
        wanted = whole(input_ids=torch.tensor(TOKENS)).logits.numpy()
    whole.save_pretrained(tmp_path / "whole")
    model, variables = models.load(tmp_path / "whole")
    assert model.config.family == "gemma3_text"
    assert np.abs(model.logits(variables, ours(model, variables)) - wanted).max() < TOLERANCE
