# pyright: reportMissingImports=false
"""Process reward models against transformers' token classifiers and TRL 1.12's PRM trainer (the last one with it)."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jaxalign import models
from jaxalign.data import DataConfig, encode
from jaxalign.methods import process_reward
from jaxalign.types import TokenRows
from tests.layouts import relative
from tests.models import tiny

torch = pytest.importorskip("torch")

from tokenizers import Tokenizer, processors  # noqa: E402
from tokenizers import models as tokenizer_models  # noqa: E402
from tokenizers.pre_tokenizers import Split  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
)

from tests.parity.live import older_trl  # noqa: E402
from tests.parity.test_reward import draw_parameters, padded, ragged  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-4
ROWS = [
    {"prompt": "what is ab", "completions": ["first a", "then b b b", "so ab"], "labels": [True, True, False]},
    {"prompt": "a", "completions": ["no"], "labels": [False]},
    {"prompt": "how long is this one then", "completions": ["a", "b c d e f g", "h", "i j"], "labels": [True] * 4},
]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """`name -> (folder, transformers' model)` of a token classifier with two labels."""

    @functools.cache
    def make(name: str):
        hf = dict(tiny.CONFIGS[name]) | {"eos_token_id": 2, "pad_token_id": 0, "num_labels": 2}
        config = AutoConfig.for_model(str(hf.pop("model_type")), **hf)
        model = draw_parameters(AutoModelForTokenClassification.from_config(config, attn_implementation="eager"))
        folder = tmp_path_factory.mktemp("classifier") / "model"
        model.save_pretrained(folder)
        return folder, model

    return make


def torch_logits(model, texts):
    ids, mask = padded(texts)
    with torch.no_grad():
        found = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    return found, ids, mask


@pytest.mark.parametrize("name", ["llama3.1", "mistral", "qwen2-windows", "qwen3"])
def test_log_odds_of_both_directions(classifiers, name, tmp_path):
    folder, theirs = classifiers(name)
    wanted, ids, mask = torch_logits(theirs, ragged())
    model, variables = models.load(folder)
    hidden, _, _ = model.apply(variables, TokenRows.from_padded(ids, mask))
    odds = np.asarray(model.scores(variables, hidden))[mask > 0]
    assert odds.std() > 0.5
    assert np.abs(odds - (wanted[..., 1] - wanted[..., 0])[mask > 0]).max() <= TOLERANCE
    models.save(tmp_path / "out", model, variables, None)
    again, report = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert again.config.num_labels == 2
    np.testing.assert_array_equal(torch_logits(again.eval(), ragged())[0][mask > 0], wanted[mask > 0])


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters, with a BOS in front of every text."""
    characters = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz \n?"]
    inner = Tokenizer(tokenizer_models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    inner.pre_tokenizer = Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize("last_only", [False, True])
def test_tokens_loss_and_gradient(classifiers, last_only):
    """TRL's rows and collator, transformers' loss, and the gradient of every parameter."""
    theirs = older_trl("experimental.prm.prm_trainer").PRMTrainer
    words = tokenizer()
    options = {"step_separator": "\n", "max_length": 1024, "max_completion_length": None}
    rows = [
        theirs.tokenize_row(row, words, train_on_last_step_only=last_only, is_eval=False, **options) for row in ROWS
    ]
    ours = [encode(words, row, "stepwise", DataConfig("")) for row in ROWS]
    config = process_reward.Config(train_on_last_step_only=last_only)
    for row, example in zip(rows, ours, strict=True):
        assert row["input_ids"] == [*example["prompt_ids"], *example["completion_ids"]]
        document = process_reward.to_document(config, example)
        assert document.targets is not None
        at = np.flatnonzero(np.array(row["labels"]) != -100)
        np.testing.assert_array_equal(np.flatnonzero(document.targets) - 1, at)
        np.testing.assert_array_equal(document.fields["labels"][0], np.array(row["labels"])[at])
    folder, model = classifiers("llama3.1")
    model.zero_grad()
    wanted = model.eval()(**DataCollatorForTokenClassification(words)(rows)).loss
    wanted.backward()
    mine, variables = models.load(folder)
    batch = process_reward.make_batch(config, ours, micro_batch_size=2)
    loss = process_reward.make_loss(config, mine)

    def total(params):
        counts = process_reward.totals(batch)
        parts = [jax.tree.map(lambda x, m=m: x[m], batch) for m in range(len(batch.present))]
        return sum(loss(params, {}, part, counts, None)[0] for part in parts)

    value, grads = jax.jit(jax.value_and_grad(total))(variables)
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    for name, parameter in (("kernel", model.score.weight), ("bias", model.score.bias)):
        assert relative(grads["params"]["score"][name].T, parameter.grad.numpy()) <= 1e-5, name
    embedding = dict(model.named_parameters())["model.embed_tokens.weight"].grad.numpy()
    assert relative(grads["params"]["embed"]["embedding"], embedding) <= 1e-5
