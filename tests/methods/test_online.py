"""The source of online methods: fresh rollouts, who learns from what and when, resuming, dynamic sampling, metrics."""

import time
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sampling
from jaxalign.methods import grpo
from jaxalign.methods.offline import Layout
from jaxalign.methods.online import TIMES, NoSignalError, OnlineSource, Parts, Pending
from jaxalign.methods.rollout import make_draw, row_length
from jaxalign.rewards import RewardError
from jaxalign.sampling.generate import EOS, LENGTH, STOP
from jaxalign.sharding import MeshConfig, data_shards, make_mesh, param_shardings
from jaxalign.training import storable
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.timings import TIMINGS
from jaxalign.types import Experience, Samples
from tests.layouts import VOCAB, tiny_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")

KEY = jax.random.key(6)
SMALL: dict[str, Any] = {"num_layers": 2, "windows": (9, 9)}
WIDTH, STEPS, GENERATIONS, TEMPERATURE = 16, 10, 3, 0.7
SIZES = (1, 16, 5, 9, 2, 12, 7)
PROMPTS = [{"prompt_ids": np.random.default_rng(size).integers(1, VOCAB, size).astype(np.int32)} for size in SIZES]
POLICY = {"shift": -1.0}
# Enough of the ids that completions end at many lengths.
EOS_IDS = tuple(range(1, 16))


@cache
def small():
    return tiny_model(**SMALL)


def config_of(**settings) -> grpo.Config:
    known = {"num_generations": GENERATIONS, "max_completion_length": STEPS, "temperature": TEMPERATURE}
    return grpo.Config(**{**known, "logits_chunk": 17, **settings})


def one_device():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def layout_of(config, batch_size=2, micro_batch_size=1, mesh=None):
    length = row_length(WIDTH, STEPS, GENERATIONS, share_prompt=config.share_prompt, multiple=32)
    return Layout(batch_size, micro_batch_size, length, 1 if mesh is None else data_shards(mesh))


@cache
def sampler(mesh=None, **options):
    settings = sampling.Config(
        temperature=TEMPERATURE, max_new_tokens=STEPS, num_generations=GENERATIONS, eos_ids=EOS_IDS, slots=5, **options
    )
    return make_draw(small()[0], settings, mesh or one_device(), width=WIDTH)


def stub(variables, prompts, key) -> Samples:
    """Completions from the key and the policy alone, without a model."""
    rng, n = np.random.default_rng(np.asarray(jax.random.key_data(key))), len(prompts) * GENERATIONS
    lengths = rng.integers(1, STEPS + 1, n).astype(np.int32)
    mask = np.arange(STEPS) < lengths[:, None]
    tokens = rng.integers(1, VOCAB, (n, STEPS)) * mask
    logps = np.float32(variables["shift"]) * rng.random((n, STEPS), np.float32) * mask
    return Samples(tokens.astype(np.int32), lengths, (lengths < STEPS).astype(np.int32), logps, 0 * logps)


def two_scores(experience):
    """A tenth of the sum of a completion's tokens modulo 7, none where that is 3; and its length."""
    sums = experience.tokens.sum(1) % 7
    first = np.where(sums == 3, np.nan, sums / 10)
    return lambda: np.stack([first, experience.lengths.astype(np.float64)], 1)


def make_source(config, draw=stub, score=two_scores, mesh=None, *, seed=0, shuffle=True, passes=None, **layout):
    mesh = mesh or one_device()
    parts = Parts(PROMPTS, draw, lambda params: params, score, ("sum", "length"), passes or {}, WIDTH)
    return OnlineSource(
        grpo, config, parts, layout_of(config, mesh=mesh, **layout), mesh, key=KEY, seed=seed, shuffle=shuffle
    )


def draw_next(source: OnlineSource, params: Any = POLICY) -> tuple[Any, dict[str, Any]]:
    return source.next(SimpleNamespace(params=params))


def held(source: OnlineSource) -> Experience:
    experience = source.experience
    assert experience is not None
    return experience


def policy_passes(config, variables):
    """The passes that the config asks for; the reference is the policy with other numbers."""
    logps = jax.jit(grpo.make_logps(config, small()[0]))
    reference = jax.tree.map(lambda x: x * 0.98, variables)
    runs = {"policy": logps, "reference": lambda params, batch: logps(reference, batch)}
    return {name: runs[role] for name, role in grpo.passes(config, narrow=False).items()}


