"""GGUF files: every type and architecture, rope scaling, errors, and the tokenizer in the metadata."""

import json
import logging

import gguf
import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxalign.models.families import from_hf
from jaxalign.models.gguf import open_gguf
from jaxalign.models.gguf_tokenizer import SPLITS, rebuild_tokenizer
from jaxalign.models.pretrained import load, load_config, load_tokenizer
from jaxalign.sharding import MeshConfig, make_mesh
from tests.models import tiny

ARCHITECTURES = ["llama3", "llama-biases", "qwen2", "qwen3", "gpt2"]
TEXT = "It's 2025: we're at 12.50 °C!\n\n  naïve café\t東京 👍🏽 DON'T e\u0301 \u00a0 end  "


def config_of(name: str, **changes) -> dict:
    # Blocks of 32 weights: rows must be multiples of 32. llama.cpp takes SiLU for llama.
    return tiny.CONFIGS[name] | {"head_dim": 32, "hidden_act": "silu", "eos_token_id": 2} | changes


def load_gguf_and_folder(tmp_path, hf, kind, **extra):
    """What a GGUF file gives, and what a folder with the same numbers gives."""
    content = tiny.write_gguf(tmp_path / "model.gguf", hf, tiny.arrays(hf), kind, extra)
    tiny.write_folder(tmp_path / "folder", hf)
    save_file(
        {name: np.ascontiguousarray(array) for name, array in content.items()}, tmp_path / "folder/model.safetensors"
    )
    return load(tmp_path / "model.gguf"), load(tmp_path / "folder")


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_numbers_as_a_folder(tmp_path, name, kind):
    hf = config_of(name) if name != "gpt2" else tiny.CONFIGS["gpt2"]
    (model, variables), (expected, expected_variables) = load_gguf_and_folder(tmp_path, hf, kind)
    assert model.config == expected.config
    assert_same(variables, expected_variables)


@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_a_mesh_gets_the_same_numbers(tmp_path, name):
    hf = config_of(name) if name != "gpt2" else tiny.CONFIGS["gpt2"]
    tiny.write_gguf(tmp_path / "model.gguf", hf, tiny.arrays(hf), "Q8_0")
    _, whole = load(tmp_path / "model.gguf")
    _, sharded = load(tmp_path, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert_same(whole, jax.device_get(sharded))


@pytest.mark.parametrize(
    "rope",
    [
        tiny.LLAMA3_ROPE,
        # Llama 3.1 and 3.2: the released numbers.
        tiny.LLAMA3_ROPE | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192},
        tiny.LLAMA3_ROPE | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192, "factor": 32.0},
    ],
)
def test_llama3_scaling_comes_back_from_its_factors(tmp_path, rope):
    hf = config_of("llama3.1", head_dim=64, rope_parameters=rope)
    tiny.write_gguf(tmp_path / "model.gguf", hf, tiny.arrays(hf))
    assert load_config(tmp_path / "model.gguf") == from_hf(hf)


def test_llama3_scaling_up_to_a_common_multiple(tmp_path):
    # original 64, low 2, high 8 scales the same frequencies by the same factors as original 32, low 1, high 4.
    twice = {"original_max_position_embeddings": 64, "low_freq_factor": 2.0, "high_freq_factor": 8.0}
    hf = config_of("llama3.1", rope_parameters=tiny.LLAMA3_ROPE | twice)
    tiny.write_gguf(tmp_path / "model.gguf", hf, tiny.arrays(hf))
    assert load_config(tmp_path / "model.gguf") == from_hf(config_of("llama3.1"))


