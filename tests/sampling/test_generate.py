"""The loop against plain references: a forward pass per token, and Python that ends completions."""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import ModelConfig, Rope, build
from jaxalign.sampling import Config, make_decoding, make_generate
from jaxalign.sampling.choose import choose
from jaxalign.sampling.generate import EOS, LENGTH, STOP
from jaxalign.types import TokenRows

KEY = jax.random.key(11)
NEW = 12
NO_STEP, NOTHING = np.zeros(6, np.int32), np.zeros((6, 0), bool)


@pytest.fixture(scope="module")
def run(small):
    """`(padded, lengths, **options) -> Samples`; one compiled program for each config and shape."""

    @cache
    def compiled(config):
        return jax.jit(make_generate(small.model, config))

    def run(padded, lengths, **options):
        generate = compiled(Config(**{"max_new_tokens": NEW, **options}))
        return jax.device_get(generate(small.decoding, padded, lengths, KEY))

    return run


@pytest.fixture(scope="module")
def padded(small, pad):
    return pad(small.prompts)


@pytest.fixture(scope="module")
def free(run, padded):
    """Completions that nothing ends before `NEW` tokens."""
    return run(*padded)


def end(tokens, eos_ids=(), stops=()):
    """Where and why a completion ends: (length, finish)."""
    for count in range(1, len(tokens) + 1):
        if tokens[count - 1] in eos_ids:
            return count, EOS
        if any(count >= len(stop) and tuple(tokens[count - len(stop) : count]) == stop for stop in stops):
            return count, STOP
    return len(tokens), LENGTH


def test_greedy_is_the_argmax_of_forward_passes_without_cache(small, run, padded):
    samples, model = run(*padded, temperature=0.0), small.model
    forward = jax.jit(lambda v, rows: jax.nn.log_softmax(model.logits(v, model.apply(v, rows)[0])))
    for prompt, tokens, logps in zip(small.prompts, samples.tokens, samples.sampler_logps, strict=True):
        row = np.concatenate([prompt, tokens, np.zeros(40 - NEW - len(prompt), np.int32)])[None]
        for step in range(NEW):
            # Later tokens are masked out: nothing can come from a cache or from the future.
            size = len(prompt) + step
            log_probs = np.asarray(forward(small.variables, TokenRows.from_padded(row, np.arange(40)[None] < size)))
            assert tokens[step] == log_probs[0, size - 1].argmax()
            assert logps[step] == pytest.approx(float(log_probs[0, size - 1].max()), abs=1e-4)
    np.testing.assert_array_equal(samples.log_mass, samples.sampler_logps)


def test_tokens_are_the_gumbel_max_of_their_keys(small, run, padded, redraw):
    options = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}
    config, samples, certain = Config(max_new_tokens=NEW, **options), run(*padded, **options), 0
    for number, prompt in enumerate(small.prompts):
        key = jax.random.fold_in(KEY, number)
        best, margins, boundaries = redraw(small.model, small.variables, config, prompt, samples.tokens[number], key)
        clear = (margins > 1e-3) & (boundaries > 1e-4)
        np.testing.assert_array_equal(samples.tokens[number][clear], best[clear])
        certain += clear.sum()
    assert certain > 0.8 * samples.tokens.size
    assert (samples.log_mass < 0).all()
    assert (samples.sampler_logps < samples.log_mass + 1e-6).all()


def test_each_ends_at_its_own_step_and_for_its_own_reason(small, run, padded, free):
    drawn = [tuple(map(int, row)) for row in free.tokens]
    eos_ids = (drawn[0][0], drawn[3][4])
    # A stop of one, two and three tokens; at the very start and the very end; one that is also EOS; one that no
    # completion can hold; and for every prompt its last token and the first drawn, or the first twice: neither was
    # drawn, so they end nothing.
    stops = (drawn[4][5:6], drawn[2][0:2], drawn[6][3:6], drawn[7][-2:], (drawn[3][4],), drawn[1] + drawn[1])
    stops += tuple((int(prompt[-1]), tokens[0]) for prompt, tokens in zip(small.prompts, drawn, strict=True))
    stops += tuple((tokens[0], tokens[0]) for tokens in drawn)
    samples = run(*padded, eos_ids=eos_ids, stop_sequences=stops)
    for row, tokens in enumerate(drawn):
        length, finish = end(tokens, eos_ids, stops)
        assert (samples.lengths[row], samples.finish[row]) == (length, finish)
        np.testing.assert_array_equal(samples.tokens[row, :length], tokens[:length])
        np.testing.assert_allclose(samples.sampler_logps[row, :length], free.sampler_logps[row, :length], atol=1e-5)
        for field in (samples.tokens, samples.sampler_logps, samples.log_mass):
            assert not field[row, length:].any()
    assert (samples.lengths[0], samples.finish[0]) == (1, EOS)
    assert (samples.lengths[2], samples.finish[2]) == (2, STOP)
    assert len(set(samples.lengths.tolist())) > 4
    assert set(samples.finish.tolist()) == {LENGTH, EOS, STOP}


