"""Sparse models against transformers, live: the loss with its load-balancing term, and every gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import balance_loss
from jaxalign.models import load
from jaxalign.models.families import tensors
from jaxalign.models.tensors import join
from jaxalign.types import TokenRows
from tests.models import tiny

pytestmark = pytest.mark.parity

LENGTHS = (7, 4, 2)


def torch_gradients(model, hf: dict) -> dict[str, np.ndarray]:
    """Gradients under the names of a checkpoint: transformers keeps gate and up of all experts in one tensor."""
    mixtral = hf["model_type"] == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.numpy()
        prefix = name.rsplit(".", 1)[0]
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(grad):
                found[f"{prefix}.{e}.{gate}.weight"], found[f"{prefix}.{e}.{up}.weight"] = np.split(both, 2)
        elif name.endswith("experts.down_proj"):
            found |= {f"{prefix}.{e}.{down}.weight": each for e, each in enumerate(grad)}
        else:
            found[name] = grad
    return {name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name: grad for name, grad in found.items()}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_loss_and_gradients(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    # 13 tokens to 3 experts each at most: in every layer some of the 40 get none.
    more = {"num_local_experts" if name == "mixtral" else "num_experts": 40, "router_aux_loss_coef": 0.7}
    hf = tiny.CONFIGS[name] | more
    tiny.write_folder(tmp_path, hf)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    rng = np.random.default_rng(4)
    tokens = rng.integers(4, 160, (3, max(LENGTHS)))
    mask = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    output = theirs(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        labels=torch.tensor(np.where(mask, tokens, -100)),
        output_router_logits=True,
    )
    output.loss.backward()

    model, variables = load(tmp_path)
    assert model.config.router_aux_loss_coef == 0.7
    rows = TokenRows.from_padded(jnp.asarray(tokens), mask)

    def loss(params):
        hidden, _, aux = model.apply({"params": params}, rows)
        log_probs = jax.nn.log_softmax(model.logits({"params": params}, hidden[:, :-1]))
        logps = jnp.take_along_axis(log_probs, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
        nll = -jnp.where(mask[:, 1:], logps, 0).sum() / mask[:, 1:].sum()
        term = balance_loss(aux["router_probs"], aux["expert_loads"], experts_per_token=model.config.experts_per_token)
        return nll + model.config.router_aux_loss_coef * term, (term, aux["expert_loads"])

    (value, (term, loads)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    sparse = sum(model.config.sparse_layers)
    assert float(loads.sum()) == sparse * sum(LENGTHS) * model.config.experts_per_token
    assert float(term) == pytest.approx(output.aux_loss.item(), rel=1e-5)
    assert float(value) == pytest.approx(output.loss.item(), rel=1e-5)

    wanted, got = torch_gradients(theirs, hf), {}
    for tensor in tensors(model.config):
        leaf = grads
        for key in tensor.path:
            leaf = leaf[key]
        got[tensor.name] = join([(tensor, np.asarray(leaf[tensor.place] if tensor.place else leaf))])
    assert got.keys() == wanted.keys()
    apart = sum(float(np.square(got[key] - wanted[key]).sum()) for key in wanted)
    norm = sum(float(np.square(each).sum()) for each in wanted.values())
    assert (apart / norm) ** 0.5 < 1e-4
    routers = [key for key in wanted if key.endswith(".gate.weight")]
    assert len(routers) == sparse and all(np.abs(wanted[key]).max() > 0 for key in routers)
    for key in routers:
        assert np.linalg.norm(got[key] - wanted[key]) < 1e-4 * np.linalg.norm(wanted[key]), key
