# pyright: reportMissingImports=false
"""TRL 1.16.0, live: the loss code of its DPO, CPO and ORPO trainers against our methods, on the same log-probs.

Both sides are whole: what our method reads off a model, and what the trainer's model returns, are given numbers. Value,
gradient by them and metrics are compared.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import DIVERGENCES, MARGIN_LOSSES, PREFERENCE_LOSSES, TokenStatistics, token_statistics
from jaxalign.methods import common, preference, reference_free
from jaxalign.training.coupled import CoupledLoss, alone
from jaxalign.types import Batch, Predictions, TokenRows
from tests.layouts import tiny_model

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

# torch, accelerate and TRL warn about their own deprecations.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

# Prompts, chosen and rejected completions of six pairs, single tokens among them.
PROMPTS, CHOSEN, REJECTED = np.array([3, 1, 6, 2, 9, 4]), np.array([5, 1, 12, 3, 7, 2]), np.array([2, 8, 3, 3, 1, 11])
PAIRS, WIDTH, VOCAB = 6, 18, 23
LENGTHS = np.concatenate([PROMPTS + CHOSEN, PROMPTS + REJECTED])  # TRL's rows: all chosen, then all rejected
STARTS = np.tile(PROMPTS, 2)
PLACES = np.arange(WIDTH)[None]
COMPLETION = (STARTS[:, None] <= PLACES) & (LENGTHS[:, None] > PLACES)
REAL = LENGTHS[:, None] > PLACES
NUMBERS = np.concatenate([2 * np.arange(PAIRS), 2 * np.arange(PAIRS) + 1])  # ours: chosen 2i, rejected 2i + 1
SHARED = {f"{name}/{side}" for name in ("rewards", "logps") for side in ("chosen", "rejected")}
SHARED |= {"rewards/accuracies", "rewards/margins"}
DTYPES = {"float32": (1e-5, torch.float32), "float64": (1e-9, torch.float64)}


class Model(SimpleNamespace):
    """What the trainers call: gives the same outputs whatever it is asked."""

    _modules: ClassVar[dict] = {}  # accelerate looks into it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs


class Accelerator(SimpleNamespace):
    device = torch.device("cpu")

    def gather(self, x):
        return x

    gather_for_metrics = gather


def our_batch(fields: dict[str, np.ndarray], *, prompts: bool = False) -> Batch:
    """One sequence per row, a prediction for every token but the first, in TRL's order."""
    completions = np.where(COMPLETION, NUMBERS[:, None], -1)
    if prompts:  # those of the chosen rows
        own = (STARTS[:, None] > PLACES) & (np.arange(2 * PAIRS)[:, None] < PAIRS)
        completions = np.where(own, 2 * PAIRS + np.arange(2 * PAIRS)[:, None], completions)
    steps = np.maximum(PLACES - STARTS[:, None], 0)
    zeros = np.zeros((2 * PAIRS, WIDTH), np.int32)
    rows = TokenRows(zeros, zeros, zeros, zeros)
    shifted = (
        each[:, 1:].astype(np.int32) for each in (np.tile(PLACES - 1, (2 * PAIRS, 1)), tokens(), completions, steps)
    )
    return Batch(rows, Predictions(*shifted), np.ones(2 * PAIRS, np.float32), fields)


def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, (2 * PAIRS, WIDTH))


def ours(method, config, given, batch, monkeypatch, statistics):
    """Value, gradient by what is given, and metrics of a method whose model gives `statistics(given)`."""

    def read(model, variables, batch, key, chunk, **options):
        return statistics(variables["params"], batch.predictions)

    monkeypatch.setattr(common, "read", read)
    totals = {name: total for name, total in method.totals(batch).items()}
    loss = method.make_loss(config, tiny_model()[0])
    loss = alone(loss) if isinstance(loss, CoupledLoss) else loss
    compute = jax.value_and_grad(lambda x: loss({"params": x}, {}, batch, totals, None), has_aux=True)
    (value, metrics), grads = jax.jit(compute)(given)
    return float(value), np.asarray(grads), {name: metric.value() for name, metric in metrics.items()}


def token_case(spread: float, dtype: str) -> tuple[np.ndarray, ...]:
    """Log-probs under policy and reference, and log sum p^2 of the policy, `[rows, width - 1]`."""
    draw = np.random.default_rng(5)
    shape = (2 * PAIRS, WIDTH - 1)
    logps = -draw.gamma(2.0, 0.5, shape)
    reference = logps + draw.normal(0, spread, shape)
    return tuple(each.astype(dtype) for each in (logps, reference, -draw.gamma(2.0, 0.5, shape)))


