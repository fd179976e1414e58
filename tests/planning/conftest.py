"""A model of which there is only the config."""

import json

import pytest

from tests.planned import DIM, HEADS, KV, LAYERS, MLP, VOCAB, WIDTH


@pytest.fixture
def bare(tmp_path):
    """A folder with a config.json and nothing else."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": DIM,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    for name, more in {
        "bare": {},
        "scorer": {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **more, "pad_token_id": 0}))
    return tmp_path / "bare"