def shown(source: OnlineSource) -> Experience:
    drawn = source.drawn
    assert drawn is not None
    return drawn


def fresh_logps(config, variables, batch):
    """The trainer's log-probs of a batch's tokens, and where there are any."""
    found = jax.jit(grpo.make_logps(config, small()[0]))(variables, batch)
    return np.asarray(found), np.asarray(batch.predictions.completions) >= 0


def clipped(config, variables, batch) -> dict[str, Any]:
    micro = jax.tree.map(lambda x: x[0], batch)
    run = jax.jit(grpo.make_loss(config, small()[0]))
    return {
        name: metric.value() for name, metric in run(variables, {}, micro, grpo.totals(config, batch), KEY)[1].items()
    }


def test_one_update_per_rollout_has_ratio_1():
    """With bounds of width 0 nothing is clipped; what the sampler said is compared with the trainer, at T and top-p."""
    config, (_, variables) = config_of(epsilon=0.0), small()
    source = make_source(config, sampler(top_k=20, top_p=0.9), micro_batch_size=2)
    batch, metrics = draw_next(source, variables)
    assert "old_logps" not in batch.fields
    assert (held(source).fields["log_mass"] < -0.05).sum() > 10
    found = clipped(config, variables, batch)
    assert found["clip_ratio/region_mean"] == 0
    assert 0 < found["sampling/sampling_logp_difference/max"] <= 1e-4 / TEMPERATURE
    assert found["sampling/sampling_logp_difference/mean"] <= 1e-5 / TEMPERATURE
    assert len(set(held(source).lengths.tolist())) > 3
    assert metrics["completions/clipped_ratio"].value() == np.mean(held(source).finish == LENGTH)


@pytest.mark.parametrize("old_logps", ["sampler", "trainer"])
def test_the_first_of_several_updates_has_ratio_1(old_logps):
    """To 1e-4 / T in float32, on every batch of the rollout, since the policy has not moved here."""
    config, (_, variables) = config_of(old_logps=old_logps, num_iterations=2, steps_per_generation=2), small()
    source = make_source(config, sampler(), passes=policy_passes(config, variables))
    for update in range(4):
        batch, _ = draw_next(source, variables)
        difference = clipped(config, variables, batch)["sampling/sampling_logp_difference/max"]
        assert 0 < difference <= 1e-4 / TEMPERATURE if update == 0 else difference is None
        fresh, real = fresh_logps(config, variables, batch)
        apart = np.abs(fresh - np.asarray(batch.fields["old_logps"]))[real]
        assert apart.max() <= 1e-4 / TEMPERATURE
        if old_logps == "trainer":
            assert apart.max() <= 2e-6  # the same pass, but for the other documents in its rows
        else:
            np.testing.assert_array_equal(batch.fields["old_logps"], batch.fields["sampler_logps"])
    if old_logps == "trainer":
        return
    narrow = replace(config, epsilon=2e-4 / TEMPERATURE)
    batch, _ = draw_next(make_source(config, sampler(), micro_batch_size=2), variables)
    assert clipped(narrow, variables, batch)["clip_ratio/region_mean"] == 0


def test_a_mesh_draws_and_passes_the_same_prompts():
    """3 prompts on 8 shards: every completion lies beside its own prompt and its own log-probs."""
    config, (_, variables) = config_of(old_logps="trainer", num_iterations=2, beta=0.1), small()
    mesh = make_mesh(MeshConfig(4, 2, 1))
    placed = jax.device_put(variables, param_shardings(mesh, variables))
    source = make_source(
        config, sampler(mesh), mesh=mesh, passes=policy_passes(config, placed), batch_size=3, micro_batch_size=2
    )
    batch, _ = draw_next(source, placed)
    sampled = np.asarray(batch.fields["old_logps"]) - np.asarray(batch.fields["sampler_logps"])
    assert np.abs(sampled).max() <= 1e-4 / TEMPERATURE
    reference = jax.tree.map(lambda x: x * 0.98, variables)
    for name, by in (("old_logps", variables), ("ref_logps", reference)):
        fresh, real = fresh_logps(config, by, jax.device_get(batch))
        assert np.abs(fresh - np.asarray(batch.fields[name]))[real].max() <= 1e-4
    assert sorted(map(len, prompts_of(batch))) == sorted(SIZES[i] for i in held(source).examples)


