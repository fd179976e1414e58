"""What a user gets wrong: a message that names file, line or key and says what to do, and nothing saved is lost."""

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from jaxalign.config import parse_config
from jaxalign.run import check_data, pick_stage, run
from jaxalign.training.checkpoint import saved_any
from tests.run.conftest import finish, wait_until


def start(settings, **options):
    return run(parse_config(settings), **options)


def with_line(pairs: Path, tmp_path: Path, number: int, row: dict | str) -> str:
    lines = pairs.read_text().splitlines()
    lines[number - 1] = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


GOOD = {"prompt": "the cat", "chosen": " sat", "rejected": " flew"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "chosen": 7}, r"bad\.jsonl:17: .*chosen"),
        ({**GOOD, "chosen": ""}, r"bad\.jsonl:17: .*empty"),
        ({"prompt": "the cat", "chosen": " sat"}, r"bad\.jsonl:17: .*rejected"),
        ({**GOOD, "prompt": "the cat " * 300}, r"bad\.jsonl:17: .*(too long|longer|tokens)"),
        ({**GOOD, "rejected": " sat"}, r"bad\.jsonl:17: .*identical"),
        ('{"prompt": "the', r"bad\.jsonl:17: .*JSON"),
    ],
    ids=["wrong type", "empty completion", "missing column in a row", "too long", "identical pair", "broken JSON"],
)
def test_bad_rows(settings, pairs, tmp_path, row, message):
    settings["data"]["path"] = with_line(pairs, tmp_path, 17, row)
    with pytest.raises(ValueError, match=message):
        start(settings)
    settings["data"]["on_bad"] = "drop"
    found, packing = check_data(pick_stage(parse_config(settings), None))
    problems = sum(part.rows - part.used for part in (found.report.train, found.report.eval) if part is not None)
    assert problems == 1
    assert 0.3 < packing["efficiency"] <= 1


def test_missing_column(settings, tmp_path):
    path = tmp_path / "columns.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n' * 3)
    settings["data"]["path"] = str(path)
    with pytest.raises(
        ValueError, match=r"columns\.jsonl: columns question, answer do not serve; needed: `chosen` and `rejected`"
    ):
        start(settings)


def changed_model(tiny: Path, tmp_path: Path, config=None, tensors=None, tokenizer=None) -> str:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    if config:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**found, **config}))
    if tensors:
        found = load_file(folder / "model.safetensors")
        save_file(tensors(found), folder / "model.safetensors")
    if tokenizer:
        tokenizer(folder)
    return str(folder)


