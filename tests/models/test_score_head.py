"""Score heads: how a policy gets one, what a folder of one says, and that nobody takes it for a language model."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from jaxalign import models
from jaxalign.models.config import count_params, forward_flops
from jaxalign.models.heads import rescale_scores
from jaxalign.models.identity import with_padding
from jaxalign.models.pretrained import load, load_config
from jaxalign.sharding import MeshConfig, make_mesh, param_shardings
from jaxalign.types import TokenRows
from tests.layouts import tiny_config, tiny_model
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("compiled_quickly")

FAMILIES = {
    "llama3": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2-windows": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "gpt2-untied": "GPT2ForSequenceClassification",
}
KEY = jax.random.key(5)


def scores(model, variables) -> np.ndarray:
    rows = TokenRows.from_padded(jnp.arange(4, 44).reshape(2, 20), jnp.arange(20)[None] < jnp.array([[20], [7]]))
    return np.asarray(jax.jit(lambda v: model.scores(v, model.apply(v, rows)[0]))(variables))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_round_trip(tmp_path, name):
    """A language model's folder, a head, a folder of a classifier, and back: the same scores, bit for bit."""
    tiny.write_folder(tmp_path / "in", tiny.CONFIGS[name])
    policy, variables = load(tmp_path / "in")
    model, scorer = models.add_score_head(policy, variables, KEY)
    assert scorer["params"].keys() == variables["params"].keys() - {"head"} | {"score"}
    assert scorer["params"]["embed"] is variables["params"]["embed"]
    models.save(tmp_path / "out", model, scorer, None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [FAMILIES[name]]
    assert (config["num_labels"], config["id2label"], config["label2id"]) == (1, {"0": "LABEL_0"}, {"LABEL_0": 0})
    assert config["pad_token_id"] not in np.atleast_1d(tiny.CONFIGS[name]["eos_token_id"])
    assert "score_bias" not in config
    content = load_file(tmp_path / "out" / "model.safetensors")
    assert content["score.weight"].shape == (1, 64) and "lm_head.weight" not in content
    again, same = load(tmp_path / "out")
    assert again.config == replace(model.config, pad_id=config["pad_token_id"])
    wanted = scores(model, scorer)
    assert wanted.shape == (2, 20) and wanted.dtype == np.float32 and np.ptp(wanted) > 1
    np.testing.assert_array_equal(scores(again, same), wanted)


def test_scores_by_hand():
    model, variables = tiny_model(lm_head=False, score_head=True, score_bias=0.25)
    kernel = np.arange(32, dtype=np.float32)[:, None] / 10
    variables["params"]["score"]["kernel"] = jnp.asarray(kernel)
    hidden = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)
    found = model.scores(variables, hidden)
    np.testing.assert_allclose(found, (hidden * kernel[:, 0]).sum(-1) + 0.25, rtol=1e-5)
    halves = model.scores(variables, hidden.astype(jnp.bfloat16))
    assert halves.dtype == jnp.float32


def test_the_draw_of_a_head():
    """Standard deviation 1 / sqrt(d + 1) = 1 / sqrt(33), or what is asked; 0 gives values of exactly 0."""
    policy, variables = tiny_model(lm_head=True)
    heads = [
        models.add_score_head(policy, variables, jax.random.key(i))[1]["params"]["score"]["kernel"] for i in range(99)
    ]
    assert heads[0].shape == (32, 1)
    assert np.std(heads) == pytest.approx(1 / math.sqrt(33), rel=0.05)
    model, value = models.add_score_head(policy, variables, KEY, std=0.0)
    assert not scores(model, value).any()