def trl_dpo(settings: dict[str, Any], case) -> tuple[float, np.ndarray, dict[str, float]]:
    """DPOTrainer's own `_compute_loss`."""
    mask = torch.tensor(COMPLETION[:, 1:])
    logps, reference, squares = (torch.tensor(each) for each in case)
    logps.requires_grad_()
    zeros = torch.zeros_like(squares)
    outputs = SimpleNamespace(
        log_probs=logps * mask, log_sum_sq_probs=squares, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    model = Model(outputs=outputs, training=True, is_gradient_checkpointing=False)
    names = settings.get("loss_type", "sigmoid")
    names = [names] if isinstance(names, str) else list(names)
    metrics = defaultdict(list)
    trainer = SimpleNamespace(
        model=model,
        ref_model=Model(outputs=SimpleNamespace(log_probs=reference * mask)),
        accelerator=Accelerator(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings.get("discopop_tau", 0.05)),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_types=names,
        loss_weights=list(settings.get("loss_weights") or [1.0] * len(names)),
        beta=settings["beta"],
        label_smoothing=settings.get("label_smoothing", 0.0),
        ld_alpha=settings.get("ld_alpha"),
        f_divergence_type=settings.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=settings.get("f_alpha_divergence_coef", 0.5),
        use_weighting=settings.get("use_weighting", False),
        _metrics={"train": metrics},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.tensor(tokens()),
        "attention_mask": torch.tensor(REAL).long(),
        "completion_mask": torch.tensor(COMPLETION).long(),
    }
    loss = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    return loss.item(), logps.grad.numpy(), {name: values[0] for name, values in metrics.items()}


def compare_dpo(settings, dtype, monkeypatch, spread=0.4):
    # The logarithms of the label smoothing that TRL's EXO takes are float32 whatever it is given.
    bound = 1e-7 if settings.get("loss_type") == "exo_pair" and dtype == "float64" else DTYPES[dtype][0]
    case = token_case(spread, dtype)
    value, grads, metrics = trl_dpo(settings, case)
    with jax.enable_x64(dtype == "float64"):
        logps, reference, squares = case
        zeros = jnp.zeros(logps.shape, dtype)

        def statistics(given, predictions):
            return TokenStatistics(given, zeros, zeros, zeros, zeros, jnp.asarray(squares))

        batch = our_batch({"ref_logps": reference})
        got = ours(preference, preference.Config(**settings), logps, batch, monkeypatch, statistics)
    assert got[0] == pytest.approx(value, rel=bound)
    assert np.abs(got[1] - grads).max() <= bound * np.abs(grads).max()
    assert np.abs(grads).max() > 1e-4
    for name in SHARED:
        assert got[2][name] == pytest.approx(metrics[name], rel=max(bound, 1e-6), abs=1e-7), name


SMOOTHING = 0.125  # exact in float32, to which TRL rounds it
SINGLE = {
    **{name: {"loss_type": name, "beta": 0.3} for name in PREFERENCE_LOSSES if name != "ipo_sum"},
    "robust": {"loss_type": "robust", "beta": 0.3, "label_smoothing": SMOOTHING},
    "exo_pair": {"loss_type": "exo_pair", "beta": 0.3, "label_smoothing": SMOOTHING},
    "discopop, tau": {"loss_type": "discopop", "beta": 0.3, "discopop_tau": 0.5},
    "mpo": {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0), "beta": 0.1},
    "ld": {"beta": 0.1, "ld_alpha": 0.3},
    "ld, ipo": {"loss_type": "ipo", "beta": 0.1, "ld_alpha": 0.0},
    # TRL's hinge and sft cannot be differentiated under weights: they are multiplied in place.
    "wpo": {"beta": 0.1, "use_weighting": True},
    "wpo, several": {
        "loss_type": ("nca_pair", "apo_down"),
        "loss_weights": (0.3, 2.0),
        "beta": 0.1,
        "use_weighting": True,
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SINGLE)
def test_dpo_losses(name, dtype, monkeypatch):
    compare_dpo(SINGLE[name], dtype, monkeypatch)


@pytest.mark.parametrize("kind", [kind for kind in DIVERGENCES if kind != "reverse_kl"])
@pytest.mark.parametrize("name", sorted(MARGIN_LOSSES - {"sft", "ipo_sum"}))
def test_f_divergences(name, kind, monkeypatch):
    """In float64 where TRL has it."""
    settings: dict[str, Any] = {"loss_type": name, "beta": 0.1, "f_divergence_type": kind}
    if name in ("robust", "exo_pair"):
        settings["label_smoothing"] = SMOOTHING
    if kind == "alpha_divergence":
        settings["f_alpha_divergence_coef"] = 0.3
    compare_dpo(settings, "float32" if kind == "alpha_divergence" else "float64", monkeypatch, 0.2)


def trl_reference_free(trainer_type, settings, logits, dtype):
    """`get_batch_loss_metrics` of CPOTrainer or ORPOTrainer, from logits."""
    given = torch.tensor(logits, dtype=DTYPES[dtype][1], requires_grad=True)
    ids, completion, real = torch.tensor(tokens()), torch.tensor(COMPLETION), torch.tensor(REAL).long()
    labels = torch.where(completion, ids, -100)
    batch = {}
    for side, rows in (("chosen", slice(0, PAIRS)), ("rejected", slice(PAIRS, None))):
        batch |= {f"{side}_input_ids": ids[rows], f"{side}_attention_mask": real[rows], f"{side}_labels": labels[rows]}
    trainer = SimpleNamespace(
        is_encoder_decoder=False,
        padding_value=0,
        pad_token_id=0,
        aux_loss_enabled=False,
        accelerator=Accelerator(),
        concatenated_inputs=trainer_type.concatenated_inputs,
        get_batch_logps=trainer_type.get_batch_logps,
        **{"label_smoothing": 0.0, "simpo_gamma": 0.5, "alpha": 0.0, "cpo_alpha": 1.0, **settings},
    )
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer_type, name):
            setattr(trainer, name, getattr(trainer_type, name).__get__(trainer))
    model = Model(outputs=SimpleNamespace(logits=given))
    loss, metrics = trainer_type.get_batch_loss_metrics(trainer, model, batch)
    loss.backward()
    return loss.item(), given.grad.numpy()[:, :-1], {name: float(each) for name, each in metrics.items()}