def prompts_of(batch) -> list[tuple[int, ...]]:
    """The trunks of a batch's documents, in no order."""
    rows = jax.tree.map(np.asarray, batch.rows)
    trunks = [
        tuple(
            rows.tokens[micro, row][(rows.documents[micro, row] == number) & (rows.branches[micro, row] == 0)].tolist()
        )
        for micro in range(rows.tokens.shape[0])
        for row in range(rows.tokens.shape[1])
        for number in range(1, rows.documents[micro, row].max() + 1)
    ]
    return sorted(trunks)


def named(numbers) -> list[tuple[int, ...]]:
    return sorted(tuple(PROMPTS[i]["prompt_ids"].tolist()) for i in numbers)


def test_which_update_learns_from_which_prompts():
    """2 iterations × 2 batches of 2 prompts per rollout: a, b, a, b, then 4 prompts more, over the epochs' edges."""
    config = config_of(num_iterations=2, steps_per_generation=2)
    source = make_source(config, shuffle=False)
    taken, tokens = [], 0
    for update in range(16):
        rollout, place = divmod(update, 4)
        batch, metrics = draw_next(source)
        wanted = [(4 * rollout + 2 * (place % 2) + i) % 7 for i in (0, 1)]
        assert prompts_of(batch) == named(wanted)
        assert ("reward" in metrics) == (place == 0)
        predictions = int((np.asarray(batch.predictions.completions) >= 0).sum())
        tokens += predictions + GENERATIONS * sum(SIZES[i] for i in wanted)
        assert metrics["num_tokens"] == tokens
        assert metrics["epoch"] == 4 * (rollout + 1) / 7
        assert metrics["episode"] == 4 * (rollout + 1) * GENERATIONS
        taken.append(np.asarray(batch.rows.tokens))
    np.testing.assert_array_equal(taken[0], taken[2])
    np.testing.assert_array_equal(taken[1], taken[3])
    # 7 rollouts of 4 prompts are 4 epochs: then the same prompts are drawn anew.
    for _ in range(12):
        draw_next(source)
    batch, _ = draw_next(source)
    assert prompts_of(batch) == named([0, 1]) and not np.array_equal(batch.rows.tokens, taken[0])


def test_every_epoch_takes_every_prompt_once_in_an_order_of_its_own():
    def orders(seed):
        source, config = make_source(config_of(), seed=seed, batch_size=5), config_of()
        assert grpo.num_updates(config) == 1
        numbers = []
        for _ in range(7):
            draw_next(source)
            numbers += held(source).examples.tolist()
        return [tuple(numbers[start : start + 7]) for start in range(0, 35, 7)]

    first = orders(0)
    assert all(sorted(order) == list(range(7)) for order in first)
    assert len(set(first)) == 5
    assert orders(0) == first and orders(1) != first


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def timeless(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMES}


def test_a_source_goes_on_bit_for_bit_from_any_update(tmp_path):
    """Through a real checkpoint; scores are float64 and not to be had in float32."""
    config = config_of(num_iterations=2, steps_per_generation=2, beta=0.1)
    logps = lambda params, batch: jnp.cos(batch.predictions.targets * params["shift"])  # noqa: E731
    source = make_source(config, passes={"ref_logps": logps})
    wanted, saved = [], []
    with Checkpoints(tmp_path / "saved") as checkpoints:
        for update in range(9):
            if update:
                checkpoints.save(update, {"x": jnp.zeros(2)}, source.state(), {})
            saved.append(storable.pack(source.state()))
            assert (source.state()["experience"] is None) == (update % 4 == 0)  # what is used up takes no room
            policy = {"shift": -1.0 - update}  # the policy moves
            batch, metrics = draw_next(source, policy)
            wanted.append((policy, batch, timeless(metrics), storable.pack(source.state())))
        assert np.asarray(np.float32(held(source).scores)).tolist() != held(source).scores.tolist()
        for update in range(9):
            resumed = make_source(config, passes={"ref_logps": logps})
            if update in (2, 4, 7):
                restored = checkpoints.restore({"x": jnp.zeros(2)}, update)
                assert restored is not None
                resumed.restore(restored.source)
            else:
                resumed.restore(storable.unpack(*saved[update]))
            for policy, batch, metrics, after in wanted[update:]:
                other, found = draw_next(resumed, policy)
                assert_equal(other, batch)
                assert timeless(found) == metrics
                assert storable.pack(resumed.state())[0] == after[0]
                assert_equal(storable.pack(resumed.state())[1], after[1])


