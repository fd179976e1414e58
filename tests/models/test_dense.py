"""The dense families without torch: layers that fold, layouts by hand, reading from a cache, what is refused."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxalign.models import ModelConfig, Rope, build, init_cache
from jaxalign.models.attention import Keys, attend
from jaxalign.models.config import Layer, count_params, extend_context, forward_flops, locate, mean_attended, segments
from jaxalign.models.dense_families import DENSE_FAMILIES
from jaxalign.models.families import from_hf
from jaxalign.models.family_docs import describe_families
from jaxalign.models.pretrained import load
from jaxalign.sampling import Config, make_decoding, make_generate
from jaxalign.sharding import RULES, MeshConfig, make_mesh
from jaxalign.types import TokenRows
from tests.models import tiny
from tests.models.dense import DENSE

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def drawn(model, rng):
    """Variables in which every part of a block matters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize(
    ("hf", "folded"),
    [
        # Gemma 3 1B: 26 layers, every sixth global. Gemma 2 2B: 26, every second. SmolLM 3: 36, every fourth without
        # positions. Command R7B: 32, every fourth without window and positions.
        ({"model_type": "gemma3_text", "num_hidden_layers": 26, "sliding_window": 512}, [("LLLLLG", 4), ("L", 2)]),
        ({"model_type": "gemma2", "num_hidden_layers": 26, "num_key_value_heads": 4}, [("LG", 13)]),
        ({"model_type": "smollm3", "num_hidden_layers": 36}, [("GGGN", 9)]),
        ({"model_type": "cohere2", "num_hidden_layers": 32}, [("LLLN", 8)]),
    ],
)
def test_patterns_of_layers_fold(hf, folded):
    config = from_hf(SMALL | hf)
    local, everywhere = config.layer_ropes[0], max(filter(None, config.layer_ropes), key=lambda rope: rope.theta)
    window = next(iter(filter(None, config.windows)), None)
    kinds = {"L": Layer(window, local, False), "G": Layer(None, everywhere, False), "N": Layer(None, None, False)}
    found = [(segment.layers, segment.repeats) for segment in segments(config)]
    assert found == [(tuple(kinds[kind] for kind in pattern), repeats) for pattern, repeats in folded]
    last = config.num_layers - 1
    assert locate(config, last) == (len(folded) - 1, folded[-1][1] - 1, len(folded[-1][0]) - 1)


