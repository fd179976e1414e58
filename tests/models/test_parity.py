"""Logits against transformers, live: every family, every numerical field, both directions, and SmolLM2 from GGUF."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.config import ModelConfig, Rope, extend_context, rotary_dim
from jaxalign.models.export import save
from jaxalign.models.pretrained import load, load_tokenizer
from jaxalign.models.transformer import Model
from jaxalign.types import TokenRows
from tests.models import tiny
from tests.models.dense import DENSE, EXTENDED, VARIANTS

pytestmark = pytest.mark.parity

LENGTH = 96
LENGTHS = (96, 61, 17)  # beyond the windows (16) and the original context (32)
TOLERANCE = 1e-4

# Fields of our config that change logits; STRUCTURE changes the parameters' shapes; INERT is read by others only.
NUMERIC = {
    "norm", "norm_eps", "norm_bias", "norm_plus_one", "norm_place", "parallel_residual", "shared_norm", "activation",
    "gated_mlp", "rope", "ropes", "learned_positions", "windows", "qk_norm", "qk_norm_over", "qkv_bias", "output_bias",
    "mlp_bias", "attention_scale", "attention_softcap", "logit_softcap", "embedding_multiplier", "residual_multiplier",
    "logit_multiplier", "tie_embeddings", "norm_topk_prob", "experts_per_token",
}  # fmt: skip
STRUCTURE = {
    "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "lm_head",
    "score_head", "score_labels", "sparse_layers", "num_experts", "expert_mlp_dim", "shared_mlp_dim",
}  # fmt: skip
INERT = {
    "family", "max_position", "dropout", "attention_dropout", "bos_id", "eos_ids", "pad_id", "score_bias",
    "router_aux_loss_coef", "lora",
}  # fmt: skip
SHARED = {"theta", "kind", "partial", "interleaved"}
ROPE_FIELDS = {
    "default": SHARED,
    "linear": {*SHARED, "factor"},
    "llama3": {*SHARED, "factor", "low_freq_factor", "high_freq_factor", "original_max_position"},
    "longrope": {*SHARED, "short_factors", "long_factors", "long", "attention_factor"},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model of transformers: what it says with padding on either side, and the folder that it was saved to."""

    folder: Path
    logits: dict[str, np.ndarray]


