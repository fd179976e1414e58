# pyright: reportMissingImports=false
"""TRL 1.12.0's PPO trainer, live: one rollout, all its updates, the same parameters and metrics after them.

TRL 1.16 has no PPO, so the older release is imported from a folder of its own, beside the other: the environment
variable `JAXALIGN_TRL_PPO`, or where `make parity` puts it. Rollouts are given, not drawn; all else is TRL's code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxalign import models
from jaxalign.losses import whiten
from jaxalign.methods import ppo
from jaxalign.methods.offline import Layout
from jaxalign.methods.rollout import pack_prompts, run_passes
from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.types import Experience
from tests.layouts import flat
from tests.models import tiny
from tests.parity.live import QUIET, older_trl

torch = pytest.importorskip("torch")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers import models as tokenizer_models  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

# torch, accelerate and TRL warn about their own deprecations.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

PAD, EOS, VOCAB = 0, 2, 160
COUNT, STEPS, WIDTH = 16, 12, 20
LEARNING_RATE, EPSILON = 2e-3, 1e-5


@pytest.fixture(scope="module")
def trainers() -> ModuleType:
    """TRL 1.12's module of the PPO trainer."""
    return older_trl("experimental.ppo.ppo_trainer")


def make_torch_models(spread: float = 0.1) -> dict[str, Any]:
    """Policy, reference near it, value and reward model; `spread` is the weights' standard deviation."""
    hf: dict[str, Any] = dict(tiny.LLAMA) | {
        "num_hidden_layers": 2,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "num_labels": 1,
    }
    config, found = AutoConfig.for_model(hf.pop("model_type"), **hf), {}
    for seed, role in enumerate(("policy", "reference", "value", "reward")):
        kind = AutoModelForCausalLM if role in ("policy", "reference") else AutoModelForSequenceClassification
        torch.manual_seed(seed)
        model = kind.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in key else 0.0, spread)
            if role == "reference":
                for own, parameter in zip(model.parameters(), found["policy"].parameters(), strict=True):
                    own.copy_(parameter + 0.1 * own * (own.ndim > 1))
        found[role] = model.eval()
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(tokenizer_models.WordLevel({"<pad>": PAD, "<bos>": 1, "<eos>": EOS}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def draw(ragged: bool) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Prompts, responses `[COUNT, STEPS]` and lengths: most end with EOS, some are cut off; junk after the EOS."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, VOCAB, int(n)).tolist() for n in rng.integers(2, WIDTH, COUNT)]
    lengths = rng.integers(1, STEPS + 1, COUNT) if ragged else np.full(COUNT, STEPS)
    responses = rng.integers(4, VOCAB, (COUNT, STEPS))
    ended = rng.random(COUNT) < 0.7
    lengths = np.where(ended, lengths, STEPS)
    responses[np.flatnonzero(ended), lengths[ended] - 1] = EOS
    return prompts, responses, lengths


def run_trl(trainers, monkeypatch, folder: Path, ragged: bool, settings: dict[str, Any]) -> SimpleNamespace:
    """One rollout and its updates: what TRL saw, chose, logged and made of the parameters (in `folder`)."""
    prompts, responses, lengths = draw(ragged)
    seen = SimpleNamespace(prompts=[], lengths=lengths, responses=responses, scores=[], orders=[], logged={})
    parts = make_torch_models()
    for role in ("policy", "reference", "value"):
        parts[role].save_pretrained(folder / role)

    def generation(model, queries, batch_size, pad_id, config):
        both = torch.cat([queries, torch.tensor(responses)], 1)
        seen.prompts = [query[query != pad_id].tolist() for query in queries]
        logits = trainers.forward(model, both, pad_id).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / config.temperature

    get_reward, permutation = trainers.get_reward, np.random.permutation

    def reward(model, *args):
        found = get_reward(model, *args)
        if model is parts["reward"]:
            seen.scores.append(found[1].clone())
        return found

    def permute(n):
        seen.orders.append(permutation(n))
        return seen.orders[-1]

    monkeypatch.setattr(trainers, "batch_generation", generation)
    monkeypatch.setattr(trainers, "get_reward", reward)
    monkeypatch.setattr(np.random, "permutation", permute)
    args = trainers.PPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=COUNT,
        gradient_accumulation_steps=1,
        total_episodes=COUNT,
        learning_rate=LEARNING_RATE,
        adam_epsilon=EPSILON,
        lr_scheduler_type="constant",
        response_length=STEPS,
        num_sample_generations=0,
        stop_token="eos" if ragged else None,
        **QUIET,
        **settings,
    )
    data = Dataset.from_list([{"input_ids": prompt} for prompt in prompts])
    trainer = trainers.PPOTrainer(
        args, tokenizer(), parts["policy"], parts["reference"], parts["reward"], data, parts["value"], eval_dataset=data
    )
    monkeypatch.setattr(trainer, "log", seen.logged.update)
    trainer.train()
    for role in ("policy", "value"):
        parts[role].save_pretrained(folder / f"{role}_after")
    seen.scores = torch.cat(seen.scores).numpy()
    return seen


def run_ours(config: ppo.Config, seen, folder: Path, *, state_after_eos: bool = False) -> tuple[Any, dict[str, list]]:
    """The same rollout and the same minibatches: parameters, and each metric per update.

    With `state_after_eos` it is TRL's rollout: a completion that ends before its last place has one state more, after
    its EOS, with no KL, the score as its reward and its own value. The critic learns from that state, the policy does
    not. Here the state is one more token, with an advantage of 0.
    """
    early = (seen.responses[np.arange(COUNT), seen.lengths - 1] == EOS) & (seen.lengths < STEPS) & state_after_eos
    states = seen.lengths + early
    own, after = (np.arange(STEPS) < each[:, None] for each in (seen.lengths, states))
    after &= ~own
    policy, reference = models.load(folder / "policy"), models.load(folder / "reference")
    both, variables = ppo.add_critic(config, *policy, jax.random.key(0), start=models.load(folder / "value"))
    optimizer = optax.adam(LEARNING_RATE, eps=EPSILON)
    state, frozen = ppo.init(config, both, variables, optimizer, jax.random.key(0))
    lengths = np.array([len(prompt) for prompt in seen.prompts], np.int32)
    experience = Experience(
        prompts=np.stack([np.pad(prompt, (0, WIDTH - len(prompt))) for prompt in seen.prompts]).astype(np.int32),
        prompt_lengths=lengths,
        examples=np.arange(COUNT),
        tokens=(seen.responses * (own | after)).astype(np.int32),
        lengths=states.astype(np.int32),
        finish=(seen.responses[np.arange(COUNT), seen.lengths - 1] == EOS).astype(np.int32),
        scores=seen.scores[:, None].astype(np.float64),
        fields={},
    )
    logps = jax.jit(ppo.make_logps(config, both.policy))
    values = jax.jit(ppo.make_values(config, both.value))
    passes = {
        "sampler_logps": lambda p, b: logps(ppo.policy_of(p, frozen), b),
        "ref_logps": lambda p, b: logps(reference[1], b),
        "values": lambda p, b: values(ppo.value_of(p, frozen), b),
    }
    layout, mesh = Layout(COUNT, 4, 64), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    experience = run_passes(experience, passes, state.params, layout, mesh)
    for name in ("sampler_logps", "ref_logps"):
        experience.fields[name][after] = 0
    experience, rollout, _ = ppo.estimate(config, experience, ppo.start_carry(config))
    advantages = np.where(own, whiten(experience.fields["advantages"], own), 0) if state_after_eos else None
    step = jax.jit(ppo.make_step(config, both, optimizer))
    size = COUNT // config.num_mini_batches
    found: dict[str, list[Any]] = {}
    update = 0
    for order in seen.orders:
        for start in range(0, COUNT, size):
            members = order[start : start + size]
            if advantages is not None:
                # The policy's loss is a mean over its own tokens, the critic's over all states; ours has one count.
                share = states[members].sum() / seen.lengths[members].sum()
                experience = replace(experience, fields={**experience.fields, "advantages": advantages * share})
            batch = pack_prompts(experience, members, Layout(size, 4, 64), fields=ppo.fields(config))
            numbers = ppo.batch_fields(config, experience, len(batch.present), update)
            batch = replace(batch, fields={**batch.fields, **numbers})
            update += 1
            state, metrics = step(state, frozen, batch)
            for name, metric in metrics.items():
                found.setdefault(name, []).append(metric.value())
    return state.params, {**found, **{name: [metric.value()] for name, metric in rollout.items()}}


def change(folder: Path, role: str, params) -> np.ndarray:
    """How far parameters have moved, in one vector."""
    return flat(params["params"]) - flat(models.load(folder / role)[1]["params"])


def compare(folder: Path, role: str, params) -> None:
    ours = change(folder, role, params[role])
    theirs = change(folder, role, models.load(folder / f"{role}_after")[1])
    before = np.linalg.norm(flat(models.load(folder / role)[1]))
    assert np.linalg.norm(theirs) / before > 1e-2, "nothing was learnt, so nothing is compared"
    assert np.linalg.norm(ours - theirs) / before <= 1e-5
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) <= 2e-4