def test_ropes_of_gemma3_by_version():
    """The 4B's config.json (a text part, transformers 4) and the same in the words of transformers 5."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    old = {"model_type": "gemma3", "text_config": text | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}}
    entries = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = from_hf(old | {"eos_token_id": [1, 106]})
    assert config == from_hf(
        {**text, "model_type": "gemma3_text", "rope_parameters": entries, "eos_token_id": [1, 106]}
    )
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262208, 8, 4, 256)
    assert config.layer_ropes[4:7] == (Rope(1e4), Rope(1e6, "linear", 8.0), Rope(1e4))
    assert config.windows[4:7] == (1024, None, 1024)
    assert config.attention_scale == 256**-0.5 and config.eos_ids == (1, 106)


def test_layout_of_fused_tensors(tmp_path):
    # Pythia keeps query, key and value of a head together: of heads of 16, dimension 3 of head 2's key is row
    # 2 * 48 + 16 + 3. Phi 3 keeps 4 query heads, then 2 key heads: dimension 5 of key head 1 is row 64 + 16 + 5; the
    # gate's 96 rows come before those of up.
    content = tiny.write_folder(tmp_path / "pythia", tiny.CONFIGS["pythia"])
    block = load(tmp_path / "pythia")[1]["params"]["segment_0"]["block_0"]
    fused = "gpt_neox.layers.1.attention.query_key_value."
    np.testing.assert_array_equal(block["attention"]["key"]["kernel"][1, :, 2, 3], content[fused + "weight"][115])
    assert block["attention"]["key"]["bias"][1, 2, 3] == content[fused + "bias"][115]
    content = tiny.write_folder(tmp_path / "phi3", tiny.CONFIGS["phi3"])
    block = load(tmp_path / "phi3")[1]["params"]["segment_0"]["block_0"]
    fused = content["model.layers.2.self_attn.qkv_proj.weight"]
    np.testing.assert_array_equal(block["attention"]["key"]["kernel"][2, :, 1, 5], fused[85])
    np.testing.assert_array_equal(
        block["mlp"]["up"]["kernel"][2], content["model.layers.2.mlp.gate_up_proj.weight"][96:].T
    )


@pytest.mark.parametrize("name", ["pythia", "phi3", "gemma3"])
def test_a_mesh_gets_the_same_numbers(tmp_path, name):
    tiny.write_folder(tmp_path, tiny.CONFIGS[name])
    sharded = load(tmp_path, mesh=make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))[1]
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[1], jax.device_get(sharded))


@pytest.mark.parametrize("name", list(DENSE))
def test_parameters_are_counted_and_have_a_place(name):
    """Matrices are what is counted, and each has a rule; what is left are norms and biases."""
    config = from_hf(tiny.CONFIGS[name])
    shapes = {"/".join(path): shape for path, shape in tiny.leaf_shapes(config).items()}
    matrices = {path: shape for path, shape in shapes.items() if path.endswith(("kernel", "embedding"))}
    assert sum(int(np.prod(shape)) for shape in matrices.values()) == count_params(config)
    unplaced = {path for path in shapes if not any(re.search(pattern, path) for pattern, _ in RULES)}
    assert all(re.search(r"(_norm/(scale|bias)|attention/output/bias|mlp/down/bias)$", path) for path in unplaced)


def test_windows_cost_less():
    # Of 10 tokens half are seen on average, 5; under a window of 4, (4 * 10 - 4^2 / 2) / 10 = 3.2; together 4.1.
    config = from_hf(tiny.CONFIGS["gemma2"] | {"sliding_window": 4})
    assert mean_attended(config, 10) == pytest.approx(4.1)
    # Scores and their mixing: 2 * 2 operations for each of 4 layers, 4 heads, 24 dimensions.
    more = forward_flops(config, 10, 41, 0) - forward_flops(config, 10, 0, 0)
    assert more == 2 * 2 * 4 * 4 * 24 * 41


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "smollm3", "cohere2", "pythia"])
def test_the_cache_gives_what_the_whole_text_gives(name, tmp_path):
    """Two prompts of different lengths, one beyond the windows, and tokens one by one: greedy, the same logits."""
    tiny.write_folder(tmp_path, tiny.CONFIGS[name])
    model, variables = load(tmp_path)
    rng, lengths, steps = np.random.default_rng(6), np.array([21, 9]), 5
    tokens, two = rng.integers(3, 160, (2, 21 + steps)).astype(np.int32), np.arange(2)

    @jax.jit
    def read(variables, rows, cache):
        hidden, cache, _ = model.apply(variables, rows, cache)
        return model.logits(variables, hidden), cache

    def padded(lengths):
        return TokenRows.from_padded(jnp.asarray(tokens), jnp.asarray(np.arange(21 + steps) < lengths[:, None]))

    empty = init_cache(model.config, 2, 0)
    logits, cache = read(variables, padded(lengths), empty)
    found = [logits[two, lengths - 1]]
    for step in range(steps):
        tokens[two, lengths + step] = np.asarray(found[-1]).argmax(-1)
        ones = jnp.ones((2, 1), jnp.int32)
        new = jnp.asarray(tokens[two, lengths + step])[:, None]
        rows = TokenRows(new, jnp.asarray(lengths[:, None] + step, jnp.int32), ones, jnp.zeros_like(ones))
        logits, cache = read(variables, rows, cache)
        found.append(logits[:, 0])
    whole = np.asarray(read(variables, padded(lengths + steps), empty)[0])
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(np.stack(found)[:, row], whole[row, length - 1 : length + steps], atol=1e-4)


def test_the_sampler_draws_what_the_whole_text_says():
    """All of it in one model: layers with a window and a partial, interleaved, scaled rope, layers without positions,
    caps, multipliers, norms before and after; prompts of different lengths in fewer slots than prompts."""
    rope = Rope(300.0, "linear", 2.0, partial=0.5, interleaved=True)
    config = ModelConfig(
        "gemma3_text", 97, 48, 4, 4, 2, 12, 80, 512, norm_plus_one=True, norm_place="both", ropes=(rope, None) * 2,
        windows=(7, None) * 2, qk_norm=True, attention_scale=0.4, attention_softcap=4.0, logit_softcap=9.0,
        embedding_multiplier=3.0, residual_multiplier=0.7, logit_multiplier=1.5, tie_embeddings=True,
    )  # fmt: skip
    assert [(len(segment.layers), segment.repeats) for segment in segments(config)] == [(2, 2)]
    model, rng = build(config), np.random.default_rng(8)
    variables = drawn(model, rng)
    prompts = np.zeros((4, 16), np.int32)
    lengths = np.array([16, 3, 11, 7], np.int32)
    for row, length in zip(prompts, lengths, strict=True):
        row[:length] = rng.integers(1, 97, length)
    generate = jax.jit(make_generate(model, Config(max_new_tokens=8, temperature=0.0, slots=2)))
    samples = jax.device_get(generate(make_decoding(model)(variables), prompts, lengths, jax.random.key(1)))
    text = np.zeros((4, 24), np.int32)
    for row, prompt, length, tokens in zip(text, prompts, lengths, samples.tokens, strict=True):
        row[: length + 8] = [*prompt[:length], *tokens]
    rows = TokenRows.from_padded(text, np.arange(24)[None] < lengths[:, None] + 8)
    logits = jax.jit(lambda v: model.logits(v, model.apply(v, rows)[0]))(variables)
    best = np.asarray(logits).argmax(-1)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(samples.tokens[row], best[row, length - 1 : length + 7])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_by_its_formula(softcap):
    """Values and gradients against softmax(cap * tanh(scale q k / cap)) v in float64, per head of each query."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        query = jnp.asarray(rng.normal(size=(2, 5, 4, 6)))
        key, value = (jnp.asarray(rng.normal(size=(2, 2, 7, 6))) for _ in range(2))
        mask = jnp.asarray(np.arange(7)[None, None] <= np.arange(5)[None, :, None] + np.array([2, 0])[:, None, None])
        weights = jnp.asarray(rng.normal(size=query.shape))

        def plain(query, key, value):
            twice = (jnp.repeat(x, 2, axis=1) for x in (key, value))
            keys, values = twice
            scores = 0.9 * jnp.einsum("rqhd,rhkd->rhqk", query, keys)
            scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
            probs = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
            return (jnp.einsum("rhqk,rhkd->rqhd", probs, values) * weights).sum()

        def ours(query, key, value):
            return (attend(query, (Keys(key, value, mask),), scale=0.9, softcap=softcap) * weights).sum()

        def in_two(query, key, value):
            parts = (slice(0, 3), slice(3, 7))
            keys = tuple(Keys(key[:, :, part], value[:, :, part], mask[:, :, part]) for part in parts)
            return (attend(query, keys, scale=0.9, softcap=softcap) * weights).sum()

        def run(each):
            return jax.jit(jax.value_and_grad(each, (0, 1, 2)))(query, key, value)

        for each in (ours, in_two):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), run(each), run(plain))


