"""A run's folder: begun and interrupted, and corrected as long as nothing was saved in it."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from jaxalign import models
from jaxalign.config import parse_config
from jaxalign.run import run
from jaxalign.run.bucket import checkpoints_place
from jaxalign.run.folder import find_folder, write_config
from tests.run.test_bad_input import NORM, changed_model


class OutOfMemory(Exception):
    """What a device raises that has not enough of it."""


def start(settings, **options):
    said: list[str] = []
    return run(parse_config(settings), say=said.append, **options), "\n".join(said)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fails_at(stage: str, step: int):
    """A progress bar that fails after a step of a stage, as a device might."""

    class Bar:
        def __init__(self, title):
            self.title = title

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

        def __call__(self, number, metrics):
            if self.title == stage and number == step:
                raise OutOfMemory

    return lambda steps, done, title: Bar(title)


@pytest.mark.parametrize("left", ["config.yaml.77.partial", ".lock", None])
def test_a_kill_while_the_folder_is_made_is_no_obstacle(settings, left):
    config = parse_config(settings)
    folder = Path(settings["runs_dir"]) / "run"
    folder.mkdir(parents=True)
    if left:
        (folder / left).write_text("name: r")
    at = partial(checkpoints_place, "", folder)
    assert find_folder(config, at) == (folder, False, [])
    write_config(config, folder)
    assert find_folder(config, at) == (folder, True, [])


def test_a_missing_tensor_is_mended_and_the_same_command_goes_on(settings, tiny, tmp_path):
    settings["train"] |= {"max_steps": 2, "eval_steps": 2}
    broken = changed_model(tiny, tmp_path, tensors=lambda found: {k: v for k, v in found.items() if k != NORM})
    settings["model"]["path"] = broken
    with pytest.raises(ValueError, match=rf"{NORM}.*missing"):
        start(settings)
    shutil.copyfile(tiny / "model.safetensors", Path(broken) / "model.safetensors")
    result, said = start(settings)
    assert "run: nothing was saved yet: it begins anew, with other inputs:\n  policy.sha256: " in said
    assert result.stages[0].reason == "completed"
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["stages"]["run"]["policy"]["sha256"] == models.fingerprint(broken)


def test_a_run_that_failed_before_it_saved_may_be_corrected(settings):
    settings["train"] |= {"max_steps": 4, "save_steps": 3, "eval_steps": 4}
    settings["log"] |= {"logging_steps": 1, "sample_steps": 1}
    with pytest.raises(OutOfMemory):
        start(settings, make_progress=fails_at("preference", 2))
    folder = Path(settings["runs_dir"]) / "run"
    assert lines(folder) and (folder / "samples.jsonl").is_file()
    # A correction that is itself bad changes nothing.
    kept = (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match="exceeds the model's context"):
        start({**settings, "data": {**settings["data"], "max_length": 1024}})
    assert (folder / "config.yaml").read_text() == kept
    del settings["log"]["sample_steps"]
    settings["train"] |= {"micro_batch_size": 3, "seed": 5}
    said: list[str] = []
    with pytest.raises(OutOfMemory):  # after the checkpoint of step 3
        run(parse_config(settings), say=said.append, make_progress=fails_at("preference", 4))
    assert "nothing was saved here: the run begins anew, with other settings:" in said
    assert "  train.micro_batch_size: 6 there, 3 here" in said
    assert [each["step"] for each in lines(folder)] == [1, 2, 3]
    assert not (folder / "samples.jsonl").exists()
    # Now there is something to lose.
    with pytest.raises(ValueError, match=r"(?s)holds another run.*micro_batch_size: 3 there, 4 here"):
        start({**settings, "train": {**settings["train"], "micro_batch_size": 4}})
    result, later = start(settings)
    assert "continuing after step 3" in later and "anew" not in later
    steps = [each["step"] for each in lines(folder) if "loss" in each]
    assert steps == [1, 2, 3, 4] and result.stages[0].reason == "completed"
    assert json.loads((folder / "manifest.json").read_text())["seeds"]["run"]["train"] == 5


@pytest.fixture
def staged(settings, pairs, tmp_path) -> dict:
    """SFT, then DPO of what it gave, on data of their own; DPO has failed before its first checkpoint."""
    for name in ("one", "two"):
        shutil.copyfile(pairs, tmp_path / f"{name}.jsonl")
    sft = {"path": str(tmp_path / "one.jsonl"), "columns": {"completion": "chosen"}}
    settings["stages"] = [
        {"name": "sft", "method": {"name": "sft"}, "data": sft},
        {
            "name": "dpo",
            "method": {"name": "preference"},
            "model": {"path": "sft.policy"},
            "data": {"path": str(tmp_path / "two.jsonl")},
        },
    ]
    del settings["method"]
    settings["train"] |= {"max_steps": 2, "save_steps": 2, "eval_steps": 2}
    with pytest.raises(OutOfMemory):
        start(settings, make_progress=fails_at("dpo", 1))
    return settings


def test_a_later_stage_is_corrected_and_an_earlier_one_kept(staged, tmp_path):
    exported = Path(staged["runs_dir"]) / "run" / "sft" / "export" / "model.safetensors"
    before = exported.stat().st_mtime_ns
    sft, dpo = staged["stages"]
    with pytest.raises(ValueError, match=r"(?s)holds another run.*stages\.sft\.optimizer\.learning_rate"):
        start({**staged, "stages": [{**sft, "optimizer": {"learning_rate": 1e-4}}, dpo]})
    corrected = {**staged, "stages": [sft, {**dpo, "method": {"name": "preference", "beta": 0.3}}]}
    files = [tmp_path / f"{name}.jsonl" for name in ("one", "two")]
    texts = [path.read_text() for path in files]
    for path in files:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:40]))
    # The first stage's data have changed too: what it gave is not built on. The refusal leaves all as it was.
    for settings in (staged, corrected) * 2:
        with pytest.raises(ValueError, match=r"(?s)stage sft was begun with other inputs.*one\.jsonl"):
            start(settings)
    files[0].write_text(texts[0])
    result, said = start(corrected)
    assert "stages after sft have saved nothing: they begin anew, with other settings:" in said
    assert "stages.dpo.method.beta: 0.1 there, 0.3 here" in said
    assert [stage.reason for stage in result.stages] == ["done before", "completed"]
    assert exported.stat().st_mtime_ns == before
    stages = json.loads((result.folder / "manifest.json").read_text())["stages"]
    assert stages.keys() == {"sft", "dpo"}
    assert stages["dpo"]["data"][str(files[1])] != stages["sft"]["data"][str(files[0])]
