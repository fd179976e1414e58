"""Process reward models: where a step is read, what it costs, and that no layout changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import models
from jaxalign.data import DataConfig, encode
from jaxalign.data.formats import Bad
from jaxalign.methods import process_reward
from jaxalign.methods.common import for_evaluation
from jaxalign.models.heads import score_config
from jaxalign.rewards.model import make_scorer
from jaxalign.types import TokenRows
from tests.layouts import ragged_steps, relative, tiny_model

CONFIG = process_reward.Config()


@pytest.fixture(scope="module")
def scorer():
    model, variables = tiny_model(
        lm_head=False, score_head=True, score_labels=2, num_layers=2, windows=(None, 9), output_bias=True
    )
    assert variables["params"]["score"]["kernel"].shape == (32, 2)
    assert float(jnp.abs(variables["params"]["score"]["bias"]).min()) > 0
    return model, variables


def by_hand(model, variables, examples):
    """Mean cross-entropy and accuracy over all steps, each example alone: the two logits written out."""
    head, losses, hits = variables["params"]["score"], [], []
    for example in examples:
        ids = np.concatenate([example["prompt_ids"], example["completion_ids"]])[None]
        hidden, _, _ = model.apply(variables, TokenRows.from_padded(ids, np.ones_like(ids)))
        logits = np.asarray(hidden[0], np.float64) @ np.asarray(head["kernel"], np.float64) + np.asarray(head["bias"])
        at = len(example["prompt_ids"]) + example["ends"]
        log_probs = logits[at] - np.log(np.exp(logits[at]).sum(-1, keepdims=True))
        losses += (-log_probs[np.arange(len(at)), example["labels"]]).tolist()
        hits += (logits[at].argmax(-1) == example["labels"]).tolist()
    return np.mean(losses), np.mean(hits)


def step(model, variables, batch, config=CONFIG):
    optimizer = optax.sgd(1.0)
    state, frozen = process_reward.init(config, model, variables, optimizer, jax.random.key(0))
    after, metrics = jax.jit(process_reward.make_step(config, model, optimizer))(state, frozen, batch)
    return jax.tree.map(jnp.subtract, after.params, state.params), {k: m.value() for k, m in metrics.items()}


def test_the_loss_is_the_cross_entropy_at_the_separators_however_split(scorer):
    (model, variables), examples = scorer, ragged_steps(9)
    wanted, hits = by_hand(model, variables, examples)
    whole, metrics = step(model, variables, process_reward.make_batch(CONFIG, examples, length=128))
    assert metrics["loss"] == pytest.approx(wanted, rel=1e-5) and metrics["accuracy"] == pytest.approx(hits)
    labels = np.concatenate([example["labels"] for example in examples])
    both = labels.mean() * metrics["accuracy/right"] + (1 - labels.mean()) * metrics["accuracy/wrong"]
    assert both == pytest.approx(hits, rel=1e-5) and 0 < hits < 1
    parts, others = step(model, variables, process_reward.make_batch(CONFIG, examples, micro_batch_size=2, length=192))
    assert relative(parts, whole) <= 1e-5
    assert others["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    # The two rows of the head move apart by the same amount: only their difference counts.
    head = whole["params"]["score"]
    np.testing.assert_allclose(head["kernel"][:, 0], -head["kernel"][:, 1], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(head["bias"][0], -head["bias"][1], rtol=1e-4)


def test_scores_of_steps(scorer):
    model, variables = scorer
    # Probabilities that float32 tells from 0 and 1.
    head = jax.tree.map(lambda x: 0.1 * x, variables["params"]["score"])
    variables = {"params": {**variables["params"], "score": head}}
    examples = ragged_steps(7, seed=2)
    found = process_reward.score_steps(model, variables, examples, micro_batch_size=3)
    assert [len(each) for each in found] == [len(example["ends"]) for example in examples]
    # The cross-entropy of a label is the negative log of its probability.
    wanted, _ = by_hand(model, variables, examples)
    losses = [-np.log(np.where(e["labels"], p, 1 - p)) for e, p in zip(examples, found, strict=True)]
    assert np.concatenate(losses).mean() == pytest.approx(wanted, rel=1e-4)
    reduced = {name: reduce(np.array([0.5, 0.25, 0.5])) for name, reduce in process_reward.STEP_REDUCTIONS.items()}
    assert reduced == {"min": 0.25, "product": 0.0625, "last": 0.5}
    with pytest.raises(ValueError, match="judges steps and no whole text"):
        make_scorer(model, variables)


def test_the_last_step_alone(scorer):
    (model, variables), examples = scorer, ragged_steps(5, seed=1)
    config = process_reward.Config(train_on_last_step_only=True)
    lasts = [{**each, "ends": each["ends"][-1:], "labels": each["labels"][-1:]} for each in examples]
    wanted, _ = by_hand(model, variables, lasts)
    _, metrics = step(model, variables, process_reward.make_batch(config, examples, length=128), config)
    assert metrics["loss"] == pytest.approx(wanted, rel=1e-5)
    assert for_evaluation(process_reward, config) == CONFIG
    # An example that lost its last step to truncation has nothing to learn from, and the others go on.
    cut = [{**examples[0], "steps": np.array([len(examples[0]["ends"]) + 1])}, *examples[1:]]
    wanted, _ = by_hand(model, variables, lasts[1:])
    _, metrics = step(model, variables, process_reward.make_batch(config, cut, length=128), config)
    assert metrics["loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_folder_of_a_token_classifier_comes_back(scorer, tmp_path):
    model, variables = scorer
    folder = models.save(tmp_path / "prm", model, variables, None)
    again, loaded = models.load(folder)
    assert again.config.score_labels == 2 and not again.config.lm_head
    assert relative(loaded, variables) == 0
    assert "A process reward model" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="no token classifier of the family 'gpt2'"):
        score_config(models.ModelConfig("gpt2", 8, 8, 1, 1, 1, 8, 8, 8, windows=(None,)), labels=2)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", *"abcdefgh", "\n", "?", "<bos>"]
    inner = Tokenizer(kinds.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>")


def test_encoding_of_steps(tokenizer):
    row = {"prompt": "ab", "completions": ["c", "def", "g"], "labels": [True, False, True]}
    found = encode(tokenizer, row, "stepwise", DataConfig("", step_separator="\n?"))
    # a b | c \n ? d e f \n ? g \n ?: the separators' last tokens are 2, 7 and 10 of the completion.
    assert found["prompt_ids"].tolist() == [1, 2]
    assert found["completion_ids"].tolist() == [3, 9, 10, 4, 5, 6, 9, 10, 7, 9, 10]
    assert found["ends"].tolist() == [2, 7, 10] and found["labels"].tolist() == [1, 0, 1]
    short = DataConfig("", step_separator="\n?", max_length=11, truncation_mode="keep_start")
    cut = encode(tokenizer, row, "stepwise", short)
    assert len(cut["completion_ids"]) == 9 and cut["ends"].tolist() == [2, 7] and cut["steps"].tolist() == [3]
    with pytest.raises(Bad, match="leaves no step whole"):
        encode(
            tokenizer, row, "stepwise", DataConfig("", max_length=4, step_separator="\n?", truncation_mode="keep_start")
        )
    with pytest.raises(ValueError, match="step_separator='' has no tokens"):
        encode(tokenizer, row, "stepwise", DataConfig("", step_separator=""))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [True]}, "wrong number: 1 `labels` for 2 steps"),
        ({"labels": [True, 1]}, r"`labels\[1\]` is a number .*; true or false expected"),
        ({"labels": [True, None]}, r"`labels\[1\]` is .*; true or false"),
        ({"labels": True}, "`labels` is .*; a list"),
        ({"completions": [], "labels": []}, "no steps"),
        ({"completions": ["c", " "]}, r"empty step: `completions\[1\]`"),
        ({"completions": ["c", 4]}, r"`completions\[1\]` is a number .*; text expected"),
        ({"prompt": [{"role": "user", "content": "a"}]}, "stepwise data are text"),
        ({"prompt": ""}, "empty prompt"),
    ],
)
def test_bad_steps_are_named(tokenizer, change, message):
    row = {"prompt": "ab", "completions": ["c", "d"], "labels": [True, False]} | change
    with pytest.raises(Bad, match=message):
        encode(tokenizer, row, "stepwise", DataConfig(""))
