"""The loop: resume is exact wherever a run dies, and everything is done at its step.

The run is small but has what makes resuming hard: noise in the step, a source with its own generator whose buffer is
drawn from the current policy, batches of two shapes, sums over an interval that saves cut through, and metrics that
are sometimes absent. `python test_loop.py FOLDER ...` runs it in a process that a test can kill.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.training import checkpoint, guards, loop, metrics, optimizer, timings
from jaxalign.training.loop import Config, fit
from jaxalign.training.state import TrainState, init_state
from jaxalign.types import Max, Mean, Min

WIDTH = 6
TRANSFORM, SCHEDULE = optimizer.make_optimizer(
    optimizer.Config(learning_rate=0.03, warmup_steps=3, lr_scheduler_type="constant_with_warmup", weight_decay=0.01),
    40,
)


def network(params: Any, x: Any, noise: Any = 0.0) -> jax.Array:
    return jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None] + noise) @ params["out"]["kernel"]


@jax.jit
def initial() -> TrainState:
    keys = jax.random.split(jax.random.key(7), 2)
    params = {
        "hidden": {"kernel": jax.random.normal(keys[0], (4, WIDTH)), "bias": jnp.zeros(WIDTH)},
        "out": {"kernel": jax.random.normal(keys[1], (WIDTH, 1))},
    }
    return init_state(params, TRANSFORM, jax.random.key(5))


def step(state: Any, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, Any]]:
    noise = 0.1 * jax.random.normal(jax.random.fold_in(state.key, state.step), (batch["x"].shape[0], WIDTH))

    def loss(params):
        return jnp.mean((network(params, batch["x"], noise) - batch["y"]) ** 2) * frozen["scale"]

    value, grads = jax.value_and_grad(loss)(state.params)
    updates, opt_state = TRANSFORM.update(grads, state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    reported = {
        "loss": Mean(value, jnp.ones(())),
        "weighted": Mean(batch["y"].sum(), jnp.float32(batch["y"].size)),
        "least": Min(batch["y"].min()),
        "most": Max(batch["y"].max()),
        "nothing": Mean(jnp.zeros(()), jnp.zeros(())),
        "learning_rate": SCHEDULE(state.step),
    }
    return TrainState(state.step + 1, params, opt_state, state.key), reported


JITTED = jax.jit(step, donate_argnums=0)
PREDICT = jax.jit(network)
FROZEN = {"scale": np.float32(1.5)}


class RolloutSource:
    """Every few batches a new buffer from the current policy; its length and its batches' sizes vary."""

    def __init__(self, dies_before: int | None = None):
        self.rng, self.buffer, self.position, self.tokens, self.calls = np.random.default_rng(3), None, 0, 0, 0
        self.dies_before = dies_before

    def next(self, state):
        self.calls += 1
        if self.dies_before is not None and self.calls == self.dies_before:
            raise RuntimeError("killed")
        extra = {}
        if self.buffer is None or self.position >= len(self.buffer["x"]):
            x = self.rng.normal(size=(8 * int(self.rng.integers(1, 4)) - 2, 4)).astype(np.float32)
            target = np.sin(x.sum(1, keepdims=True)) + np.asarray(PREDICT(state.params, x))
            self.buffer, self.position = {"x": x, "y": target / 2}, 0
            extra["rollout_score"] = Mean(float(target.sum()), float(target.size))
        part = slice(self.position, self.position + 8)
        batch = {name: array[part] for name, array in self.buffer.items()}
        self.position += 8
        self.tokens += batch["x"].size
        return batch, {**extra, "num_tokens": self.tokens, "epoch": self.tokens / 1000}

    def state(self):
        return {
            "rng": self.rng.bit_generator.state,
            "buffer": self.buffer,
            "position": self.position,
            "tokens": np.int64(self.tokens),
        }

    def restore(self, state):
        self.rng.bit_generator.state = state["rng"]
        self.buffer, self.position, self.tokens = state["buffer"], state["position"], int(state["tokens"])


def evaluation(state):
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    return {"loss": Mean(np.square(PREDICT(state.params, x)).sum(), 3.0), "absent": None}