OBJECTIVE = [f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores")]
UPDATES = [
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "val/ratio",
]
COMMON: dict[str, Any] = {"num_ppo_epochs": 3, "num_mini_batches": 2, "kl_coef": 0.1, "temperature": 0.7}


@pytest.mark.parametrize("whiten_rewards", [False, True], ids=["plain", "whitened rewards"])
def test_completions_of_full_length(trainers, monkeypatch, tmp_path, whiten_rewards):
    """Every setting in use, k3 in one case; a completion of full length gets its score where we give it."""
    estimator = "k3" if whiten_rewards else "k1"
    shared = {**COMMON, "kl_estimator": estimator, "whiten_rewards": whiten_rewards, "vf_coef": 0.3, "gamma": 0.99}
    settings = {**shared, "missing_eos_penalty": 1.0}
    seen = run_trl(trainers, monkeypatch, tmp_path, False, {**settings, "lam": 0.9, "cliprange_value": 0.3})
    config = ppo.Config(**settings, gae_lambda=0.9, epsilon_value=0.3, max_completion_length=STEPS)
    params, metrics = run_ours(config, seen, tmp_path)
    compare(tmp_path, "policy", params)
    compare(tmp_path, "value", params)
    for name in OBJECTIVE + UPDATES:
        assert np.mean(metrics[name]) == pytest.approx(seen.logged[name], rel=1e-3, abs=1e-4), name
    assert seen.logged["policy/clipfrac_avg"] > 0.02 and seen.logged["val/clipfrac_avg"] > 0.02
    assert metrics["val/num_eos_tokens"] == [seen.logged["val/num_eos_tokens"]]


@pytest.mark.parametrize("whiten_rewards", [False, True], ids=["plain", "whitened rewards"])
def test_completions_that_end(trainers, monkeypatch, tmp_path, whiten_rewards):
    """Every setting in use on ragged completions, with TRL's state after an EOS: see `run_ours`."""
    settings = {**COMMON, "missing_eos_penalty": 0.5, "gamma": 0.99, "vf_coef": 0.3, "whiten_rewards": whiten_rewards}
    seen = run_trl(trainers, monkeypatch, tmp_path, True, {**settings, "lam": 0.95, "cliprange_value": 0.3})
    config = ppo.Config(**settings, gae_lambda=0.95, epsilon_value=0.3, max_completion_length=STEPS)
    params, metrics = run_ours(config, seen, tmp_path, state_after_eos=True)
    compare(tmp_path, "policy", params)
    compare(tmp_path, "value", params)
    assert np.ptp(seen.lengths) > 8
    # TRL's other metrics of updates are means over places that no completion has.
    for name in [*OBJECTIVE, "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg"]:
        assert np.mean(metrics[name]) == pytest.approx(seen.logged[name], rel=1e-3, abs=1e-4), name
    assert seen.logged["val/clipfrac_avg"] > 0.02


def test_completions_that_end_with_their_last_token(trainers, monkeypatch, tmp_path):
    """As here: with γ = λ = 1 TRL's state after an EOS drops out of the advantages.

    It does not drop out of the value loss, so the value loss is off, and the policy alone is compared.
    """
    settings = {**COMMON, "missing_eos_penalty": 0.5, "gamma": 1.0, "vf_coef": 0.0}
    seen = run_trl(trainers, monkeypatch, tmp_path, True, {**settings, "lam": 1.0})
    config = ppo.Config(**settings, gae_lambda=1.0, max_completion_length=STEPS)
    params, metrics = run_ours(config, seen, tmp_path)
    compare(tmp_path, "policy", params)
    assert np.ptp(seen.lengths) > 8
    for name in OBJECTIVE:
        assert np.mean(metrics[name]) == pytest.approx(seen.logged[name], rel=1e-3, abs=1e-4), name