@functools.cache
def padded(side: str, vocab: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Ragged token ids and their mask, int64 `[3, LENGTH]`."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(4, vocab, (len(LENGTHS), LENGTH))
    mask = np.stack([np.arange(LENGTH) < n for n in LENGTHS]).astype(np.int64)
    return tokens, mask if side == "right" else mask[:, ::-1].copy()


def torch_logits(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`[rows, length, vocab]` from a model of transformers, in its dtype; positions count real tokens."""
    torch = pytest.importorskip("torch")
    positions = np.maximum(np.cumsum(mask, -1) - 1, 0)
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
        )
    return output.logits.numpy()


def compiled(model: Model) -> Callable[[Any, np.ndarray, np.ndarray], np.ndarray]:
    """`(variables, tokens, mask) -> float32 [rows, length, vocab]` from ours."""

    @jax.jit
    def run(variables, tokens, mask):
        hidden, _, _ = model.apply(variables, TokenRows.from_padded(tokens, mask))
        return model.logits(variables, hidden)

    return lambda variables, tokens, mask: np.asarray(run(variables, jnp.asarray(tokens), jnp.asarray(mask)))


def our_logits(model: Model, variables: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float32 `[rows, length, vocab]` from ours."""
    return compiled(model)(variables, tokens, mask)


def difference(one: np.ndarray, other: np.ndarray, mask: np.ndarray) -> float:
    """Largest difference on real tokens; infinite where the shapes differ."""
    return float(np.abs(one - other)[mask > 0].max()) if one.shape == other.shape else float("inf")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Case by name of a tiny config; transformers makes the model, its parameters are drawn anew, and it is saved."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    @functools.cache
    def make(name: str) -> Case:
        folder = tmp_path_factory.mktemp("parity") / "model"
        hf = dict(tiny.CONFIGS[name])
        config = transformers.AutoConfig.for_model(hf.pop("model_type"), **hf)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                is_norm = "norm" in key or ".ln_" in key
                # Gemma's norms begin at 0: they multiply by 1 + weight.
                mean = float(parameter.mean()) if is_norm and key.endswith("weight") else 0.0
                parameter.normal_(mean, config.initializer_range)
        model.save_pretrained(folder)
        return Case(folder, {side: torch_logits(model, *padded(side)) for side in ("right", "left")})

    return make


def load_case(case: Case, name: str) -> tuple[Model, Any]:
    """Ours; under longrope with the factors that transformers takes at this length."""
    model, variables = load(case.folder)
    return (model.rebuild(extend_context(model.config)) if name in EXTENDED else model), variables


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_logits(cases, name):
    """With padding on either side."""
    case, (model, variables) = cases(name), load_case(cases(name), name)
    run = compiled(model)
    for side, theirs in case.logits.items():
        tokens, mask = padded(side)
        assert theirs[mask > 0].std(-1).min() > 1
        assert difference(run(variables, tokens, mask), theirs, mask) < TOLERANCE


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_export(cases, name, tmp_path):
    """Import, export, and transformers computes the same logits from it as from its own."""
    import transformers

    case = cases(name)
    model, variables = load(case.folder)
    save(tmp_path / "out", model, variables, None, max_shard_size=60_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", attn_implementation="eager", output_loading_info=True
        )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert again.dtype.is_floating_point and str(again.dtype) == "torch.float32"
    np.testing.assert_array_equal(torch_logits(again, *padded("left")), case.logits["left"])
    ids = again.generation_config
    assert ids.bos_token_id == 1 and ids.eos_token_id == tiny.CONFIGS[name]["eos_token_id"]


@pytest.mark.parametrize("name", ["llama3.1", "llama-linear", "mistral", "qwen2-windows", "qwen3"])
def test_config_of_transformers_4(cases, name):
    """The keys before transformers 5: `rope_theta` and `rope_scaling`, and windows without `layer_types`."""
    case = cases(name)
    expected = load(case.folder)[0].config
    old = json.loads((case.folder / "config.json").read_text())
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    old.pop("layer_types", None)
    text = json.dumps(old)
    (case.folder / "config.json").write_text(text)
    assert load(case.folder)[0].config == expected


def mutations(config: ModelConfig) -> dict[str, ModelConfig]:
    """Every numerical field of a config that counts in it, changed for itself."""
    change = functools.partial(dataclasses.replace, config)
    found = {}
    flags = {"learned_positions", "qk_norm", "qkv_bias", "output_bias", "tie_embeddings", "norm_plus_one"}
    # Where experts are in every layer there is no other feed-forward layer to misread, and without them no router.
    if not (config.sparse_layers and all(config.sparse_layers)):
        flags |= {"gated_mlp", "mlp_bias"}
    if config.num_experts:
        flags.add("norm_topk_prob")
        found["experts_per_token"] = change(experts_per_token=config.experts_per_token + 1)
    for field in sorted(flags):
        found[field] = change(**{field: not getattr(config, field)})
    for field in ("embedding_multiplier", "residual_multiplier", "logit_multiplier"):
        found[field] = change(**{field: getattr(config, field) * 1.5})
    found["norm"] = change(norm="layer" if config.norm == "rms" else "rms")
    found["norm_eps"] = change(norm_eps=1e-6)
    if config.norm == "layer":
        found["norm_bias"] = change(norm_bias=not config.norm_bias)
    if config.shared_norm:
        found["shared_norm"] = change(shared_norm=False)
    else:
        for place in {"pre", "post", "both"} - {config.norm_place}:
            found[f"norm_place={place}"] = change(norm_place=place)
    found["parallel_residual"] = change(parallel_residual=not config.parallel_residual, shared_norm=False)
    if config.qk_norm:
        found["qk_norm_over"] = change(qk_norm_over="projection" if config.qk_norm_over == "head" else "head")
    found["attention_scale"] = change(attention_scale=1.3 * (config.attention_scale or config.head_dim**-0.5))
    for field, size in (("attention_softcap", 3.0), ("logit_softcap", 8.0)):
        value = getattr(config, field)
        found[field] = change(**{field: size if value is None else None})
        if value is not None:
            found[f"{field}*2"] = change(**{field: 2 * value})
    for activation in {"silu", "gelu", "gelu_tanh"} - {config.activation}:
        found[f"activation={activation}"] = change(activation=activation)
    # The pattern stays, and with it the parameters' tree.
    found["windows"] = change(windows=tuple(20 if window is None else window + 1 for window in config.windows))
    return found | rope_mutations(config)


def rope_mutations(config: ModelConfig) -> dict[str, ModelConfig]:
    """Another rope in the layers of each rope; of two kinds of layers, each with the other's."""
    change = functools.partial(dataclasses.replace, config)
    if not config.ropes:
        if config.rope is None:
            return {"rope": change(rope=Rope(500.0))}
        found = {f"rope.{field}": change(rope=rope) for field, rope in changed_ropes(config.rope, config).items()}
        return {**found, "rope": change(rope=None)}
    one, other = dict.fromkeys(config.ropes)
    swapped = {one: other, other: one}
    found = {"ropes": change(ropes=tuple(swapped[rope] for rope in config.ropes))}
    for rope in filter(None, (one, other)):
        for field, changed in changed_ropes(rope, config).items():
            ropes = tuple(changed if each == rope else each for each in config.ropes)
            found[f"ropes.{config.ropes.index(rope)}.{field}"] = change(ropes=ropes)
    return found


def changed_ropes(rope: Rope, config: ModelConfig) -> dict[str, Rope]:
    change, pairs, found = functools.partial(dataclasses.replace, rope), rotary_dim(rope, config.head_dim) // 2, {}
    fields = ROPE_FIELDS[rope.kind] - {"kind", "partial", "interleaved", "long", "short_factors", "long_factors"}
    for field in fields:
        found[field] = change(**{field: getattr(rope, field) * 2})
    found["interleaved"] = change(interleaved=not rope.interleaved)
    if rope.kind == "longrope":
        used = "long_factors" if rope.long else "short_factors"
        found[used] = change(**{used: (*getattr(rope, used)[:-1], 5.0 * getattr(rope, used)[-1])})
        found["long"] = change(long=not rope.long)
    else:
        found["partial"] = change(partial=0.5 if rope.partial == 1.0 else 1.0)
    for kind in set(ROPE_FIELDS) - {rope.kind}:
        # A factor that the default kind leaves at 1 would change nothing.
        factor, original = max(rope.factor, 2.0), min(rope.original_max_position, 64)
        factors = tuple(2.0 + i for i in range(pairs))
        found[f"kind={kind}"] = change(
            kind=kind, factor=factor, original_max_position=original, short_factors=factors, long_factors=factors
        )
    return found


def completed(model: Model, variables: Any) -> Any:
    """The variables, and where the (mutated) model has further parameters, ones that make a difference."""
    have = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    rng = np.random.default_rng(7)

    def fill(path, leaf):
        drawn = jnp.asarray(0.2 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale"), leaf.dtype)
        return have[path] if path in have and have[path].shape == leaf.shape else drawn

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(model.init, jax.random.key(0)))


def test_every_field_is_classified():
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    assert names == NUMERIC | STRUCTURE | INERT
    assert {field.name for field in dataclasses.fields(Rope)} == {"max_position"}.union(*ROPE_FIELDS.values())


def unseen(case: Case, model: Model, variables: Any, mutated: dict[str, ModelConfig]) -> dict[str, float]:
    """The mutations that leave the logits as they are, with the difference that they make."""
    tokens, mask = padded("right")
    found = {}
    for field, config in mutated.items():
        other = model.rebuild(config)
        try:
            # Uncompiled: the operations are the same ones again, a program for each mutation would not be.
            with jax.disable_jit():
                ours = our_logits(other, completed(other, variables), tokens, mask)
        except Exception as error:
            raise AssertionError(f"{field} could not be changed") from error
        seen = difference(ours, case.logits["right"], mask)
        if not seen > 1e-3:
            found[field] = seen
    return found


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("llama-biases", ""),
        ("llama3.1", "rope"),
        ("llama-linear", "rope"),
        ("mistral", ""),
        ("qwen2-windows", ""),
        ("qwen3", ""),
        ("mixtral", "norm_topk_prob"),
        ("qwen2_moe", "norm_topk_prob"),
        ("qwen3_moe", ""),
        ("gpt2", ""),
    ],
)
def test_every_field_counts(cases, name, part):
    """With one numerical field misread, parity fails: so the parity above has seen that field."""
    model, variables = load(cases(name).folder)
    mutated = {field: config for field, config in mutations(model.config).items() if field.startswith(part)}
    assert not unseen(cases(name), model, variables, mutated)