def by_prompt(flat):
    """Scores that are equal for the completions of some prompts, by number."""

    def score(experience):
        values = np.arange(len(experience.tokens), dtype=np.float64)
        values[np.isin(experience.examples, flat)[experience.groups]] = 1.0
        return lambda: np.stack([values, 0 * values], 1)

    return score


def test_dynamic_sampling_fills_the_batch_with_groups_that_differ():
    """Without shuffling, prompts 0, 2, 4, 5, 6 give nothing: of 0..3 two are kept, of 4, 5, 6, 0 none, then 1 and 3."""
    config = config_of(dynamic_sampling=True, steps_per_generation=2, max_rollouts=4)
    keys = []

    def draw(variables, prompts, key):
        keys.append(jax.random.key_data(key).tolist())
        return stub(variables, prompts, key)

    source = make_source(config, draw, by_prompt([0, 2, 4, 5, 6]), shuffle=False)
    batch, metrics = draw_next(source)
    assert len(keys) == len(set(map(tuple, keys))) == 3
    assert held(source).examples.tolist() == [1, 3, 1, 3]
    assert prompts_of(batch) == named([1, 3]) == prompts_of(draw_next(source)[0])
    assert not np.array_equal(held(source).tokens[:6], held(source).tokens[6:])
    found = {name: metric.value() for name, metric in metrics.items() if name.startswith("dynamic")}
    assert found == {"dynamic_sampling/rollouts": 3, "dynamic_sampling/kept": 4 / 12}
    # Rewards and lengths are of all that was drawn.
    assert metrics["frac_reward_zero_std"].value() == 8 / 12 and metrics["epoch"] == 12 / 7
    assert metrics["reward"].weight == metrics["completions/mean_length"].weight == 12 * GENERATIONS
    assert metrics["rewards/sum/mean"].weight == 12 * GENERATIONS
    assert shown(source).examples.tolist() == [0, 1, 2, 3]
    mask = held(source).fields["loss_mask"]
    np.testing.assert_array_equal(mask.sum(1), held(source).lengths)


class Waits:
    """Scores that the given number of draws are waited for, by name of what happens."""

    def __init__(self, flat, patience):
        self.events, self.score, self.patience = [], by_prompt(flat), patience

    def draw(self, variables, prompts, key):
        self.events.append("draw")
        return stub(variables, prompts, key)

    def __call__(self, experience):
        self.events.append("score")
        wait = self.score(experience)

        def collect():
            self.events.append("scores")
            return wait()

        return Pending(collect, lambda seconds: self.patience)


def test_slow_scores_overlap_with_the_next_draw_and_change_nothing():
    """Of three draws that are needed the second and third come while the one before is scored; so does one too many."""
    config, flat = config_of(dynamic_sampling=True, steps_per_generation=2, max_rollouts=4), [0, 2, 4, 5, 6]
    quick, slow = Waits(flat, patience=False), Waits(flat, patience=True)
    sources = [make_source(config, waits.draw, waits, shuffle=False) for waits in (quick, slow)]
    for _ in range(4):
        (batch, metrics), (other, others) = (draw_next(source) for source in sources)
        assert_equal(batch, other)
        assert timeless(metrics) == timeless(others)
        saved, also = (storable.pack(source.state()) for source in sources)
        assert saved[0] == also[0]
        assert_equal(saved[1], also[1])
    assert quick.events[:9] == ["draw", "score", "scores"] * 3
    assert slow.events[:10] == ["draw", "score", "draw", "scores", "score", "draw", "scores", "score", "draw", "scores"]
    # The last that is allowed is never followed by another.
    last = Waits(range(7), patience=True)
    with pytest.raises(NoSignalError):
        draw_next(make_source(config, last.draw, last))
    assert last.events.count("draw") == 4


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_source_that_could_not_score_is_as_it_was(dynamic):
    """The second rollout fails twice, in its second draw where there is one; then all is as if it never had."""
    most = {"dynamic_sampling": True, "max_rollouts": 9} if dynamic else {}
    config = config_of(steps_per_generation=2, num_iterations=2, **most)
    score, broken = by_prompt([0, 2, 4, 5, 6]), []

    def failing(experience):
        wait = score(experience)
        calls.append(1)

        def collect():
            if broken and len(calls) > dynamic:
                raise RewardError("out of order")
            return wait()

        return collect

    calls: list[int] = []
    source, other = make_source(config, score=failing), make_source(config, score=score)
    for update in range(9):
        if update in (4, 8):
            broken.append(1)
            before = storable.pack(source.state())
            for _ in range(2):
                calls.clear()
                with pytest.raises(RewardError):
                    draw_next(source)
                after = storable.pack(source.state())
                assert before[0] == after[0]
                assert_equal(before[1], after[1])
            broken.clear()
        (batch, metrics), (expected, wanted) = draw_next(source), draw_next(other)
        assert_equal(batch, expected)
        assert timeless(metrics) == timeless(wanted)


