"""The options of supervised fine-tuning through a run: losses, noise, packing, masks."""

import json

import numpy as np
import pytest

from jaxalign.config import parse_config
from jaxalign.run import run
from jaxalign.run.prepare import check_data
from tests.run.conftest import TEXT
from tests.run.test_run import lines


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """60 plain texts of 1 to 120 words."""
    rng = np.random.default_rng(2)
    rows = [{"text": " ".join(rng.choice(TEXT.split(), n))} for n in rng.integers(1, 121, 60)]
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sft(settings):
    """A short run of supervised fine-tuning on the chosen answers."""
    settings["method"] = {"name": "sft"}
    settings["data"]["columns"] = {"completion": "chosen"}
    settings["train"]["max_steps"] = 4
    settings["log"]["logging_steps"] = 1
    return settings


def losses(settings, **method):
    folder = run(parse_config({**settings, "name": "-".join(method) or "plain", "method": {"name": "sft", **method}}))
    found = lines(folder.folder)
    return [line["loss"] for line in found if "loss" in line], [
        line["eval_loss"] for line in found if "eval_loss" in line
    ]


def test_losses_and_noise(sft):
    plain, judged = losses(sft)
    dft, _ = losses(sft, loss_type="dft")
    noisy, noisy_judged = losses(sft, neftune_noise_alpha=20.0)
    assert plain[-1] < plain[0]
    # p < 1, and -p log p <= 1/e.
    assert 0 < dft[0] < min(plain[0], np.exp(-1))
    # The embeddings' noise is there in training; evaluation has none, and differs by what was learnt alone.
    assert abs(noisy[0] - plain[0]) > 1e-3
    assert abs(noisy_judged[0] - judged[0]) < abs(plain[0] - plain[-1])


def test_wrapped_rows(settings, texts):
    """Plain texts as rows of exactly 64 tokens; batch_size counts rows."""
    settings["method"] = {"name": "sft"}
    settings["data"] |= {"path": str(texts), "max_length": 64, "eval_ratio": 0.1}
    settings["train"] = {"batch_size": 8, "packing_strategy": "wrapped", "num_train_epochs": 2, "save_steps": 100}
    settings["log"]["logging_steps"] = 1
    _, report = check_data(parse_config(settings).stages[0])
    # Texts of up to 120 words: longer than a row, and none is too long. Only the last batch is not full.
    assert report["row_length"] == 64 and report["efficiency"] > 0.9
    result = run(parse_config(settings))
    found = [line for line in lines(result.folder) if "loss" in line]
    per_epoch = len(found) // 2
    assert found[-1]["num_tokens"] == 2 * found[per_epoch - 1]["num_tokens"]
    assert found[-1]["epoch"] == 2 and found[-1]["loss"] < found[0]["loss"]
    settings |= {"name": "other", "method": {"name": "preference"}}
    with pytest.raises(ValueError, match="preference needs them whole"):
        run(parse_config(settings))
