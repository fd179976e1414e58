"""Scores of texts: the same alone and in company, read where transformers reads them, with few programs."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from jaxalign.rewards.model import check_same_tokenizer, make_scorer, pack_texts
from jaxalign.sharding import MeshConfig, make_mesh, param_shardings
from jaxalign.types import TokenRows
from tests.layouts import VOCAB, tiny_model

SCORER: dict[str, Any] = {"lm_head": False, "score_head": True, "pad_id": 0, "score_bias": -0.5}


def ragged(count, longest=120, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, 1 + int(longest * rng.random() ** 3)) for _ in range(count)]


def alone(model, variables, texts):
    """Each text in a padded row of its own."""
    lengths = np.asarray([len(text) for text in texts])
    padded = np.stack([np.pad(np.asarray(text), (0, 160 - len(text))) for text in texts])
    rows = TokenRows.from_padded(padded, np.arange(160)[None] < lengths[:, None])
    every = jax.jit(lambda v, rows: model.scores(v, model.apply(v, rows)[0]))(variables, rows)
    return np.asarray(every)[np.arange(len(texts)), lengths - 1]


@pytest.fixture(scope="module")
def scorer():
    return tiny_model(**SCORER)


@pytest.mark.parametrize("call_tokens", [16_384, 500, 1])
def test_company_changes_nothing(scorer, call_tokens):
    """One call or many, each with its last rows empty; lists and arrays."""
    texts, (model, variables) = ragged(37), scorer
    score = make_scorer(model, variables, call_tokens=call_tokens)
    found = score(texts)
    assert found.shape == (37,) and found.dtype == np.float32
    wanted = alone(model, variables, texts)
    assert np.ptp(wanted) > 1
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    order = np.random.default_rng(1).permutation(37)
    np.testing.assert_allclose(score([texts[i].tolist() for i in order]), found[order], rtol=1e-4, atol=1e-4)
    assert score([]).shape == (0,)


def test_meshes_agree(scorer):
    model, variables = scorer
    texts = ragged(20)
    wanted = make_scorer(model, variables)(texts)
    for axes in (MeshConfig(8, 1, 1), MeshConfig(2, 2, 2)):
        mesh = make_mesh(axes)
        placed = jax.device_put(variables, param_shardings(mesh, variables))
        np.testing.assert_allclose(make_scorer(model, placed, mesh=mesh)(texts), wanted, rtol=1e-4, atol=1e-4)


def test_a_score_is_read_where_transformers_reads_it(scorer):
    """At the last token that is not the padding token: trailing padding is skipped, padding inside is read over."""
    model, variables = scorer
    text, inner = [5, 6, 7], [5, 0, 6, 7]
    wanted = alone(model, variables, [text, inner, [0], [5, 6]])
    found = make_scorer(model, variables)([text, [*text, 0, 0], [*inner, 0], [0, 0, 0]])
    np.testing.assert_allclose(found, wanted[[0, 0, 1, 2]], rtol=1e-4, atol=1e-4)
    ends_with = model.rebuild(replace(model.config, pad_id=7))  # a model whose padding token is its EOS
    np.testing.assert_allclose(make_scorer(ends_with, variables)([text]), wanted[[3]], rtol=1e-4, atol=1e-4)
    nothing_pads = model.rebuild(replace(model.config, pad_id=None))
    np.testing.assert_allclose(
        make_scorer(nothing_pads, variables)([[*text, 0]]), alone(model, variables, [[*text, 0]]), rtol=1e-4, atol=1e-4
    )


def test_few_shapes():
    """60 rollouts of 64 texts whose lengths drift: rows, their length and their places are rounded to few sizes."""
    shapes = set()
    for seed in range(60):
        calls = pack_texts(ragged(64, longest=200 + seed, seed=seed), 4096)
        shapes |= {(call.rows.tokens.shape, call.sources.shape) for call in calls}
        documents = np.concatenate([call.rows.documents.ravel() for call in calls])
        assert (documents > 0).mean() > 0.6
        assert max(call.rows.tokens.size for call in calls) <= 4096
    assert len(shapes) <= 14


@pytest.mark.parametrize(("longest", "length"), [(1, 64), (64, 64), (65, 96), (97, 128), (129, 192), (400, 512)])
def test_row_lengths(longest, length):
    (call,) = pack_texts([np.ones(longest, np.int32)], 1)
    assert call.rows.tokens.shape == (1, 1, length)


def test_every_text_has_one_place():
    calls = pack_texts(ragged(50), 1024, shards=4)
    assert len(calls) > 1 and all(call.rows.tokens.shape[1] % 4 == 0 for call in calls)
    numbers = np.concatenate([call.texts[call.texts >= 0] for call in calls])
    assert sorted(numbers.tolist()) == list(range(50))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([[1, 2], []], "text 1 has no tokens"),
        ([[1], [2], [3] * 513], "text 2 has 513 tokens, more than the model's context of 512"),
    ],
)
def test_texts_that_cannot_be_scored(scorer, texts, message):
    with pytest.raises(ValueError, match=message):
        make_scorer(*scorer)(texts)


def test_a_language_model_gives_no_scores():
    with pytest.raises(ValueError, match="no score head"):
        make_scorer(*tiny_model())


def make_tokenizer(words, **special):
    backend = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_tokenizers_are_compared():
    words = ["<unk>", "<s>", "</s>", "a", "b"]
    policy = make_tokenizer(words, eos_token="</s>", bos_token="<s>")
    # How a model pads, or what its template is, changes no id.
    same = make_tokenizer(words, eos_token="</s>", bos_token="<s>", pad_token="<unk>")
    same.chat_template = "{{ messages }}"
    check_same_tokenizer(policy, same)
    swapped = make_tokenizer(["<unk>", "<s>", "</s>", "b", "a"], eos_token="</s>", bos_token="<s>")
    with pytest.raises(ValueError, match=r"2 of 5 tokens, for example 'a' is 3 in the policy's and 4 .* Take a reward"):
        check_same_tokenizer(policy, swapped)
    longer = make_tokenizer([*words, "c"], eos_token="</s>", bos_token="<s>")
    with pytest.raises(ValueError, match="1 of 5 tokens, for example 'c' is absent in the policy's and 5"):
        check_same_tokenizer(policy, longer)
    with pytest.raises(ValueError, match="eos_token is '</s>' in the policy's and 'b' in the other"):
        check_same_tokenizer(policy, make_tokenizer(words, eos_token="b", bos_token="<s>"))