def test_the_loop_ends_when_all_are_done(small, padded, free):
    passes = []

    apart, unroll = small.model.unrolled()

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: passes.append(1))
        return apart.apply(*args, **kwargs)

    model = replace(small.model, unrolled=lambda: (replace(apart, apply=counted), unroll))

    # Every first token ends its completion but for one row's, which goes on to its second.
    eos_ids = tuple({int(token) for token in free.tokens[1:, 0]} | {int(free.tokens[0, 1])})
    assert free.tokens[0, 0] not in eos_ids
    generate = jax.jit(make_generate(model, Config(max_new_tokens=NEW, eos_ids=eos_ids)))
    samples = jax.device_get(generate(small.decoding, *padded, KEY))
    jax.effects_barrier()
    assert samples.lengths.tolist() == [2] + [1] * 9
    assert (samples.finish == EOS).all()
    # The prompts, and once for every token of the longest completion.
    assert len(passes) == 1 + 2


@pytest.mark.parametrize("options", [{"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}])
def test_one_token_left_is_greedy(options):
    logits, keys = np.random.default_rng(0).normal(size=(6, 97)).astype(np.float32), jax.random.split(KEY, 6)
    token, logps, log_mass = choose(Config(temperature=0.7, **options), logits, keys, NO_STEP, NOTHING)
    np.testing.assert_array_equal(token, logits.argmax(-1))
    np.testing.assert_allclose(log_mass, logps, atol=1e-6)


def test_log_mass_is_zero_without_truncation(free):
    assert (free.log_mass == 0).all()
    assert (free.sampler_logps < 0).all()


def test_one_row_one_token(small, run, pad):
    samples = run(*pad(small.prompts[:1], 1), max_new_tokens=1)
    assert samples.tokens.shape == (1, 1)
    assert (samples.lengths[0], samples.finish[0]) == (1, LENGTH)


def test_a_row_without_prompt_draws_nothing(run, padded, free):
    prompts, lengths = padded
    samples = run(prompts, np.where(np.arange(len(lengths)) % 2, 0, lengths).astype(np.int32))
    assert not samples.lengths[1::2].any()
    assert not samples.tokens[1::2].any()
    np.testing.assert_array_equal(samples.tokens[::2], free.tokens[::2])


@pytest.mark.slow
def test_a_table_of_positions_ends_completions(pad):
    config = ModelConfig(
        family="gpt2",
        vocab_size=50,
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=64,
        max_position=20,
        norm="layer",
        gated_mlp=False,
        learned_positions=True,
        windows=(None, None),
        tie_embeddings=True,
    )
    model = build(config)
    prompts, lengths = pad([np.arange(1, 1 + n) for n in (3, 16, 20, 21)])
    generate = jax.jit(make_generate(model, Config(max_new_tokens=8)))
    samples = jax.device_get(generate(make_decoding(model)(model.init(jax.random.key(0))), prompts, lengths, KEY))
    # Tokens 16 to 20 of the second are read from the last places; the one drawn at the end is never read.
    assert samples.lengths.tolist() == [8, 5, 1, 0]
    assert not samples.finish.any()
    assert np.isfinite(samples.sampler_logps).all()


def test_no_array_holds_logits_of_a_whole_prompt(small, padded):
    generate = jax.jit(make_generate(small.model, Config(max_new_tokens=NEW)))
    text, slots = generate.lower(small.decoding, *padded, KEY).as_text(), len(padded[0])
    shapes = {tuple(map(int, shape.split("x"))) for shape in re.findall(r"tensor<(\d+(?:x\d+)*)x[a-z]", text)}
    vocab = small.model.config.vocab_size
    assert (slots, vocab) in shapes
    assert max(np.prod(shape) for shape in shapes if vocab in shape and slots in shape) == slots * vocab


def test_decoding_needs_less_memory_than_half_its_cache():
    config = ModelConfig(
        family="llama",
        vocab_size=256,
        embed_dim=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        mlp_dim=128,
        max_position=2048,
        rope=Rope(),
        windows=(None,) * 4,
        tie_embeddings=True,
    )
    # 128 completions of 32 prompts in 64 slots: the loop refills, and keeps a pool of 4 prompts.
    model, slots, width, prompts = build(config), 64, 64, 32
    sampling = Config(top_p=0.9, max_new_tokens=2048 - 64, num_generations=4, slots=slots)
    variables = jax.eval_shape(lambda key: make_decoding(model)(model.init(key)), jax.random.key(0))
    shapes = jax.ShapeDtypeStruct((prompts, width), jnp.int32), jax.ShapeDtypeStruct((prompts,), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    memory = jax.jit(make_generate(model, sampling)).lower(variables, *shapes, key).compile().memory_analysis()
    # The cache itself is part of the program's temporary memory here.
    size = 2 * 4 * slots * 2048 * 4 * 16 * 4
    assert memory is not None
    assert size < memory.temp_size_in_bytes < 1.5 * size


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("max_new_tokens", 0),
        ("min_new_tokens", 257),
        ("repetition_penalty", 0.0),
        ("num_generations", 0),
        ("slots", 0),
        ("refill", 0),
        ("stop_sequences", ((),)),
    ],
)
def test_config_out_of_range_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        replace(Config(), **{field: value})


def test_keys_whose_bits_depend_on_the_batch_are_refused(small, padded):
    generate = make_generate(small.model, Config(max_new_tokens=2))
    with pytest.raises(ValueError, match="threefry2x32"):
        generate(small.decoding, *padded, jax.random.key(0, impl="rbg"))
