"""PEFT's folders: merged while they are read, continued, stacked, and what is refused by name."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign import models
from jaxalign.models import LoraConfig
from tests.models import tiny

KEY = jax.random.key(4)
Q = "model.layers.{}.self_attn.q_proj"


@pytest.fixture
def base(tmp_path):
    tiny.write_folder(tmp_path / "base", tiny.CONFIGS["qwen2"])
    return tmp_path / "base"


def adapter(base, folder, targets=("q_proj", "down_proj"), seed=0, **changes):
    """A folder with an adapter whose B is not 0."""
    config = LoraConfig(r=4, alpha=6, dropout=0.0, target_modules=targets)
    model, variables = models.add_lora(*models.load(base), config, KEY)
    rng = np.random.default_rng(seed)
    lora = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), variables["lora"])
    models.save_adapter(folder, model.config, {**variables, "lora": lora}, base_model="../base")
    edit(folder, **changes)
    return model, {**variables, "lora": lora}


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def kernels(variables, layer):
    return np.asarray(variables["params"]["segment_0"]["block_0"]["attention"]["query"]["kernel"][layer]).reshape(
        64, -1
    )


def test_merged_while_it_is_read(base, tmp_path):
    """W + 6/4 B A by hand, in bfloat16 too; a relative base is looked for from the adapter's folder."""
    model, variables = adapter(base, tmp_path / "adapter")
    loaded, merged = models.load(tmp_path / "adapter")
    assert loaded.config == models.load(base)[0].config and merged.keys() == {"params"}
    content = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = f"base_model.model.{Q.format(2)}"
    delta = 1.5 * content[f"{name}.lora_B.weight"] @ content[f"{name}.lora_A.weight"]
    np.testing.assert_allclose(kernels(merged, 2), kernels(variables, 2) + delta.T, atol=1e-6)
    wanted = models.merge_lora(model, variables)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, wanted)
    models.save(tmp_path / "export", model, variables, None)  # merged on the way out
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), models.load(tmp_path / "export")[1], merged)
    assert models.fingerprint(tmp_path / "adapter") != models.fingerprint(base)


def test_a_second_adapter_on_top(base, tmp_path):
    """An adapter whose base is an adapter: both are merged."""
    adapter(base, tmp_path / "one")
    adapter(tmp_path / "one", tmp_path / "two", seed=1)
    edit(tmp_path / "two", base_model_name_or_path=str(tmp_path / "one"))
    content = load_file(tmp_path / "two" / "adapter_model.safetensors")
    name = f"base_model.model.{Q.format(0)}"
    delta = 1.5 * content[f"{name}.lora_B.weight"] @ content[f"{name}.lora_A.weight"]
    wanted = kernels(models.load(tmp_path / "one")[1], 0) + delta.T
    np.testing.assert_allclose(kernels(models.load(tmp_path / "two")[1], 0), wanted, atol=1e-6)


def test_what_differs_by_layer_is_merged_but_does_not_train(base, tmp_path):
    """Rank and scale of its own for layer 1, nothing for layer 2."""
    folder = tmp_path / "adapter"
    adapter(base, folder, targets=("q_proj",))

    def change(content):
        cut = {}
        for name, tensor in content.items():
            if "layers.2." not in name:
                cut[name] = tensor[:2] if "layers.1." in name and "lora_A" in name else tensor
                cut[name] = (
                    np.ascontiguousarray(tensor[:, :2]) if "layers.1." in name and "lora_B" in name else cut[name]
                )
        return cut

    rewrite(folder, change)
    with pytest.raises(ValueError, match=r"there is nothing for model.layers.2.self_attn.q_proj"):
        models.load_adapter(folder, *models.load(base))
    edit(folder, rank_pattern={Q.format(1): 2}, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 8})
    content, plain, merged = (
        load_file(folder / "adapter_model.safetensors"),
        models.load(base)[1],
        models.load(folder)[1],
    )
    for layer, scale in ((0, 6 / 4), (1, 8 / 2), (2, 0.0)):
        name = f"base_model.model.{Q.format(layer)}"
        delta = 0.0 if not scale else scale * content[f"{name}.lora_B.weight"] @ content[f"{name}.lora_A.weight"]
        np.testing.assert_allclose(kernels(merged, layer), kernels(plain, layer) + np.transpose(delta), atol=1e-6)
    with pytest.raises(ValueError, match="modules of different rank or alpha cannot train on; merge it first"):
        models.load_adapter(folder, *models.load(base))


def test_replaced_modules(base, tmp_path):
    folder = tmp_path / "adapter"
    adapter(base, folder)
    new = np.full((64,), 3.0, np.float32)
    rewrite(folder, lambda content: {**content, "base_model.model.model.norm.weight": new})
    np.testing.assert_array_equal(models.load(folder)[1]["params"]["final_norm"]["scale"], new)
    with pytest.raises(ValueError, match=r"it replaces model.norm.weight \(modules_to_save\); merge it first"):
        models.load_adapter(folder, *models.load(base))


def test_an_adapter_for_another_base(base, tmp_path):
    folder = tmp_path / "adapter"
    adapter(base, folder)
    tiny.write_folder(tmp_path / "other", tiny.CONFIGS["qwen2"] | {"hidden_size": 32, "num_attention_heads": 2})
    edit(folder, base_model_name_or_path=str(tmp_path / "other"))
    # B is [64, 4] for 64 outputs; the other base has 32.
    with pytest.raises(ValueError, match=r"down_proj: A \[4, 96\] and B \[64, 4\] do not fit .* made for another base"):
        models.load(folder)
    with pytest.raises(ValueError, match=r"down_proj has 96 inputs and 64 outputs, in the base 96 and 32"):
        models.load_adapter(folder, *models.load(tmp_path / "other"))
    tiny.write_folder(tmp_path / "gpt2", tiny.CONFIGS["gpt2"])
    edit(folder, base_model_name_or_path=str(tmp_path / "gpt2"))
    with pytest.raises(ValueError, match=r"the base has no model.layers.0.mlp.down_proj"):
        models.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; only LORA is"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changed the base's weights"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices=[3] is not supported"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
    ],
)
def test_other_kinds_are_refused_by_name(changes, message, base, tmp_path):
    adapter(base, tmp_path / "adapter", **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        models.load(tmp_path / "adapter")


def test_missing_files(base, tmp_path):
    adapter(base, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(
        FileNotFoundError, match=r"adapter_config.json: base_model_name_or_path: .*nowhere does not exist"
    ):
        models.load(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is missing"):
        models.load_adapter(tmp_path / "adapter", *models.load(base))
    with pytest.raises(FileNotFoundError, match=r"it is no PEFT adapter's folder"):
        models.load_adapter(base, *models.load(base))
