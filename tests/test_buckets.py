"""Files in buckets, with fsspec's memory and local file systems in their place."""

import importlib
import json
import os
from pathlib import Path

import fsspec
import pytest

from jaxalign import data, models
from jaxalign.buckets import check_writable, delete, download, expand, fetch, is_url, listing, upload
from tests.run.conftest import pairs, tiny  # noqa: F401


@pytest.fixture(autouse=True)
def own_scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_SCRATCH", str(tmp_path / "scratch"))


@pytest.fixture
def memory():
    """The memory file system, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def test_a_file_is_fetched_once_until_it_changes(memory):
    memory.pipe_file("/b/data/x.jsonl", b"one\n")
    first = fetch("memory://b/data/x.jsonl")
    assert first.name == "x.jsonl" and first.read_bytes() == b"one\n"
    first.write_bytes(b"mark")
    assert fetch("memory://b/data/x.jsonl").read_bytes() == b"mark"  # not copied again
    memory.pipe_file("/b/data/x.jsonl", b"other\n")
    assert fetch("memory://b/data/x.jsonl").read_bytes() == b"other\n"


def test_of_a_folder_come_the_files_asked_for(memory):
    for name in ("m/config.json", "m/model.safetensors", "m/onnx/config.json", "m/config.json.old"):
        memory.pipe_file(f"/b/{name}", name.encode())
    assert sorted(path.name for path in fetch("memory://b/m", ["*.json"]).iterdir()) == ["config.json"]
    assert len(list(fetch("memory://b/m/").iterdir())) == 3


def test_what_is_not_there(memory):
    with pytest.raises(FileNotFoundError, match=r"memory://b/no: there is no such file or bucket"):
        fetch("memory://b/no")
    assert listing("memory://b/no") == {}
    with pytest.raises(ValueError, match="unknown kind of URL"):
        fetch("ftps://b/no")


def test_up_down_and_away(memory, tmp_path):
    for name in ("a.txt", "c/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    upload(tmp_path, "memory://b/run", ["a.txt", "c/b.txt"])
    assert set(listing("memory://b/run")) == {"a.txt", "c/b.txt"}
    download("memory://b/run", ["c/b.txt"], tmp_path / "back")
    assert (tmp_path / "back/c/b.txt").read_text() == "c/b.txt"
    delete("memory://b/run", ["a.txt", "never-there"])
    assert set(listing("memory://b/run")) == {"c/b.txt"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OSError, match="closed/runs cannot be written: check that the bucket exists"):
        check_writable(f"file://{tmp_path}/closed/runs")


def test_a_bucket_without_permission(memory, monkeypatch):
    class Forbidden(Exception):
        """As the clients of clouds have them: no OSError."""

    def refuse(*args, **kwargs):
        raise Forbidden("403: runner@project does not have storage.objects.create access")

    monkeypatch.setattr(type(memory), "pipe_file", refuse)
    with pytest.raises(OSError, match=r"memory://b/runs cannot be written: .*Forbidden: 403: runner@project"):
        check_writable("memory://b/runs")


def test_a_scheme_whose_package_is_missing(monkeypatch):
    registry = importlib.import_module("fsspec.registry")  # fsspec.registry is what is in it
    known = {"s3": {"class": "no_such_package.S3", "err": "Install s3fs to access S3"}}
    monkeypatch.setattr(registry, "known_implementations", known)
    monkeypatch.setattr(registry, "_registry", {})
    with pytest.raises(OSError, match=r"s3:// needs a package: pip install -e '\.\[s3\]'"):
        check_writable("s3://b/runs")


def test_wildcards(memory):
    for name in ("x1.jsonl", "x2.jsonl", "y.jsonl"):
        memory.pipe_file(f"/b/{name}", b"{}")
    assert expand("memory://b/x*.jsonl") == ["memory:///b/x1.jsonl", "memory:///b/x2.jsonl"]
    assert is_url("gs://b") and not is_url("/b") and not is_url("owner/name")


def test_data_keeps_the_names_that_it_has_in_the_bucket(memory, tmp_path, tiny, pairs):  # noqa: F811
    rows = pairs.read_text().splitlines()
    memory.pipe_file("/b/one.jsonl", "\n".join(rows[:20]).encode())
    memory.pipe_file("/b/two.jsonl", "\n".join([*rows[20:], json.dumps({"prompt": "p", "chosen": "c"})]).encode())
    config = data.DataConfig(path="memory://b/*.jsonl", max_length=128)
    found = data.inspect(config, models.load_tokenizer(tiny), "preference").train
    assert len(found) == len(rows) + 1
    assert found.where(len(rows)) == ("memory:///b/two.jsonl", len(rows) - 19)
    assert found.rows is not None and set(found.rows.hashes) == {"memory:///b/one.jsonl", "memory:///b/two.jsonl"}
    with pytest.raises(ValueError, match=r"memory:///b/two.jsonl"):
        data.load(config, models.load_tokenizer(tiny), "preference")


def test_a_model_out_of_a_bucket(memory, tiny: Path):  # noqa: F811
    memory.put(str(tiny), "/b/models/tiny", recursive=True)
    model, variables = models.load("memory://b/models/tiny")
    ours, theirs = models.load(tiny)
    assert model.config == ours.config
    assert (variables["params"]["embed"]["embedding"] == theirs["params"]["embed"]["embedding"]).all()
    assert models.fingerprint("memory://b/models/tiny") == models.fingerprint(tiny)
    assert models.load_tokenizer("memory://b/models/tiny").chat_template