def test_both_heads():
    """A policy that shares its blocks with its value model; no class of transformers is like that."""
    policy, variables = tiny_model()
    model, both = models.add_score_head(policy, variables, KEY, keep_lm_head=True)
    hidden = np.ones((2, 32), np.float32)
    np.testing.assert_array_equal(model.logits(both, hidden), policy.logits(variables, hidden))
    assert model.scores(both, hidden).shape == (2,)
    with pytest.raises(ValueError, match="drop_score_head"):
        models.save("unused", model, both, None)
    alone, rest = models.drop_score_head(model, both)
    assert alone.config == policy.config and rest["params"].keys() == variables["params"].keys()
    with pytest.raises(ValueError, match="already"):
        models.add_score_head(model, both, KEY)


def test_a_model_says_which_head_it_lacks():
    policy, variables = tiny_model(tie_embeddings=True)
    with pytest.raises(ValueError, match="add_score_head"):
        policy.scores(variables, np.ones((1, 32), np.float32))
    model, scorer = models.add_score_head(policy, variables, KEY)
    with pytest.raises(ValueError, match="no LM head"):
        model.logits(scorer, np.ones((1, 32), np.float32))
    with pytest.raises(ValueError, match="no LM head to keep"):
        models.drop_score_head(model, scorer)
    with pytest.raises(ValueError, match="lm_head and score_head are off"):
        tiny_config(lm_head=False)


def test_init_makes_the_heads_that_there_are():
    model = models.build(tiny_config(lm_head=False, score_head=True))
    shapes = jax.eval_shape(model.init, KEY)["params"]
    assert shapes["score"]["kernel"].shape == (32, 1) and "head" not in shapes
    policy = tiny_config()
    assert count_params(policy) - count_params(model.config) == 97 * 32 - 32
    assert forward_flops(model.config, 10, 50, 4) - forward_flops(model.config, 10, 50, 0) == 2 * 32 * 4
    assert forward_flops(policy, 10, 50, 4) - forward_flops(policy, 10, 50, 0) == 2 * 32 * 97 * 4


def test_a_mesh_gets_the_same_numbers(tmp_path):
    tiny.write_folder(tmp_path / "in", tiny.CONFIGS["llama3"])
    model, variables = models.add_score_head(*load(tmp_path / "in"), KEY)
    models.save(tmp_path / "out", model, variables, None)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    _, sharded = load(tmp_path / "out", mesh=mesh)
    kernel = sharded["params"]["score"]["kernel"]
    assert kernel.sharding == param_shardings(mesh, sharded["params"])["score"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 1)
    np.testing.assert_array_equal(jax.device_get(kernel), variables["params"]["score"]["kernel"])