def test_scoring_counts_rewards_that_are_computed_at_once():
    """As reward models are: nothing is left to wait for."""

    def score(experience):
        time.sleep(0.2)
        scores = two_scores(experience)()
        return lambda: scores

    for dynamic in (False, True):
        _, metrics = draw_next(make_source(config_of(dynamic_sampling=dynamic), score=score))
        assert metrics["timing_s/scoring"].value() >= 0.2 > metrics["timing_s/sampling"].value()


def test_dynamic_sampling_gives_up_with_counts():
    config = config_of(dynamic_sampling=True, max_rollouts=3)
    source = make_source(config, score=by_prompt([0, 1, 2, 3, 4, 6]), shuffle=False)
    with pytest.raises(NoSignalError, match=r"after 3 rollouts only 1 of 2 prompts .*method\.max_rollouts \(3\)"):
        draw_next(source)


def test_metrics_of_rewards_leave_out_what_has_none():
    """Standard deviations with Bessel's correction; a reward that nobody got has no metric."""
    source = make_source(config_of(), batch_size=3)
    _, metrics = draw_next(source)
    sums, lengths = held(source).scores.T
    known = sums[~np.isnan(sums)]
    assert 1 < len(known) < len(sums) == 9
    outcomes = np.nan_to_num(sums) + lengths
    wanted = {
        "rewards/sum/mean": known.mean(),
        "rewards/sum/std": known.std(ddof=1),
        "rewards/length/mean": lengths.mean(),
        "rewards/length/std": lengths.std(ddof=1),
        "reward": outcomes.mean(),
        "reward_std": outcomes.std(ddof=1),
        "completions/min_length": lengths.min(),
        "prompt_length/max": held(source).prompt_lengths.max(),
        "prompt_length/mean": np.mean([SIZES[i] for i in held(source).examples]),
        "completions/max_length": lengths.max(),
        "completions/mean_terminated_length": lengths[held(source).finish > 0].mean(),
    }
    found = {name: metrics[name].value() for name in wanted}
    assert found == pytest.approx(wanted, rel=1e-6)
    assert set(TIMES) <= metrics.keys() and set(TIMES) <= TIMINGS
    silent = make_source(config_of(), score=lambda e: lambda: np.stack([e.lengths * np.nan, e.lengths * 1.0], 1))
    _, metrics = draw_next(silent)
    assert not {"rewards/sum/mean", "rewards/sum/std"} & metrics.keys() and "rewards/length/mean" in metrics


def test_stop_strings_cut_tokens_log_probs_and_finish():
    """Token t reads as a letter; whatever completes `ab` is the last token, also the last of all that were drawn."""
    model, variables = small()
    settings = sampling.Config(temperature=2.0, max_new_tokens=STEPS, num_generations=20, eos_ids=(1,))
    decode = lambda ids: "".join("_ab"[t % 3] for t in ids)  # noqa: E731
    prompts = [each["prompt_ids"] for each in PROMPTS[:3]]
    plain, cut = (
        make_draw(model, settings, one_device(), width=WIDTH, stops=stops, decode=decode)(variables, prompts, KEY)
        for stops in ((), ("ab", "bbbb"))
    )
    seen = set()
    for c in range(60):
        text = decode(plain.tokens[c, : plain.lengths[c]].tolist())
        ends = [text.find(stop) + len(stop) for stop in ("ab", "bbbb") if stop in text]
        length = min(ends, default=plain.lengths[c])
        assert cut.lengths[c] == length
        assert cut.finish[c] == (STOP if ends else plain.finish[c])
        for name in ("tokens", "sampler_logps", "log_mass"):
            np.testing.assert_array_equal(getattr(cut, name)[c, :length], getattr(plain, name)[c, :length])
            assert not getattr(cut, name)[c, length:].any()
        seen.add((bool(ends), bool(length == STEPS), int(plain.finish[c])))
    # Cut before the end, brought to a stop by the very last token, ended by EOS, by length.
    assert {(True, False, LENGTH), (True, True, LENGTH), (False, True, LENGTH), (False, False, EOS)} <= seen