@pytest.mark.parametrize("name", [name for name in DENSE if name not in VARIANTS])
def test_a_familys_own_fields_count(cases, name):
    """The same for the families that came later, of the fields in which they differ from a plain decoder."""
    model, variables = load_case(cases(name), name)
    sizes = [getattr(model.config, field.name) for field in dataclasses.fields(ModelConfig)[:9]]
    plain = ModelConfig(*sizes, windows=(None,) * model.config.num_layers)
    own = {field for field in NUMERIC if getattr(plain, field) != getattr(model.config, field)}
    own = {"norm_eps", *own}
    mutated = {key: config for key, config in mutations(model.config).items() if re.split("[=.*]", key)[0] in own}
    assert own == {re.split("[=.*]", key)[0] for key in mutated}
    # One other activation, one other kind of rope.
    mutated = {re.sub("=.*", "", key): config for key, config in mutated.items()}
    assert not unseen(cases(name), model, variables, mutated)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "gpt2"])
def test_gguf(name, kind, tmp_path):
    """A GGUF file read by us and by transformers."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    # transformers reads neither qwen3's head_dim nor gpt2's n_positions from the file, so they are its defaults here.
    defaults = {"qwen3": {"head_dim": 128}, "gpt2": {"n_positions": 1024}}
    hf = tiny.CONFIGS[name] | defaults.get(name, {})
    # It takes the vocabulary's size from the tokens.
    tokens = {"tokenizer.ggml.tokens": [f"token {i}" for i in range(hf["vocab_size"])]}
    tiny.write_gguf(tmp_path / "model.gguf", hf, tiny.arrays(hf), kind, tokens)
    model, variables = load(tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", attn_implementation="eager", dtype="float32"
    )
    tokens, mask = padded("right")
    ours = our_logits(model, variables, tokens, mask)
    assert difference(ours, torch_logits(theirs, tokens, mask), mask) < TOLERANCE


@pytest.fixture(scope="module")
def smollm2_theirs(smollm2):
    """SmolLM2 as transformers dequantises it."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, attn_implementation="eager", dtype="float32"
    )