@pytest.mark.parametrize("std", [0.2, 4.0])
def test_normalised_scores_come_back_from_the_folder(tmp_path, std):
    """(s - mean) / std, the bias in config.json: with `std` 0.2 a gain of 5, and twice in a row as one."""
    model, variables = tiny_model(lm_head=False, score_head=True, qkv_bias=False, num_layers=2, windows=(None, None))
    before = scores(model, variables)
    config, params = rescale_scores(model.config, variables["params"], 1.5, std)
    wanted = (before - 1.5) / std
    np.testing.assert_allclose(scores(model.rebuild(config), {"params": params}), wanted, rtol=1e-4, atol=1e-4)
    config, params = rescale_scores(config, params, -0.5, 2.0)
    wanted = (wanted + 0.5) / 2
    models.save(tmp_path / "out", model.rebuild(config), {"params": params}, None)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["score_bias"] == pytest.approx((-1.5 / std + 0.5) / 2)
    np.testing.assert_allclose(scores(*load(tmp_path / "out")), wanted, rtol=1e-4, atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"add {written['score_bias']:.6g}" in card
    with pytest.raises(ValueError, match="all the same"):
        rescale_scores(config, params, 0.0, 0.0)


def test_the_card(tmp_path):
    model, variables = tiny_model(lm_head=False, score_head=True)
    models.save(tmp_path / "rm", model, variables, None, method="reward")
    card = (tmp_path / "rm" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "A reward model." in card
    assert "AutoModelForSequenceClassification.from_pretrained(path)" in card and "CausalLM" not in card
    assert "make_scorer(model, variables)" in card and "(id 96)" in card and "score_bias" not in card


@pytest.mark.parametrize(
    ("labels", "number"),
    [({}, 2), ({"num_labels": 3}, 3), ({"id2label": {"0": "a", "1": "b"}}, 2), ({"id2label": {"0": "a"}}, None)],
)
def test_only_one_label_can_be_read(tmp_path, labels, number):
    """transformers writes nothing for two labels, its default."""
    tiny.write_folder(tmp_path, tiny.CONFIGS["llama3"])
    hf = {**tiny.CONFIGS["llama3"], "architectures": ["LlamaForSequenceClassification"], **labels}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    if number is None:
        assert load_config(tmp_path).score_head
        with pytest.raises(ValueError, match=r"tensor score\.weight is missing"):
            load(tmp_path)
        return
    with pytest.raises(ValueError, match=rf"{tmp_path}: .*num_labels={number}; a reward model gives one score"):
        load(tmp_path)


def test_the_head_lies_where_transformers_puts_it(tmp_path):
    """`score.weight`, `[1, hidden]`, without the prefix of the rest; a lost LM head beside it is left alone."""
    content = tiny.write_folder(tmp_path, tiny.CONFIGS["gpt2"])
    weight = np.random.default_rng(1).normal(size=(1, 64)).astype(np.float32)
    hf = {**tiny.CONFIGS["gpt2"], "architectures": ["GPT2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_file({**content, "score.weight": weight}, tmp_path / "model.safetensors")
    model, variables = load(tmp_path)
    assert model.config.score_head and not model.config.lm_head
    np.testing.assert_array_equal(variables["params"]["score"]["kernel"], weight.T)


def make_tokenizer(words: list[str], **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


WORDS = ["<unk>", "<s>", "</s>", "<pad>", "a", "b", "c"]


@pytest.mark.parametrize(
    ("special", "eos_ids", "kept", "pad"),
    [
        ({"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}, (2,), None, 3),
        ({"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}, (2,), None, 0),
        ({"eos_token": "</s>", "bos_token": "<s>"}, (2,), None, 1),
        ({"eos_token": "</s>", "bos_token": "</s>"}, (2, 6), None, 5),
        ({"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}, (2, 0), None, 6),
        # A foreign reward model that pads with EOS was trained to be read before it: its choice stays.
        ({"eos_token": "</s>", "pad_token": "</s>"}, (2,), 2, 2),
        ({"eos_token": "</s>"}, (2,), 4, 4),
    ],
)
def test_what_pads_a_reward_model(tmp_path, special, eos_ids, kept, pad):
    config = tiny_config(vocab_size=9, lm_head=False, score_head=True, eos_ids=eos_ids, pad_id=kept)
    tokenizer = make_tokenizer(WORDS, **special)
    before = tokenizer.pad_token
    chosen, padded = with_padding(config, tokenizer)
    assert (chosen.pad_id, padded.pad_token_id) == (pad, pad)
    assert tokenizer.pad_token == before
    padded.save_pretrained(tmp_path)
    again = models.load_tokenizer(_with_config(tmp_path))
    batch = again(["a b c", "a"], padding=True)
    assert batch["input_ids"] == [[4, 5, 6], [4, pad, pad]]


def _with_config(folder):
    (folder / "config.json").write_text("{}")
    return folder


def test_padding_without_a_tokenizer():
    config = tiny_config(lm_head=False, score_head=True, eos_ids=(96, 95))
    assert with_padding(config)[0].pad_id == 94
    assert with_padding(replace(config, pad_id=7))[0].pad_id == 7


def test_a_policy_that_pads_with_eos_gets_another_token(tmp_path):
    policy, variables = tiny_model(eos_ids=(2,), pad_id=2)
    model, scorer = models.add_score_head(policy, variables, KEY)
    models.save(tmp_path / "rm", model, scorer, None)
    assert load_config(tmp_path / "rm").pad_id == 96
    assert models.add_score_head(policy, variables, KEY, keep_lm_head=True)[0].config.pad_id == 2
