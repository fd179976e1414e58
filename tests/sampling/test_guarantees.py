"""Sampler and trainer agree on log-probs, and layout never changes a draw."""

from functools import cache, partial

import jax
import numpy as np
import pytest

from jaxalign.losses.masking import by_step
from jaxalign.losses.tokens import token_logps
from jaxalign.models import LoraConfig, add_lora
from jaxalign.models.pretrained import load, load_tokenizer
from jaxalign.models.quantized import quantize_params
from jaxalign.packing import Document, pack
from jaxalign.sampling import Config, make_decoding, make_generate
from jaxalign.types import Samples

KEY = jax.random.key(23)
NEW = 24
# Enough of 97 ids that completions end at many lengths.
EOS_IDS = (3, 40, 77)
GENERATIONS = 3


@cache
def sampler(model, config):
    return jax.jit(make_generate(model, config))


def draw(model, variables, config, padded) -> Samples:
    return jax.device_get(sampler(model, config)(make_decoding(model)(variables), *padded, KEY))


@pytest.fixture(scope="module")
def drawn(small, pad):
    """`temperature -> Samples`: three completions of each prompt."""
    repeated = [prompt for prompt in small.prompts for _ in range(GENERATIONS)]

    @cache
    def drawn(temperature):
        config = Config(temperature=temperature, top_p=0.9, top_k=20, max_new_tokens=NEW, eos_ids=EOS_IDS)
        return draw(small.model, small.variables, config, pad(repeated))

    return drawn


def completions(samples: Samples) -> list[np.ndarray]:
    return [tokens[:length] for tokens, length in zip(samples.tokens, samples.lengths, strict=True)]


def plain(prompts, drawn):
    """One document per completion, prompt and completion alike in its trunk."""
    return [
        Document(np.concatenate([prompt, tokens]), targets=np.arange(len(prompt) + len(tokens)) >= len(prompt))
        for prompt, tokens in zip(prompts, drawn, strict=True)
    ]


def shared(prompts, drawn):
    """One document per prompt, its completions as branches."""
    size = len(drawn) // len(prompts)
    return [Document(prompt, tuple(drawn[i * size : (i + 1) * size])) for i, prompt in enumerate(prompts)]


def differences(model, variables, documents, per_document, samples, temperature):
    """|trainer's log-prob - sampler's| of every drawn token."""
    batch = pack(documents, completions=per_document, length=256)
    documents_per_row = np.asarray(batch.rows.documents).max(-1)
    rows, predictions = jax.tree.map(lambda x: x[0], (batch.rows, batch.predictions))

    @jax.jit
    def recompute(variables):
        hidden, _, _ = model.apply(variables, rows)
        logps = token_logps(partial(model.logits, variables), hidden, predictions, temperature=temperature, chunk=32)
        return by_step(logps, predictions.completions, predictions.steps, *samples.tokens.shape)

    mask = np.arange(samples.tokens.shape[1])[None] < samples.lengths[:, None]
    assert int((predictions.completions >= 0).sum()) == int(mask.sum())
    return np.abs(np.asarray(recompute(variables)) - samples.sampler_logps)[mask], documents_per_row


@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_sampler_and_trainer_agree(small, drawn, temperature, layout):
    samples = drawn(temperature)
    assert len(set(samples.lengths.tolist())) > 5
    if layout == "plain":
        documents = plain([prompt for prompt in small.prompts for _ in range(GENERATIONS)], completions(samples))
    else:
        documents = shared(small.prompts, completions(samples))
    per_document = 1 if layout == "plain" else GENERATIONS
    apart, per_row = differences(small.model, small.variables, documents, per_document, samples, temperature)
    assert per_row.max() > 2
    assert apart.max() <= 1e-4 / temperature
    assert apart.mean() <= 1e-5 / temperature


def test_sampler_and_trainer_agree_in_bfloat16(small, pad):
    config = Config(temperature=0.7, top_p=0.9, top_k=20, max_new_tokens=NEW, eos_ids=EOS_IDS)
    samples = draw(small.narrow, small.variables, config, pad(small.prompts))
    documents = plain(small.prompts, completions(samples))
    apart, _ = differences(small.narrow, small.variables, documents, 1, samples, 0.7)
    assert 0 < apart.mean() <= 0.05 / 0.7


