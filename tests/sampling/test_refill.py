"""Slots refilled inside the loop: the same draws in any number of slots and on any mesh, one prefill per prompt."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from jaxalign.sampling import Config, make_decoding, make_generate
from jaxalign.sampling.choose import choose
from jaxalign.sampling.logits import scale
from jaxalign.sharding import MeshConfig, make_mesh, param_shardings, remesh

KEY = jax.random.key(29)
GENERATIONS = 3
# Enough of 97 ids that completions end at many lengths.
CONFIG = Config(temperature=1.3, top_p=0.9, top_k=20, max_new_tokens=20, eos_ids=(3, 40), num_generations=GENERATIONS)


@pytest.fixture(scope="module")
def draw(small, pad):
    """`(mesh, **options) -> Samples` of 3 completions for each of 16 ragged prompts, two of them missing."""
    padded, lengths = pad([*small.prompts, *small.prompts[:6]])
    lengths = np.where(np.isin(np.arange(16), (5, 11)), 0, lengths).astype(np.int32)

    @cache
    def draw(mesh=None, trained=None, **options):
        config = replace(CONFIG, **options)
        variables = small.decoding
        if mesh is not None:
            training = make_mesh(trained or mesh)
            mesh = remesh(training, mesh, "rollout.mesh")
            placed = jax.device_put(small.variables, param_shardings(training, small.variables))
            variables = make_decoding(small.model, mesh)(placed)
        generate = jax.jit(make_generate(small.model, config, mesh))
        return jax.device_get(generate(variables, padded, lengths, KEY))

    return draw


def prompt_of(small, completion):
    return [*small.prompts, *small.prompts[:6]][completion // GENERATIONS]


def assert_same(small, assert_same_draws, one, other):
    same = 0
    for number in range(16 * GENERATIONS):
        a, b = (samples.tokens[number, : samples.lengths[number]] for samples in (one, other))
        if number // GENERATIONS in (5, 11):
            assert len(a) == len(b) == 0
            continue
        assert len(a) > 0
        key, prompt = jax.random.fold_in(KEY, number), prompt_of(small, number)
        if assert_same_draws(small.model, small.variables, CONFIG, prompt, key, a, b) is None:
            np.testing.assert_allclose(other.sampler_logps[number], one.sampler_logps[number], atol=1e-4)
            np.testing.assert_allclose(other.log_mass[number], one.log_mass[number], atol=1e-4)
            assert one.finish[number] == other.finish[number]
            same += 1
    assert same > 0.9 * 14 * GENERATIONS


@pytest.mark.parametrize(("slots", "refill"), [(2, 1), (5, None), (12, 4), (12, 12)])
def test_slots_change_no_draw(small, draw, assert_same_draws, slots, refill):
    whole, few = draw(), draw(slots=slots, refill=refill)
    assert len(set(whole.lengths.tolist())) > 5
    assert_same(small, assert_same_draws, whole, few)
    # One prefill per prompt, and every completion but for those without prompt in a slot; the first ones found it new.
    assert whole.counters["prompts_read"] == few.counters["prompts_read"] == 14
    assert whole.counters["drawn"] == few.counters["drawn"] == whole.lengths.sum()
    assert whole.counters["refills"] == 0
    assert few.counters["refills"] == 14 * GENERATIONS - slots


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["8", "2x2x2"])
def test_meshes_change_no_draw(small, draw, assert_same_draws, mesh):
    one, many = draw(slots=8), draw(mesh, slots=8)
    assert_same(small, assert_same_draws, one, many)
    assert many.counters["prompts_read"] == 14
    assert many.counters["drawn"] == one.counters["drawn"]
    assert many.counters["refills"] == one.counters["refills"] == 14 * GENERATIONS - 8


def test_a_refilled_loop_is_shorter_than_waves(draw):
    refilled, waves = draw(slots=6, refill=1), draw(slots=6, refill=6)
    assert waves.counters["drawn"] == refilled.counters["drawn"]
    assert refilled.counters["decode_steps"] < 0.8 * waves.counters["decode_steps"]
    # Nearly every slot is busy nearly all the time.
    assert refilled.counters["drawn"] > 0.8 * 6 * refilled.counters["decode_steps"]


def test_another_mesh_than_that_of_training_changes_no_draw(small, draw, assert_same_draws):
    """Parameters lie on fsdp=8; the devices of `context` have prompts of their own."""
    assert_same(small, assert_same_draws, draw(), draw(MeshConfig(context=4, tensor=2), MeshConfig(fsdp=8), slots=8))


def test_prompts_that_a_mesh_cannot_split_are_refused(small, pad):
    generate = make_generate(small.model, CONFIG, make_mesh(MeshConfig(data=8)))
    with pytest.raises(ValueError, match="10 prompts cannot be split over 8"):
        generate(small.decoding, *pad(small.prompts), KEY)


def test_no_end_before_the_least_length(draw):
    free, held = draw(), draw(min_new_tokens=7)
    real = np.repeat(~np.isin(np.arange(16), (5, 11)), GENERATIONS)
    assert (free.lengths[real] <= 7).sum() > 3
    ends = np.isin(held.tokens[:, :7], CONFIG.eos_ids) & (held.lengths[:, None] > 0)
    assert not ends.any()
    assert held.lengths[real].min() == 8
    # The token drawn in place of an EOS was drawn with a probability that adds up without it.
    assert np.isfinite(held.log_mass).all()


def test_a_penalty_and_forbidden_ends_by_hand():
    # Probabilities at temperature 1 before: exp of (2, 1, -1, 0) / sum. Token 0 and 2 were seen, penalty 2: logits
    # (1, 1, -2, 0). Token 3 is EOS and may not come yet: draws come from exp of (1, 1, -2) / sum.
    logits = np.array([[2.0, 1.0, -1.0, 0.0]], np.float32)
    config = Config(repetition_penalty=2.0, min_new_tokens=1, eos_ids=(3,))
    drawn = {}
    for seed in range(200):
        keys = jax.random.split(jax.random.key(seed), 1)
        token, logps, log_mass = choose(config, logits, keys, np.zeros(1, np.int32), np.array([[1, 0, 1, 0]], bool))
        drawn[int(token[0])] = float(logps[0]), float(logps[0] - log_mass[0])
    assert set(drawn) == {0, 1, 2}
    total = 2 * np.exp(1) + np.exp(-2)
    for token, logit in ((0, 1.0), (1, 1.0), (2, -2.0)):
        claimed, really = drawn[token]
        assert claimed == pytest.approx(float(scale(logits, 1.0)[0, token]), abs=1e-6)
        assert really == pytest.approx(logit - np.log(total), abs=1e-6)


def test_the_penalty_knows_prompt_and_completion(small, draw):
    # A penalty so strong that nothing comes twice: greedy draws are all new.
    samples = draw(temperature=0.0, repetition_penalty=1e9, slots=5, top_k=0, top_p=1.0, eos_ids=())
    for number, tokens in enumerate(samples.tokens):
        if number // GENERATIONS not in (5, 11):
            known = {*prompt_of(small, number).tolist()}
            assert len(known | set(tokens.tolist())) == len(known) + 20


def test_a_cache_of_another_dtype(draw):
    wide, narrow = draw(slots=5), draw(slots=5, cache_dtype="bfloat16")
    both = np.minimum(wide.lengths, narrow.lengths) > 0
    first = wide.tokens[both, 0] == narrow.tokens[both, 0]
    apart = np.abs(wide.sampler_logps[both, 0] - narrow.sampler_logps[both, 0])[first]
    assert 0 < apart.mean() < 0.05
