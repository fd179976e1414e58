"""Many prompts through few compiled shapes."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxalign.sampling import Config, bucket_width, make_generate, sample_prompts

CONFIG = Config(max_new_tokens=6, eos_ids=(3, 40, 77), top_k=30)
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    sizes = [4, 31, 1, 17, 16, 33, 8, 2, 25, 3, 12]
    return [rng.integers(1, 97, size).tolist() for size in sizes]


@pytest.fixture(scope="module")
def traced(small):
    """The jitted sampler, and the shapes it was traced for."""
    shapes, generate = [], make_generate(small.model, CONFIG)

    def noting(variables, prompts, *args):
        shapes.append(prompts.shape)
        return generate(variables, prompts, *args)

    return jax.jit(noting), shapes


def test_results_do_not_depend_on_the_slots(small, prompts, traced, assert_same_draws):
    generate, shapes = traced
    whole = sample_prompts(generate, small.decoding, prompts, KEY)
    few = jax.jit(make_generate(small.model, replace(CONFIG, slots=3, refill=2)))
    parts = sample_prompts(few, small.decoding, prompts, KEY)
    # 11 prompts are 12 rows, and 33 tokens 48 columns.
    assert shapes == [(12, 48)]
    for number, prompt in enumerate(prompts):
        one, other = (s.tokens[number, : s.lengths[number]] for s in (whole, parts))
        key = jax.random.fold_in(KEY, number)
        if assert_same_draws(small.model, small.variables, CONFIG, np.array(prompt), key, one, other) is None:
            np.testing.assert_allclose(parts.sampler_logps[number], whole.sampler_logps[number], atol=1e-4)
            assert parts.finish[number] == whole.finish[number]
    assert whole.tokens.shape == (11, 6)
    assert isinstance(whole.tokens, np.ndarray)
    assert (whole.counters["refills"], parts.counters["refills"]) == (0, 11 - 3)


def test_a_second_call_compiles_nothing(small, prompts, traced):
    generate, shapes = traced
    sample_prompts(generate, small.decoding, prompts, KEY)
    before = len(shapes)
    shuffled = [prompts[i][:-1] or prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))]
    sample_prompts(generate, small.decoding, shuffled[:-1], jax.random.key(6))
    # One token shorter, the longest fits 32.
    assert shapes[before:] == [(10, 32)]


@pytest.mark.parametrize(("prompts", "message"), [([], "no prompts"), ([[1, 2], [], [3]], "prompt 1 is empty")])
def test_prompts_that_cannot_be_sampled(small, prompts, message):
    with pytest.raises(ValueError, match=message):
        sample_prompts(make_generate(small.model, CONFIG), small.decoding, prompts, KEY)


@pytest.mark.parametrize(
    ("n", "width"), [(1, 16), (16, 16), (17, 32), (65, 80), (128, 128), (129, 160), (193, 224), (257, 320)]
)
def test_bucket_width(n, width):
    assert bucket_width(n) == width


def test_bucket_width_of_one_row():
    assert [bucket_width(n, 1) for n in (1, 2, 3, 4, 5, 9, 13, 17)] == [1, 2, 3, 4, 5, 10, 14, 20]