@pytest.mark.parametrize(
    "kind", [None, pytest.param("nf4", marks=pytest.mark.slow)], ids=["merged", "applied over 4 bits"]
)
def test_sampler_and_trainer_agree_under_an_adapter(small, pad, kind):
    """The sampler merges an adapter, or applies it where weights are quantised; the trainer always applies it."""
    variables = small.variables if kind is None else {"params": quantize_params(small.variables["params"], kind)}
    model, variables = add_lora(small.model, variables, LoraConfig(r=4, dropout=0.0), jax.random.key(5))
    rng = np.random.default_rng(5)
    lora = jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(np.float32), variables["lora"])
    config = Config(temperature=0.7, top_p=0.9, top_k=20, max_new_tokens=NEW, eos_ids=EOS_IDS)
    samples = draw(model, {**variables, "lora": lora}, config, pad(small.prompts))
    documents = plain(small.prompts, completions(samples))
    apart, _ = differences(model, {**variables, "lora": lora}, documents, 1, samples, 0.7)
    assert apart.max() <= 1e-4 / 0.7
    assert apart.mean() <= 1e-5 / 0.7
    off, _ = differences(model, {"params": variables["params"]}, documents, 1, samples, 0.7)
    assert off.mean() > 0.1


@pytest.fixture(scope="module")
def smollm2_loaded(smollm2):
    return *load(smollm2), load_tokenizer(smollm2)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_sampler_and_trainer_agree_on_smollm2(smollm2_loaded, pad, temperature):
    """Ragged prompts, several completions of each that end at different lengths, and fewer slots than completions."""
    model, variables, tokenizer = smollm2_loaded
    texts = [
        "The",
        "Water boils at",
        "Once upon a time",
        "def add(a, b):\n    return",
        "The capital of France is the city of",
    ]
    texts += ["1, 2, 3, 4,", "Dear Sir or Madam, I am writing to you because", "In the beginning"]
    prompts = [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts]
    # Frequent tokens end a completion, too, so that slots become free one by one.
    frequent = [tokenizer(text)["input_ids"][0] for text in (".", ",", " and", " the", "\n")]
    config = Config(
        temperature=temperature,
        top_p=0.9,
        top_k=20,
        max_new_tokens=16,
        eos_ids=(*model.config.eos_ids, *frequent),
        num_generations=GENERATIONS,
        slots=8,
    )
    samples = draw(model, variables, config, pad(prompts, 16))
    assert samples.counters["refills"] == (GENERATIONS - 1) * len(prompts)
    assert len(set(samples.lengths.tolist())) > 5
    repeated = [prompt for prompt in prompts for _ in range(GENERATIONS)]
    for documents, per_document in (
        (plain(repeated, completions(samples)), 1),
        (shared(prompts, completions(samples)), GENERATIONS),
    ):
        apart, per_row = differences(model, variables, documents, per_document, samples, temperature)
        assert per_row.max() > 2
        assert apart.max() <= 1e-4 / temperature
        assert apart.mean() <= 1e-5 / temperature


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"temperature": 1.3, "top_p": 0.9, "top_k": 20}],
    ids=["all", "truncated"],
)
def test_batch_mates_and_padding_change_no_draw(small, pad, assert_same_draws, options):
    config = Config(max_new_tokens=NEW, eos_ids=EOS_IDS, **options)

    def run(members, width):
        padded = pad([small.prompts[member] for member in members], width)
        samples = sampler(small.model, config)(small.decoding, *padded, KEY, np.array(members))
        return dict(zip(members, completions(jax.device_get(samples)), strict=True))

    everyone = list(range(len(small.prompts)))
    whole, again = run(everyone, 32), run(everyone, 32)
    for member in everyone:
        np.testing.assert_array_equal(whole[member], again[member])
    for members, width in ((everyone[::-1], 64), ([4], 2)):
        for member, tokens in run(members, width).items():
            key, prompt = jax.random.fold_in(KEY, member), small.prompts[member]
            assert_same_draws(small.model, small.variables, config, prompt, key, whole[member], tokens)


def test_completions_of_one_prompt_differ(drawn):
    tokens = drawn(1.3).tokens.tolist()
    assert len({tuple(row) for row in tokens}) == len(tokens)


def test_the_comparison_itself_fails_where_draws_differ_clearly(small, drawn, assert_same_draws, redraw):
    config, prompt, number = Config(top_p=0.9, top_k=20, max_new_tokens=NEW), small.prompts[3], 3 * GENERATIONS
    tokens, key = completions(drawn(1.0))[number], jax.random.fold_in(KEY, number)
    _, margins, boundaries = redraw(small.model, small.variables, config, prompt, tokens, key)
    other = tokens.copy()
    other[np.minimum(margins, 10 * boundaries).argmax()] += 1
    with pytest.raises(AssertionError):
        assert_same_draws(small.model, small.variables, config, prompt, key, tokens, other)
