# pyright: reportMissingImports=false
"""Adapters against PEFT, live: our folders in PEFT, PEFT's folders here, and one step of training on each side."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models
from jaxalign.models import LoraConfig
from jaxalign.types import TokenRows
from tests.models import tiny

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

# torch and PEFT warn about their own deprecations.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

TOLERANCE = 1e-4
# name -> targets: all linear modules; biases beside some; a fused tensor with a scale of its own.
CASES = {
    "llama3": ("all-linear", {}),
    "qwen2": (["q_proj", "v_proj", "down_proj"], {"use_rslora": True}),
    "gpt2": (["c_attn", "mlp.c_proj"], {}),
    # Experts have no adapter here; PEFT takes any `down_proj` of this family for theirs.
    "qwen3_moe": (["q_proj", "o_proj"], {}),
}


def ids() -> np.ndarray:
    return np.random.default_rng(5).integers(4, 150, (3, 24))


def ours(model, variables) -> np.ndarray:
    rows = TokenRows.from_padded(ids(), np.ones_like(ids()))
    return np.asarray(jax.jit(lambda v: model.logits(v, model.apply(v, rows)[0]))(variables))


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(ids())).logits.numpy()


def base(tmp_path, name: str):
    folder = tmp_path / name
    tiny.write_folder(folder, tiny.CONFIGS[name])
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_our_folder_in_peft(name, tmp_path):
    folder, plain = base(tmp_path, name)
    targets, options = CASES[name]
    config = LoraConfig(
        r=4, alpha=6, dropout=0.0, target_modules=targets if name == "llama3" else tuple(targets), **options
    )
    model, variables = models.load(folder)
    model, variables = models.add_lora(model, variables, config, jax.random.key(0))
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), variables["lora"])
    variables = {**variables, "lora": lora}
    models.save_adapter(tmp_path / "adapter", model.config, variables, base_model=str(folder))
    wanted = ours(model, variables)
    assert np.abs(wanted - theirs(plain)).max() > 1  # the adapter makes a difference
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    np.testing.assert_allclose(theirs(loaded), wanted, atol=TOLERANCE)
    again, continued = models.load_adapter(tmp_path / "adapter", *models.load(folder))
    np.testing.assert_allclose(ours(again, continued), wanted, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_pefts_folder_here(name, tmp_path):
    """Merged while it is read, and as an adapter to go on from."""
    folder, plain = base(tmp_path, name)
    targets, options = CASES[name]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets, fan_in_fan_out=name == "gpt2", **options
    )
    adapted = peft.get_peft_model(plain, config)
    torch.manual_seed(0)
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = theirs(adapted)
    merged, variables = models.load(tmp_path / "adapter")
    assert merged.config.lora is None and variables.keys() == {"params"}
    np.testing.assert_allclose(ours(merged, variables), wanted, atol=TOLERANCE)
    model, variables = models.load_adapter(tmp_path / "adapter", *models.load(folder))
    np.testing.assert_allclose(ours(model, variables), wanted, atol=TOLERANCE)


def test_a_folder_with_shared_experts_is_merged(tmp_path):
    """PEFT adapts the linear modules of shared experts too: they are merged while read, and do not train on."""
    folder, plain = base(tmp_path, "qwen2_moe")
    names = ["q_proj", "shared_expert.gate_proj", "shared_expert.down_proj"]
    adapted = peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=names))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    np.testing.assert_allclose(ours(*models.load(tmp_path / "adapter")), theirs(adapted), atol=TOLERANCE)
    with pytest.raises(ValueError, match=r"shared_expert\.\w+_proj is no linear module .* merge it first"):
        models.load_adapter(tmp_path / "adapter", *models.load(folder))


def test_gradients_are_pefts(tmp_path):
    """Of the mean negative log-prob, by A and B of every module; GPT-2's fused tensor has one of each."""
    folder, plain = base(tmp_path, "gpt2")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(plain, config).eval()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    logits = adapted(torch.tensor(ids())).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), torch.tensor(ids())[:, 1:].reshape(-1)
    )
    loss.backward()
    model, variables = models.load_adapter(tmp_path / "adapter", *models.load(folder))
    rows = TokenRows.from_padded(ids(), np.ones_like(ids()))

    def nll(lora):
        whole = {**variables, "lora": lora}
        logps = jax.nn.log_softmax(model.logits(whole, model.apply(whole, rows)[0])[:, :-1])
        return -jnp.take_along_axis(logps, jnp.asarray(ids())[:, 1:, None], axis=-1).mean()

    grads = jax.jit(jax.grad(nll))(variables["lora"])["segment_0"]["block_0"]["attention"]["query+key+value"]
    found = {name: parameter.grad.numpy() for name, parameter in adapted.named_parameters() if "lora_" in name}
    for layer in range(3):
        for letter, name in (("A", "a"), ("B", "b")):
            wanted = next(g for n, g in found.items() if f"h.{layer}." in n and f"lora_{letter}" in n)
            np.testing.assert_allclose(np.asarray(grads[name][layer]).T, wanted, atol=1e-5)


def test_a_reward_models_folder_in_peft(tmp_path):
    """Its score head is among the modules that PEFT saves whole."""
    folder, _ = base(tmp_path, "llama3")
    model, variables = models.add_score_head(*models.load(folder), jax.random.key(1))
    model, variables = models.add_lora(model, variables, LoraConfig(r=4, dropout=0.0), jax.random.key(2))
    variables = {**variables, "lora": jax.tree.map(lambda x: x + 0.05, variables["lora"])}
    models.save_adapter(tmp_path / "adapter", model.config, variables, base_model=str(folder))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    plain = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=0, dtype=torch.float32
    )
    scores = theirs(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter"))[:, 0]
    rows = TokenRows.from_padded(ids(), np.ones_like(ids()))
    wanted = np.asarray(model.scores(variables, model.apply(variables, rows)[0]))[:, -1]
    np.testing.assert_allclose(scores, wanted, atol=TOLERANCE)