def test_other_rope_factors_are_refused(tmp_path, monkeypatch):
    hf = config_of("llama3.1")
    monkeypatch.setattr(tiny, "rope_factors", lambda rope, head_dim: np.linspace(1, 5, head_dim // 2, dtype=np.float32))
    tiny.write_gguf(tmp_path / "model.gguf", hf, tiny.arrays(hf))
    with pytest.raises(ValueError, match=r"model\.gguf: the factors in rope_freqs\.weight"):
        load(tmp_path / "model.gguf")


def test_linear_scaling(tmp_path):
    hf = config_of("llama-linear")
    tiny.write_gguf(tmp_path / "model.gguf", hf, tiny.arrays(hf))
    assert load_config(tmp_path / "model.gguf") == from_hf(hf)


def test_a_window_makes_it_a_mistral(tmp_path):
    hf = config_of("llama2")
    extra = {"llama.attention.sliding_window": 24}
    tiny.write_gguf(tmp_path / "model.gguf", hf, tiny.arrays(hf), extra=extra)
    config = load_config(tmp_path / "model.gguf")
    assert config.family == "mistral" and config.windows == (24,) * 3


def test_end_of_turn_is_an_end(tmp_path):
    hf = config_of("llama2")
    tiny.write_gguf(tmp_path / "model.gguf", hf, tiny.arrays(hf), extra={"tokenizer.ggml.eot_token_id": 7})
    assert load_config(tmp_path / "model.gguf").eos_ids == (2, 7)


def test_gpt2_files_that_repeat_the_table_are_tied(tmp_path):
    content = tiny.arrays(tiny.CONFIGS["gpt2"])
    repeated = content | {"lm_head.weight": content["transformer.wte.weight"]}
    tiny.write_gguf(tmp_path / "model.gguf", tiny.CONFIGS["gpt2"], repeated, "Q8_0")
    model, variables = load(tmp_path / "model.gguf")
    assert model.config.tie_embeddings and "head" not in variables["params"]
    other = content | {"lm_head.weight": content["transformer.wte.weight"] + 1}
    tiny.write_gguf(tmp_path / "model.gguf", tiny.CONFIGS["gpt2"], other, "Q8_0")
    assert not load_config(tmp_path / "model.gguf").tie_embeddings


class TestErrors:
    hf = config_of("llama3")

    def write(self, path, kind="F32", **extra):
        tiny.write_gguf(path, self.hf, tiny.arrays(self.hf), kind, extra)

    def test_type(self, tmp_path):
        self.write(tmp_path / "model.gguf", "Q5_0")
        with pytest.raises(ValueError, match=r"has type Q5_0; supported types: F32, F16, BF16, Q8_0, Q4_0, Q4_1"):
            load(tmp_path / "model.gguf")

    def test_architecture(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(
            ValueError,
            match=r"'gemma' is not read from GGUF .*known: llama, qwen2, qwen3, gpt2\).* Hugging Face folder",
        ):
            load(tmp_path / "model.gguf")

    @pytest.mark.parametrize(
        ("extra", "match"),
        [
            ({"llama.expert_count": 8}, "mixture-of-experts"),
            ({"split.count": 3}, "gguf-split"),
            ({"llama.attention.value_length": 16}, "value_length=16"),
            ({"llama.rope.dimension_count": 16}, r"dimension_count=16"),
            ({"llama.rope.scaling.type": "yarn"}, "yarn"),
            ({"llama.attention.head_count_kv": [2, 1, 2]}, "differs between layers"),
        ],
    )
    def test_settings(self, tmp_path, extra, match):
        self.write(tmp_path / "model.gguf", **extra)
        with pytest.raises(ValueError, match=rf"model\.gguf.*{match}"):
            load(tmp_path / "model.gguf")

    def test_missing_tensor(self, tmp_path):
        content = tiny.arrays(self.hf)
        del content["model.layers.2.self_attn.k_proj.weight"]
        tiny.write_gguf(tmp_path / "model.gguf", self.hf, content)
        with pytest.raises(
            ValueError, match=r"model\.gguf: tensor model\.layers\.2\.self_attn\.k_proj\.weight is missing"
        ):
            load(tmp_path / "model.gguf")

    @pytest.mark.parametrize("left", [200, 3000, 0.5, -64])
    def test_truncated(self, tmp_path, left):
        self.write(tmp_path / "model.gguf")
        whole = (tmp_path / "model.gguf").read_bytes()
        cut = int(len(whole) * left) if isinstance(left, float) else left
        (tmp_path / "model.gguf").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model\.gguf is not a whole GGUF file"):
            load(tmp_path / "model.gguf")

    def test_unused_tensors_are_named(self, tmp_path, caplog):
        self.hf = config_of("llama3") | {"num_hidden_layers": 2}
        content = tiny.arrays(config_of("llama3"))
        with caplog.at_level(logging.WARNING, "jaxalign"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny, "_metadata", lambda hf, original=tiny._metadata: original(self.hf))
            tiny.write_gguf(tmp_path / "model.gguf", config_of("llama3"), content)
            load(tmp_path / "model.gguf")
        assert "9 tensors are not used, among them blk.2." in caplog.text


@pytest.fixture(scope="module")
def trained():
    """A small byte-level vocabulary and its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT * 3, "2025 2025 12 12 don't it's IT'S the naïve naïve 東京 東京"], trainer)
    content = json.loads(tokenizer.to_str())["model"]
    vocabulary = content["vocab"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [" ".join(merge) for merge in content["merges"]]


def byte_level_metadata(trained, pre, **more):
    tokens, merges = trained
    special = ["<|start|>", "<|end|>", "<think>"]
    return {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *special],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        **more,
    }


@pytest.mark.parametrize(("pre", "kind"), [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_byte_level_as_transformers_builds_it(trained, pre, kind):
    tokens, merges = trained
    vocabulary = {token: number for number, token in enumerate(tokens)}
    theirs = getattr(transformers, kind)(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges])
    ours = rebuild_tokenizer(byte_level_metadata(trained, pre)).tokenizer
    expected = theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert len(expected) > 20
    assert ours.encode(TEXT).ids == expected
    assert ours.decode(expected, skip_special_tokens=False) == theirs.decode(expected)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        # By hand from each split's regular expression.
        ("gpt-2", ["I", "'", "VE", " 12345", " ok", "!!", "\n\n", " x"]),
        ("smollm", ["I", "'", "VE", " ", "1", "2", "3", "4", "5", " ok", "!!", "\n\n", " x"]),
        ("llama-bpe", ["I", "'VE", " ", "123", "45", " ok", "!!\n\n", " x"]),
        ("qwen2", ["I", "'VE", " ", "1", "2", "3", "4", "5", " ok", "!!\n\n", " x"]),
        ("tekken", ["I", "'VE", " ", "1", "2", "3", "4", "5", " ok", "!!\n\n", " x"]),
    ],
)
def test_splits(pre, pieces):
    split = SPLITS[pre]().pre_tokenize_str("I'VE 12345 ok!!\n\n x")
    assert [piece for piece, _ in split] == [piece.replace(" ", "Ġ").replace("\n", "Ċ") for piece in pieces]


def test_added_tokens(trained):
    rebuilt = rebuild_tokenizer(byte_level_metadata(trained, "smollm", **{"tokenizer.chat_template": "{{ 1 }}"}))
    size = len(trained[0])
    ids = rebuilt.tokenizer.encode("<|start|>it's<think> 20<|end|>").ids
    assert ids[0] == size and ids[-1] == size + 1 and ids.count(size + 2) == 1
    assert rebuilt.tokenizer.decode(ids, skip_special_tokens=True) == "it's<think> 20"
    assert rebuilt.special_tokens == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert (rebuilt.chat_template, rebuilt.max_length) == ("{{ 1 }}", 512)
    assert rebuilt.tokenizer.get_vocab_size() == size + 3


@pytest.mark.parametrize(
    ("pre", "more", "starts", "ends"),
    [
        ("smollm", {}, False, False),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, False, False),
        ("qwen2", {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, True, True),
    ],
)
def test_bos_and_eos(trained, pre, more, starts, ends):
    tokenizer = rebuild_tokenizer(byte_level_metadata(trained, pre, **more)).tokenizer
    size = len(trained[0])
    ids, bare = tokenizer.encode("the end").ids, tokenizer.encode("the end", add_special_tokens=False).ids
    assert ids == [size] * starts + bare + [size + 1] * ends


def test_unknown_kinds_are_listed(trained):
    with pytest.raises(ValueError, match=r"pre='klingon' is not supported; known: default, gpt-2, smollm"):
        rebuild_tokenizer(byte_level_metadata(trained, "klingon"))
    with pytest.raises(ValueError, match=r"model='t5' is not supported; known: gpt2, llama"):
        rebuild_tokenizer(byte_level_metadata(trained, "qwen2", **{"tokenizer.ggml.model": "t5"}))


def test_an_unnamed_split_is_warned_about(trained, caplog):
    with caplog.at_level(logging.WARNING, "jaxalign"):
        rebuild_tokenizer(byte_level_metadata(trained, "default"))
    assert "GPT-2's way" in caplog.text


def sentencepiece_metadata(pieces, **more):
    """Metadata of a SentencePiece vocabulary; pieces are (text, score) after the three specials and the 256 bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(text for text, _ in pieces)]
    return {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [score for _, score in pieces],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }


def test_sentencepiece_by_hand():
    letters = [(letter, -100.0) for letter in "▁abc"]
    pieces = [("ab", -1.0), ("bc", -2.0), ("▁a", -3.0), ("▁ab", -4.0), ("abc", -5.0), *letters]
    metadata = sentencepiece_metadata(pieces)
    ids = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    tokenizer = rebuild_tokenizer(metadata).tokenizer
    # ▁abc: the best pair is ab (-1), then ▁+ab (-4) before ab+c (-5).
    assert tokenizer.encode("abc").ids == [1, ids["▁ab"], ids["c"]]
    # A prefix space after a special token too; an unknown letter as its bytes; BOS in the text is not added twice.
    expected = [ids["▁a"], 2, ids["▁"], ids["bc"], ids["▁"], ids["<0xC3>"], ids["<0xA9>"]]
    assert tokenizer.encode("a</s>bc é", add_special_tokens=False).ids == expected
    assert tokenizer.decode(tokenizer.encode("abc é  cab").ids) == "abc é  cab"
    plain = rebuild_tokenizer(sentencepiece_metadata(pieces, **{"tokenizer.ggml.add_space_prefix": False})).tokenizer
    assert plain.encode("abc", add_special_tokens=False).ids == [ids["abc"]]


def test_sentencepiece_as_the_library_encodes(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join([TEXT.strip(), "the cat sat on the mat", "a naïve cat", "12 or 2025"] * 8))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=350,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(259, processor.vocab_size())]
    tokenizer = rebuild_tokenizer(sentencepiece_metadata(pieces)).tokenizer
    for text in (TEXT, "the mat  sat", " naïve ñandú 2025", "\n\ncat"):
        assert tokenizer.encode(text, add_special_tokens=False).ids == processor.encode(text)
        assert tokenizer.decode(processor.encode(text)) == text


class TestSmolLM2:
    @pytest.fixture(scope="class")
    @classmethod
    def file(cls, smollm2):
        return open_gguf(smollm2)

    @pytest.fixture(scope="class")
    @classmethod
    def tokenizer(cls, smollm2):
        return load_tokenizer(smollm2)

    def test_config(self, file):
        config = from_hf(file.config)
        sizes = (config.vocab_size, config.embed_dim, config.num_layers, config.num_heads, config.num_kv_heads)
        assert sizes == (49152, 576, 30, 9, 3)
        assert (config.norm_eps, config.tie_embeddings, config.eos_ids, config.pad_id) == (1e-5, True, (2,), 2)
        assert config.rope is not None and config.rope.theta == 100000.0

    def test_a_block_by_hand(self, file):
        # Q4_1: 20 bytes for 32 weights w = d * q + m: d and m in half precision, then the low and the high nibbles.
        tensor = file.stored["model.layers.0.mlp.down_proj.weight"]
        assert tensor.tensor_type.name == "Q4_1"
        raw = np.asarray(tensor.data[5, 20:40])
        d, m = raw[:4].view(np.float16).astype(np.float32)
        nibbles = np.concatenate([raw[4:] & 15, raw[4:] >> 4]).astype(np.float32)
        row = file.read("model.layers.0.mlp.down_proj.weight", (slice(5, 6), slice(32, 64)))
        np.testing.assert_array_equal(row[0], d * nibbles + m)

    @pytest.mark.parametrize(
        "text", [TEXT, "", " ", "\n", "a" * 300, "0123456789", "<|im_start|>user\nhi<|im_end|>", "e\u0301"]
    )
    def test_round_trip(self, tokenizer, text):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_ids(self, tokenizer):
        assert tokenizer("2025")["input_ids"] == [tokenizer.convert_tokens_to_ids(digit) for digit in "2025"]
        assert tokenizer("<|im_start|><|im_end|><|endoftext|>")["input_ids"] == [1, 2, 0]
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
            "<|im_start|>",
            "<|im_end|>",
            "<|im_end|>",
        )
        assert len(tokenizer) == 49152 and tokenizer.model_max_length == 8192
        assert isinstance(tokenizer, PreTrainedTokenizerFast)

    def test_chat_template(self, tokenizer):
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 42"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        turns = [("system", system), ("user", "Hi"), ("assistant", "Hello 42")]
        assert text == "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        ids = tokenizer.apply_chat_template(chat)["input_ids"]
        assert ids == tokenizer(text)["input_ids"] and ids.count(1) == ids.count(2) == 3