def test_longrope_has_two_contexts():
    config = from_hf(tiny.CONFIGS["phi3-long"])
    rope = config.layer_ropes[0]
    assert rope is not None and (config.max_position, rope.long, rope.max_position) == (32, False, 128)
    # sqrt(1 + ln(128 / 32) / ln 32) = sqrt(1 + 2 / 5).
    assert rope.attention_factor == pytest.approx(1.4**0.5)
    assert extend_context(config) == replace(config, rope=replace(rope, long=True), max_position=128)
    with pytest.raises(ValueError, match="without longrope"):
        extend_context(from_hf(tiny.CONFIGS["phi3"]))


def test_pythia_as_the_hub_has_it(tmp_path, caplog):
    """The head's old name, and the tables that old files carry."""
    content = tiny.write_folder(tmp_path, tiny.CONFIGS["pythia"])
    expected = load(tmp_path)[1]
    old = {name.replace("lm_head.", "embed_out."): array for name, array in content.items()}
    tables = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")
    old |= {f"gpt_neox.layers.0.{name}": np.ones((1, 1, 8, 8), np.float32) for name in tables}
    save_file(old, tmp_path / "model.safetensors")
    rope = {"rotary_emb_base": 500, "rotary_pct": 0.25}
    hf = {key: value for key, value in tiny.CONFIGS["pythia"].items() if key != "rope_parameters"} | rope
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with caplog.at_level(logging.WARNING, "jaxalign"):
        model, variables = load(tmp_path)
    assert model.config == from_hf(tiny.CONFIGS["pythia"]) and not caplog.records
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_gemma3_with_images_as_the_hub_has_it(tmp_path, caplog):
    content = tiny.write_folder(tmp_path, tiny.CONFIGS["gemma3"])
    model, expected = load(tmp_path)
    old = {f"language_model.{name}": array for name, array in content.items()}
    images = {"vision_tower.a": np.ones(3, np.float32), "multi_modal_projector.b": np.ones(3, np.float32)}
    save_file(old | images, tmp_path / "model.safetensors")
    text = {key: value for key, value in tiny.CONFIGS["gemma3"].items() if key != "eos_token_id"}
    text["final_logit_softcapping"] = None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text, "eos_token_id": 2}))
    with caplog.at_level(logging.WARNING, "jaxalign"):
        again, variables = load(tmp_path)
    assert again.config == replace(model.config, logit_softcap=None) and not caplog.records
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear'"),
        ("cohere2", {"use_qk_norm": True}, "use_qk_norm"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 5}, "use_sliding_window"),
        ("olmo2", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ("granite", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_refused_by_name(name, changes, named):
    with pytest.raises(ValueError, match=named):
        from_hf(tiny.CONFIGS[name] | changes)


def test_a_cap_that_the_class_with_images_leaves_out_is_refused():
    text = tiny.CONFIGS["gemma3"]
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        from_hf({"model_type": "gemma3", "text_config": text})


def test_null_is_not_the_default_of_a_cap():
    config = from_hf(tiny.CONFIGS["gemma2"] | {"attn_logit_softcapping": None, "use_bidirectional_attention": None})
    assert (config.attention_softcap, config.logit_softcap) == (None, 8.0)


def test_every_family_has_a_case():
    assert {hf["model_type"] for hf in tiny.CONFIGS.values()} >= set(DENSE_FAMILIES)


def test_the_docs_are_those_of_the_table():
    """`python -m jaxalign.models.family_docs docs/models.md` writes them."""
    assert (ROOT / "docs" / "models.md").read_text() == describe_families()