FREE = {
    "cpo": {"loss_type": "sigmoid", "beta": 0.1},
    "cpo, smoothed": {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.2, "cpo_alpha": 0.5},
    "hinge": {"loss_type": "hinge", "beta": 0.1},
    "ipo": {"loss_type": "ipo", "beta": 0.5},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.2, "cpo_alpha": 0.0},
    "simpo, smoothed": {"loss_type": "simpo", "beta": 2.0, "label_smoothing": 0.2},
    "alphapo": {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.1, "alpha": 0.25, "cpo_alpha": 0.0},
    "alphapo, negative": {"loss_type": "ipo", "beta": 0.5, "alpha": -0.5},
    "orpo": {"loss_type": "orpo", "beta": 0.3},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FREE)
def test_reference_free_losses(name, dtype, monkeypatch):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    settings, orpo = FREE[name], name == "orpo"
    # ORPOTrainer computes its odds in float32 whatever it is given.
    bound = 1e-6 if orpo and dtype == "float64" else DTYPES[dtype][0]
    logits = np.random.default_rng(3).normal(0, 1.5, (2 * PAIRS, WIDTH, VOCAB)).astype(dtype)
    value, grads, metrics = trl_reference_free(ORPOTrainer if orpo else CPOTrainer, settings, logits, dtype)
    with jax.enable_x64(dtype == "float64"):

        def statistics(given, predictions):
            return token_statistics(lambda hidden: hidden, given, predictions, chunk=5)

        batch = our_batch({}, prompts=orpo)
        got = ours(reference_free, reference_free.Config(**settings), logits[:, :-1], batch, monkeypatch, statistics)
    assert got[0] == pytest.approx(value, rel=bound)
    assert np.abs(got[1] - grads).max() <= bound * np.abs(grads).max()
    assert np.abs(grads).max() > 1e-4
    extra = {"log_odds_ratio", "log_odds_chosen"} if orpo else set()
    # Without a likelihood term TRL logs 0 for it.
    extra |= {"nll_loss"} if settings.get("cpo_alpha", 1.0) else set()
    for shared in SHARED | extra:
        assert got[2][shared] == pytest.approx(metrics[shared], rel=max(bound, 1e-6), abs=1e-7), shared


def test_tr_dpo_mixes_as_trl_does():
    from trl.trainer.callbacks import SyncRefModelCallback

    from jaxalign.methods.moving_reference import MovingReference

    draw = np.random.default_rng(0)
    policy, reference = (draw.normal(size=(4, 5)).astype(np.float32) for _ in range(2))
    theirs = [torch.nn.Linear(5, 4, bias=False) for _ in range(2)]
    for module, weight in zip(theirs, (policy, reference), strict=True):
        module.weight.data = torch.tensor(weight)
    SyncRefModelCallback._sync_target_model(*theirs, 0.6)
    fill: Any = lambda variables, batch: batch  # noqa: E731
    moving = MovingReference(fill, {"w": jnp.asarray(reference)}, alpha=0.6, every=2)
    moving.follow(2, {"w": jnp.asarray(policy)})
    np.testing.assert_allclose(moving.state()["variables"]["w"], theirs[1].weight.detach().numpy(), rtol=1e-6)