def run(folder: Path, config: Config, source=None, step=JITTED, **more):
    """One process of a run: restores what there is, then trains on."""
    with checkpoint.Checkpoints(folder / "checkpoints", save_total_limit=2) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(initial))
        resume = loop.written_until(restored)
        writers = metrics.open_writers(folder, resume_step=resume)
        samples = metrics.JsonLines(folder / "samples.jsonl", resume)
        try:
            state = restored.state if restored else initial()
            return fit(
                state,
                FROZEN,
                step,
                source or RolloutSource(),
                config,
                checkpoints=checkpoints,
                restored=restored,
                writers=writers,
                evaluate=more.pop("evaluate", evaluation),
                on_sample=lambda number, state: [
                    {"completion": f"at {number}", "score": float(np.asarray(state.params["out"]["kernel"]).sum())}
                ],
                samples=samples,
                **more,
            )
        finally:
            for writer in [*writers, samples]:
                writer.close()


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Records without what the clock decides; floats compare bit for bit, since JSON holds their shortest repr."""
    records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in timings.TIMINGS} for record in records]


def assert_same_run(result_state, folder: Path, expected_state, expected_folder: Path):
    for a, b in zip(jax.tree.leaves(result_state), jax.tree.leaves(expected_state), strict=True):
        a, b = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert lines(folder) == lines(expected_folder)
    assert lines(folder, "samples.jsonl") == lines(expected_folder, "samples.jsonl")


STEPS = 11
CONFIG = Config(num_steps=STEPS, logging_steps=4, save_steps=3, eval_steps=5, sample_steps=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, CONFIG), folder


def test_an_uninterrupted_run_logs_every_interval(whole):
    result, folder = whole
    assert (result.step, result.reason, int(result.state.step)) == (STEPS, "completed", STEPS)
    records = lines(folder)
    assert [(r["step"], "loss" in r, "eval_loss" in r) for r in records[:-1]] == [
        (4, True, False),
        (5, False, True),
        (8, True, False),
        (10, False, True),
        (11, False, True),
        (11, True, False),
    ]
    assert records[-1].keys() == {"step", "train_loss"} and result.metrics["train_loss"] == records[-1]["train_loss"]
    assert "train_runtime" in result.metrics and "train_steps_per_second" in result.metrics
    assert all("nothing" not in r and "eval_absent" not in r for r in records)
    assert [r["step"] for r in lines(folder, "samples.jsonl")] == [2, 4, 6, 8, 10]
    assert len({r["loss"] for r in records if "loss" in r}) == 3


def test_intervals_are_merged_and_plain_numbers_are_the_latest(tmp_path, whole):
    run(tmp_path, Config(num_steps=STEPS, logging_steps=1, save_steps=0))
    each = [r for r in lines(tmp_path) if "loss" in r]
    merged = [r for r in lines(whole[1]) if "loss" in r]
    for record, part in zip(merged, (each[:4], each[4:8], each[8:]), strict=True):
        np.testing.assert_allclose(record["loss"], np.mean([r["loss"] for r in part]), rtol=1e-15)
        assert record["least"] == min(r["least"] for r in part) and record["most"] == max(r["most"] for r in part)
        assert record["num_tokens"] == part[-1]["num_tokens"] and record["epoch"] == part[-1]["epoch"]
        assert record["learning_rate"] == part[-1]["learning_rate"]
        rollouts = [r["rollout_score"] for r in part if "rollout_score" in r]
        assert ("rollout_score" in record) == bool(rollouts)
    np.testing.assert_allclose(lines(whole[1])[-1]["train_loss"], np.mean([r["loss"] for r in each]), rtol=1e-15)


@pytest.mark.parametrize("dies_before", range(1, STEPS + 1))
def test_killed_before_any_step_the_run_goes_on_bit_for_bit(tmp_path, whole, dies_before):
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, CONFIG, RolloutSource(dies_before))
    source = RolloutSource()
    result = run(tmp_path, CONFIG, source)
    assert source.calls <= STEPS - 3 * ((dies_before - 1) // 3) + 3
    assert_same_run(result.state, tmp_path, whole[0].state, whole[1])


class Outage(Exception):
    """Something outside fails, for a while."""


class Failing(RolloutSource):
    """Raises before its call of that number has changed anything."""

    def next(self, state):
        if self.dies_before is not None and self.calls + 1 == self.dies_before:
            raise Outage
        return super().next(state)


def saved_steps(folder: Path) -> list[int]:
    return checkpoint.Checkpoints(folder / "checkpoints").steps()


@pytest.mark.parametrize("number", range(1, STEPS + 1))
def test_a_source_that_fails_loses_no_step(tmp_path, whole, number):
    with pytest.raises(Outage):
        run(tmp_path, CONFIG, Failing(number), recoverable=(Outage,))
    assert saved_steps(tmp_path)[-1:] == ([number - 1] if number > 1 else [])
    with pytest.raises(Outage):  # as long as it fails, nothing changes
        run(tmp_path, CONFIG, Failing(1), recoverable=(Outage,))
    source = RolloutSource()
    result = run(tmp_path, CONFIG, source)
    assert source.calls == STEPS - number + 1
    assert_same_run(result.state, tmp_path, whole[0].state, whole[1])


def test_a_source_whose_error_leaves_it_spoilt_is_not_saved(tmp_path):
    with pytest.raises(Outage):
        run(tmp_path, CONFIG, Failing(6))
    assert saved_steps(tmp_path) == [3]


def test_a_state_that_is_not_finite_is_not_saved_either(tmp_path):
    @jax.jit
    def bad(state, frozen, batch):
        state, reported = step(state, frozen, batch)
        return state, {**reported, "loss": Mean(jnp.where(state.step == 5, jnp.nan, 1.0), 1.0)}

    config = Config(num_steps=STEPS, save_steps=3)
    with pytest.raises(FloatingPointError, match="step 5: loss is nan; checkpoint 3 is kept"):
        run(tmp_path, config, Failing(6), step=bad, recoverable=(Outage,))
    assert saved_steps(tmp_path) == [3]


@pytest.mark.parametrize("at", [5, 10, 11])
@pytest.mark.parametrize("logging_steps", [4, 5])
def test_an_evaluation_that_fails_loses_no_step(tmp_path, at, logging_steps):
    """Where a checkpoint is due (10), where none is, and after the last step; evaluations pick the best."""
    config = replace(CONFIG, logging_steps=logging_steps, save_steps=10, metric_for_best_model="loss")
    expected = run(tmp_path / "whole", config)
    folder = tmp_path / "failing"

    def fails(state):
        if int(state.step) == at:
            raise Outage
        return evaluation(state)

    for _ in range(2):
        with pytest.raises(Outage):
            run(folder, config, evaluate=fails)
        assert saved_steps(folder)[-1] == at
    result = run(folder, config)
    assert result.best == expected.best and saved_steps(folder) == saved_steps(tmp_path / "whole")
    assert_same_run(result.state, folder, expected.state, tmp_path / "whole")


def test_killed_again_and_again(tmp_path, whole):
    for calls in (5, 4, 3, 4):
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path, CONFIG, RolloutSource(calls))
    result = run(tmp_path, CONFIG)
    assert_same_run(result.state, tmp_path, whole[0].state, whole[1])


def test_a_finished_run_is_not_trained_further(tmp_path, whole):
    run(tmp_path, CONFIG)
    source = RolloutSource()
    result = run(tmp_path, CONFIG, source)
    assert source.calls == 0 and result.reason == "completed"
    assert_same_run(result.state, tmp_path, whole[0].state, whole[1])


def test_resume_falls_back_from_a_damaged_checkpoint_and_is_still_exact(tmp_path, whole):
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, CONFIG, RolloutSource(8))
    newest = tmp_path / "checkpoints" / "6"
    victim = max(newest.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(data)
    result = run(tmp_path, CONFIG)
    assert_same_run(result.state, tmp_path, whole[0].state, whole[1])
    assert (tmp_path / "checkpoints" / "6.damaged").is_dir()


class Order:
    """A source and a progress callback that write down who was called when."""

    def __init__(self):
        self.events, self.inner = [], RolloutSource()

    def next(self, state):
        self.events.append(f"next {len([e for e in self.events if e.startswith('next')]) + 1}")
        return self.inner.next(state)

    def state(self):
        return self.inner.state()

    def restore(self, state):
        self.inner.restore(state)

    def progress(self, number, values):
        assert np.isfinite(values["loss"])
        self.events.append(f"read {number}")


def test_metrics_of_a_step_are_read_after_the_next_is_dispatched():
    order = Order()
    fit(initial(), FROZEN, JITTED, order, Config(num_steps=4), progress=order.progress)
    assert order.events == ["next 1", "next 2", "read 1", "next 3", "read 2", "next 4", "read 3", "read 4"]


def test_early_stopping_gives_the_best_state_back_and_keeps_its_checkpoint(tmp_path):
    scores = iter([5.0, 4.0, 4.5, 3.9, 6.0, 7.0, 8.0, 1.0])
    config = Config(
        num_steps=40,
        save_steps=4,
        eval_steps=2,
        logging_steps=3,
        metric_for_best_model="loss",
        early_stopping_patience=4,
        early_stopping_threshold=0.2,
    )
    seen = {}

    def evaluate(state):
        seen[int(state.step)] = jax.device_get(state.params)
        return {"loss": next(scores)}

    result = run(tmp_path, config, evaluate=evaluate)
    # 3.9 is the best, but gains less than 0.2 on 4.0: four evaluations in a row are stale after step 12.
    assert (result.reason, result.step, result.best) == ("early_stopped", 12, loop.Best(8, 3.9))
    assert int(result.state.step) == 8
    np.testing.assert_array_equal(result.state.params["hidden"]["kernel"], seen[8]["hidden"]["kernel"])
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps() == [8, 12]
    assert [r["step"] for r in lines(tmp_path) if "loss" in r] == [3, 6, 9, 12]

    again = run(tmp_path, config, RolloutSource(dies_before=1), evaluate=evaluate)
    assert (again.reason, again.step, again.best, int(again.state.step)) == ("early_stopped", 12, result.best, 8)


def test_early_stopping_counts_across_a_resume(tmp_path):
    table = {2: 5.0, 4: 6.0, 6: 7.0, 8: 8.0}
    config = Config(
        num_steps=40, save_steps=2, eval_steps=2, metric_for_best_model="eval_loss", early_stopping_patience=3
    )

    def evaluate(state):
        return {"loss": table[int(state.step)]}

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, config, RolloutSource(dies_before=6), evaluate=evaluate)
    result = run(tmp_path, config, evaluate=evaluate)
    assert (result.reason, result.step, result.best) == ("early_stopped", 8, loop.Best(2, 5.0))


def test_the_best_of_a_completed_run_is_loaded_when_asked(tmp_path):
    scores = {2: 0.1, 4: 0.7, 6: 0.3}
    config = Config(num_steps=6, save_steps=0, eval_steps=2, metric_for_best_model="accuracy")

    def evaluate(state):
        return {"eval_accuracy": scores[int(state.step)]}

    last = run(tmp_path / "last", config, evaluate=evaluate)
    assert (int(last.state.step), last.best) == (6, loop.Best(4, 0.7))
    best = run(
        tmp_path / "best",
        Config(num_steps=6, save_steps=0, eval_steps=2, metric_for_best_model="accuracy", load_best_model_at_end=True),
        evaluate=evaluate,
    )
    assert int(best.state.step) == 4 and best.step == 6


@pytest.mark.parametrize("values", [[np.nan, 1.0, 2.0], [1.0, np.nan, 2.0], [2.0, 1.0, np.inf]])
def test_an_evaluation_that_is_not_finite_is_never_the_best(tmp_path, values):
    scores = iter(values)
    config = Config(num_steps=3, save_steps=0, eval_steps=1, metric_for_best_model="loss")
    result = run(tmp_path, config, evaluate=lambda state: {"loss": next(scores)})
    assert result.best is not None and result.best.value == 1.0


def test_a_missing_best_metric_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no eval_accuracy among eval_loss"):
        run(tmp_path, Config(num_steps=2, metric_for_best_model="accuracy"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(num_steps=0), "num_steps"),
        (Config(num_steps=1, early_stopping_patience=1), "early_stopping_patience needs metric_for_best_model"),
        (Config(num_steps=1, metric_for_best_model="loss"), "needs an evaluation"),
    ],
)
def test_configs_that_cannot_work_are_errors(config, message):
    with pytest.raises(ValueError, match=message):
        fit(initial(), FROZEN, JITTED, RolloutSource(), config)


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, what):
    @jax.jit
    def bad(state, frozen, batch):
        state, reported = step(state, frozen, batch)
        return state, {**reported, what: Mean(jnp.where(state.step == 6, jnp.inf, 1.0), 1.0)}

    with pytest.raises(FloatingPointError, match=rf"step 6: {what} is inf; checkpoint 3 is kept. Lower the learning"):
        run(tmp_path, CONFIG, step=bad)
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps() == [3]


def test_compiling_again_for_a_shape_seen_before_is_warned_of(caplog):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    class Moody(RolloutSource):
        def next(self, state):
            batch = {"x": np.ones((8, 4), np.float32), "y": np.ones((8, 1), np.float32)}
            self.calls += 1
            return jax.device_put(batch, sharded if self.calls == 4 else everywhere), {}

    state = jax.device_put(initial(), everywhere)
    with caplog.at_level("INFO", "jaxalign"):
        fit(state, FROZEN, jax.jit(step, donate_argnums=0), Moody(), Config(num_steps=6))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and warnings[0].startswith("step 4 was compiled again for a batch shape seen before")


def test_new_shapes_compile_quietly(caplog):
    fit(initial(), FROZEN, jax.jit(step, donate_argnums=0), RolloutSource(), Config(num_steps=10))
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_hidden_transfers_in_steady_state_are_errors():
    class Hidden(RolloutSource):
        def next(self, state):
            batch, extra = super().next(state)
            return {**batch, "x": np.ones((8, 4), np.float32), "y": np.ones((8, 1), np.float32)}, extra

    def leaky(state, frozen, batch):
        return JITTED(state, {"scale": np.float32(2.0)}, batch)

    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
        fit(initial(), FROZEN, leaky, Hidden(), Config(num_steps=3))


def test_timings_and_rates():
    shown = []
    config = Config(num_steps=6, logging_steps=2, flops_per_step=1e6, peak_flops=1e9, samples_per_step=8)

    class List:
        def write(self, step, record):
            shown.append((step, record))

        def close(self, *, failed=False):
            pass

    fit(initial(), FROZEN, JITTED, RolloutSource(), config, writers=[List()])
    for _, record in shown[:3]:
        np.testing.assert_allclose(record["mfu"], 1e6 / record["step_time"] / 1e9)
        assert record["tokens_per_second"] > 0
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        assert resident / 2 < record["process_memory_gib"] <= resident and "device_memory_gib" not in record
    np.testing.assert_allclose(
        shown[3][1]["train_samples_per_second"], 8 * shown[3][1]["train_steps_per_second"], rtol=1e-12
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_returns(tmp_path, whole, number):
    class Signalled(RolloutSource):
        def next(self, state):
            if self.calls == 4:
                signal.raise_signal(number)
            return super().next(state)

    before = signal.getsignal(number)
    result = run(tmp_path, CONFIG, Signalled())
    assert (result.reason, result.step, result.metrics) == ("terminated", 5, {})
    assert signal.getsignal(number) is before
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps() == [3, 5]
    result = run(tmp_path, CONFIG)
    assert_same_run(result.state, tmp_path, whole[0].state, whole[1])


def test_a_second_signal_raises_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "TOGETHER", 0.0)

    class Impatient(RolloutSource):
        def next(self, state):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("unreachable")

    with pytest.raises(KeyboardInterrupt, match="second SIGTERM"):
        run(tmp_path, CONFIG, Impatient())


# A process that can be killed. It saves after every step, and its state is large enough for a save to take a while.

LONG = Config(num_steps=25, logging_steps=7, save_steps=1, eval_steps=9, sample_steps=5)


class SlowSource(RolloutSource):
    def next(self, state):
        time.sleep(0.01)
        return super().next(state)


def main(folder: str) -> None:
    print("started", flush=True)
    result = run(Path(folder), LONG, SlowSource(), progress=lambda number, _: print(number, flush=True))
    print(result.reason, flush=True)
    if result.reason == "completed":
        np.savez(Path(folder) / "final.npz", *jax.tree.leaves(jax.device_get(result.state.params)))


def start(folder: Path) -> subprocess.Popen:
    # The persistent compile cache stays off: a process killed in a write would leave a broken entry to the others.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_NUMPY_RANK_PROMOTION": "raise"}
    command = [sys.executable, __file__, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def finished(folder: Path, expected, expected_folder: Path) -> None:
    with np.load(folder / "final.npz") as final:
        for got, leaf in zip(final.values(), jax.tree.leaves(expected.params), strict=True):
            np.testing.assert_array_equal(got, np.asarray(leaf))
    assert lines(folder) == lines(expected_folder)
    assert lines(folder, "samples.jsonl") == lines(expected_folder, "samples.jsonl")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    return run(folder, LONG).state, folder


def test_sigkill_and_sigterm_at_random_times(tmp_path, long):
    rng, steps = random.Random(11), []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = start(tmp_path)
        assert process.stdout is not None
        first = [process.stdout.readline() for _ in range(2)][-1]
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(number)
        rest, code = process.stdout.read().split(), process.wait()
        process.stdout.close()
        steps.append(int(first))
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL, rest
        else:
            assert code == 0 and rest[-1] == "terminated", rest
            after_term = int([first, *rest][-2])
            assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps()[-1] == after_term
    assert steps == sorted(steps) and steps[2] == after_term + 1
    output, _ = start(tmp_path).communicate()
    assert output.split()[-1] == "completed", output
    finished(tmp_path, *long)


if __name__ == "__main__":
    main(sys.argv[1])