def without_template(folder: Path) -> None:
    for name in ("chat_template.jinja",):
        (folder / name).unlink(missing_ok=True)
    found = json.loads((folder / "tokenizer_config.json").read_text())
    found.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(found))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"model_type": "mamba"}}, r"config\.json.*'mamba'.*known.*llama"),
        ({"tensors": lambda found: {k: v for k, v in found.items() if k != NORM}}, rf"{NORM}.*missing"),
        ({"tensors": lambda found: {**found, NORM: np.ones(7, np.float32)}}, rf"{NORM}.*\[7\].*\[48\]"),
        ({"tokenizer": without_template}, r"chat template.*chat_template_path"),
    ],
    ids=["unknown family", "missing tensor", "wrong shape", "no chat template"],
)
def test_bad_models(settings, tiny, tmp_path, changes, message):
    settings["model"]["path"] = changed_model(tiny, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        start(settings)


def test_no_such_model(settings):
    settings["model"]["path"] = "models/absent"
    with pytest.raises(FileNotFoundError, match="models/absent"):
        start(settings)


def test_a_tokenizer_without_pad_token_serves(settings, tiny):
    assert "pad_token" not in json.loads((tiny / "tokenizer_config.json").read_text())
    settings["train"] |= {"max_steps": 1}
    assert start(settings).stages[0].reason == "completed"


def test_a_mesh_that_does_not_fit(settings):
    settings["mesh"] = {"data": 3, "fsdp": 2}
    with pytest.raises(ValueError, match=r"mesh: data=3 fsdp=2 tensor=1 needs 6 devices, but there are 8"):
        start(settings)


def test_a_context_that_is_too_short(settings):
    settings["data"]["max_length"] = 1024
    with pytest.raises(ValueError, match=r"data\.max_length=1024 exceeds the model's context of 256"):
        start(settings)


def test_a_folder_that_holds_another_run(settings):
    settings["train"] |= {"max_steps": 1}
    first = start(settings)
    kept = (first.folder / "metrics.jsonl").read_bytes()
    # What is saved and shown is not what it is.
    settings["log"] = {"logging_steps": 3}
    settings["train"] |= {"save_steps": 7, "save_total_limit": 9}
    assert start(settings).folder == first.folder
    settings["method"]["beta"] = 0.7
    with pytest.raises(ValueError, match=r"(?s)holds another run.*--fresh.*method\.beta: 0\.1 there, 0\.7 here"):
        start(settings)
    assert (first.folder / "metrics.jsonl").read_bytes() == kept
    assert start(settings, fresh=True).folder.name == "run-2"


def test_a_folder_that_holds_something_else(settings):
    folder = Path(settings["runs_dir"]) / "run"
    folder.mkdir(parents=True)
    (folder / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds no run"):
        start(settings)
    assert (folder / "letter.txt").read_text() == "dear"


def test_two_processes_cannot_run_the_same_run(settings, write_config, cli):
    config = write_config(settings)
    folder = Path(settings["runs_dir"]) / "run"
    folder.mkdir(parents=True)
    from jaxalign.config import config_text, load_config
    from jaxalign.run.folder import locked

    (folder / "config.yaml").write_text(config_text(load_config(config).resolved))
    with locked(folder):
        assert "another process is running this run" in finish(cli("run", config), 1)


@pytest.fixture
def read_only(tmp_path) -> Path:
    """A folder in which nobody may make another; permissions hold back all but root, the kernel's own /sys everyone."""
    if os.geteuid() == 0:
        return Path("/sys")
    tmp_path.chmod(0o555)
    return tmp_path


def test_a_read_only_folder(settings, read_only, tmp_path_factory, cli):
    settings["runs_dir"] = str(read_only / "runs")
    config = tmp_path_factory.mktemp("config") / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    last = finish(cli("run", config), 1).splitlines()[-1]
    assert last.startswith(f"error: {read_only / 'runs' / 'run'}: cannot write the run's folder: ")
    assert last.endswith("choose another runs_dir")
    assert not (read_only / "runs").exists()


@pytest.mark.slow
def test_a_full_disk(settings, write_config, cli):
    """No file may grow beyond some size once a checkpoint is there: the run stops with a message, and goes on later."""
    settings["train"] |= {"max_steps": 40, "save_steps": 2, "eval_steps": 1000}
    settings["log"]["logging_steps"] = 20
    config, folder = write_config(settings), Path(settings["runs_dir"]) / "run"
    process = cli("run", config)
    assert wait_until(lambda: saved_any(folder / "checkpoints"), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
    output = finish(process, 1)
    # TensorStore's threads complain too, past Python's logging, before it or after.
    (said,) = (line for line in output.splitlines() if line.startswith("error:"))
    assert f"in {folder / 'checkpoints'}" in said and "File too large" in said
    assert "never retrieved" not in output
    assert "saved before are untouched" in said
    steps = [int(path.parent.name) for path in folder.glob("checkpoints/*/SHA256SUMS")]
    assert steps
    output = finish(cli("run", config))
    assert f"continuing after step {max(steps)}" in output
    assert (folder / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("optimizer", {"name": "adam"}, r"optimizer\.name: 'adam' is unknown"),
        ("optimizer", {"lr_scheduler_type": "cosin"}, r"optimizer\.lr_scheduler_type: 'cosin'"),
        (
            "train",
            {"metric_for_best_model": "eval_los"},
            r"metric_for_best_model: there is no 'eval_los'; there are .*eval_loss",
        ),
        ("data", {"eval_ratio": None}, r"train\.eval_steps needs evaluation data"),
        ("model", {"compute_dtype": "float16"}, r"float16 cannot be trained"),
    ],
)
def test_a_late_mistake_shows_at_once_and_leaves_no_folder(settings, section, change, message):
    settings[section] |= change
    with pytest.raises(ValueError, match=message):
        start(settings)
    assert not Path(settings["runs_dir"]).exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("metric_for_best_model", "eval_loss"), ("greater_is_better", False), ("early_stopping_threshold", 0.1)],
)
def test_a_setting_of_evaluation_without_evaluation_data(settings, name, value):
    settings["data"]["eval_ratio"] = None
    settings["train"] |= {"eval_steps": None, name: value}
    with pytest.raises(ValueError, match=rf"train\.{name} needs evaluation data"):
        start(settings)


def test_a_reference_that_is_another_model(settings, tiny, tmp_path):
    settings["model"]["reference"] = changed_model(
        tiny, tmp_path, config={"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_theta": 5.0}
    )
    with pytest.raises(ValueError, match=r"(?s)is not the same model.*rope"):
        start(settings)


def test_data_that_changed_between_start_and_resume(settings, write_config, pairs, tmp_path, cli):
    own = tmp_path / "own.jsonl"
    shutil.copyfile(pairs, own)
    settings["data"]["path"] = str(own)
    result = start(settings)
    shutil.rmtree(result.stages[0].folder / "export")  # as if stopped before the export
    own.write_text(own.read_text() + own.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"(?s)was begun with other inputs.*own\.jsonl"):
        start(settings)


def test_a_fresh_run_goes_on_under_its_own_name(settings):
    settings["train"] |= {"max_steps": 1}
    start(settings)
    assert start(settings, fresh=True).folder.name == "run-2"
    assert start({**settings, "name": "run-2"}).stages[0].reason == "done before"