@pytest.fixture(scope="module")
def smollm2_batch(smollm2):
    """Chats of different lengths, left-padded: token ids and mask."""
    tokenizer = load_tokenizer(smollm2)
    questions = ("What is 17 + 25?", "Write a haiku about the sea, then explain each of its lines.", "Hi")
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats]
    tokenizer.padding_side = "left"
    encoded = tokenizer(texts, padding=True)
    return np.array(encoded["input_ids"]), np.array(encoded["attention_mask"])


def test_smollm2(smollm2, smollm2_theirs, smollm2_batch, tmp_path):
    """Logits from the GGUF file, and transformers' from our export of it."""
    import transformers

    theirs = torch_logits(smollm2_theirs, *smollm2_batch)
    model, variables = load(smollm2)
    ours = our_logits(model, variables, *smollm2_batch)
    # With logits up to 38, float32 itself is 1e-4 away from float64: ours must be as near to it as transformers' are.
    tokens, mask = (array[1:2, :][:, smollm2_batch[1][1] > 0] for array in smollm2_batch)
    exact = torch_logits(copy.deepcopy(smollm2_theirs).double(), tokens, mask)
    rounding, error = (difference(x[1:2, smollm2_batch[1][1] > 0], exact, mask) for x in (theirs, ours))
    assert error < 1.5 * rounding < 3 * TOLERANCE
    assert difference(ours, theirs, smollm2_batch[1]) < 2 * TOLERANCE
    assert np.abs(ours - theirs)[smollm2_batch[1] > 0].mean() < TOLERANCE / 3
    save(tmp_path / "out", model, variables, load_tokenizer(smollm2))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    np.testing.assert_array_equal(torch_logits(again, *smollm2_batch), theirs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Add 1234 and 5678."}]
    expected = str(load_tokenizer(smollm2).apply_chat_template(messages, tokenize=False))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    assert tokenizer(expected)["input_ids"] == load_tokenizer(smollm2)(expected)["input_ids"]


def test_smollm2_tokenizer(smollm2):
    """transformers' own rebuild agrees where no digits meet: it does not split them one by one, SmolLM2 does."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ours = load_tokenizer(smollm2)
    texts = (
        "Hello,  world!\n\n\tdef f(x): return x",
        "naïve café 東京 👍🏽 can't WE'LL",
        "<|im_start|>A 1 b<|im_end|>\n",
    )
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert len(ours) == len(theirs)
    assert len(ours("2025")["input_ids"]) == 4
