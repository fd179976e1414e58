# pyright: reportMissingImports=false
"""The real Weights & Biases package, offline: what it keeps to be sent, and what it says to nobody's login."""

from pathlib import Path

import pytest

from jaxalign.training.metrics import check_login, open_writers

wandb = pytest.importorskip("wandb")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

BLOCK = 32 * 1024


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """A user who never logged in."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


def kept(folder: Path) -> list:
    """The records of an offline run: LevelDB's log format behind 7 bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, records, parts = path.read_bytes(), 7, [], b""
    while place < len(data):
        if BLOCK - place % BLOCK < 7:  # too short for a header
            place += BLOCK - place % BLOCK
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("project", [None, "mine"])
def test_what_a_run_keeps_to_be_sent(tmp_path, monkeypatch, failed, project):
    monkeypatch.setenv("WANDB_MODE", "offline")
    if project:
        monkeypatch.setenv("WANDB_PROJECT", project)
    check_login(["wandb"])
    config = {"optimizer": {"learning_rate": 0.5}}
    for writer in open_writers(tmp_path, ["wandb"], name="trial/sft", config=config):
        writer.write(1, {"loss": 2.5, "eval_loss": 3.0})
        writer.close(failed=failed)
    wandb.teardown()  # waits for its process to write
    records = kept(tmp_path)
    (run,) = [each.run for each in records if each.HasField("run")]
    assert (run.project, run.display_name) == (project or "jaxalign", "trial/sft")
    assert run.run_id == (tmp_path / "wandb_id").read_text()
    assert {item.key: item.value_json for item in run.config.update}["optimizer"] == '{"learning_rate":0.5}'
    (history,) = [each.history for each in records if each.HasField("history")]
    values = {"/".join(item.nested_key) or item.key: item.value_json for item in history.item}
    assert float(values["train/loss"]) == 2.5 and float(values["eval/loss"]) == 3.0
    assert [each.exit.exit_code for each in records if each.HasField("exit")] == [int(failed)]


def test_without_a_login_it_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"log\.report_to names wandb.*`wandb login`.*WANDB_MODE=offline"):
        check_login(["wandb"])
    with pytest.raises(ValueError, match=r"log\.report_to names wandb.*`wandb login`.*WANDB_MODE=offline"):
        open_writers(tmp_path, ["wandb"])
