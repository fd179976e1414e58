import gzip
import json

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from jaxalign.data import Bad, DataConfig, read
from jaxalign.data.reading import json_rows

PAIRS = [{"prompt": f"p{i}", "chosen": f" c{i}", "rejected": f" r{i}", "score": i} for i in range(7)]


def rows_of(path, kind="preference", **options):
    rows = read(DataConfig(path, **options), kind)
    return rows, [rows[i] for i in range(len(rows))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json"])
def test_json_lines_and_their_numbers(write, name):
    path = write(name, PAIRS[0], "", PAIRS[1], "  ", "", *PAIRS[2:])
    rows, found = rows_of(path)
    assert found == PAIRS
    assert [rows.where(i) for i in range(7)] == [(path, line) for line in (1, 3, 6, 7, 8, 9, 10)]


def test_rows_are_exactly_what_the_file_says(write):
    """Arrow would give every row of a column one type: fields of others as None, and no two types."""
    lines = [
        {"prompt": "42", "id": 1, "tools": [{"a": 1}]},
        {"prompt": "true", "id": "x", "tools": [{"b": {"c": None}}]},
        {"prompt": [{"role": "user", "content": "é\u2028ü"}], "meta": {}},
    ]
    assert rows_of(write("a.jsonl", *lines), "prompt")[1] == lines


@pytest.mark.parametrize("style", ["pretty", "compact", "bom"])
def test_json_lists(tmp_path, style):
    path = tmp_path / "a.json"
    text = json.dumps(PAIRS, indent=2) if style == "pretty" else json.dumps(PAIRS)
    path.write_text(text, encoding="utf-8-sig" if style == "bom" else "utf-8")
    rows, found = rows_of(str(path))
    assert found == PAIRS
    assert [rows.where(i)[1] for i in range(7)] == ([2 + 6 * i for i in range(7)] if style == "pretty" else [1] * 7)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[{"prompt": "a"},\n{"prompt": }]', 2, "Expecting value"),
        ('[{"prompt": "a"}\n\n{"prompt": "b"}]', 3, "Expecting ','"),
        ('[{"prompt": "a"},\n', 2, "Expecting value"),
        ('[{"prompt": "a"}]\n\n]', 3, "Extra data"),
    ],
)
def test_a_broken_list_names_its_line(tmp_path, text, line, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json:{line}: wrong JSON: {message}"):
        rows_of(str(path), "prompt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "b"', "Expecting ',' delimiter at column 15"),
        ("[1, 2]", "a list, not an object"),
        ('"text"', "a str, not an object"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        ('{"prompt": ' + "9" * 5000 + "}", "Exceeds the limit"),
    ],
)
def test_a_broken_line_is_a_bad_row(write, line, message):
    rows = read(DataConfig(write("a.jsonl", {"prompt": "a"}, line, {"prompt": "c"})), "prompt")
    assert len(rows) == 3 and rows[2] == {"prompt": "c"} and rows.where(1)[1] == 2
    with pytest.raises(Bad, match=message):
        rows[1]


def test_several_files_keep_their_own_lines(write):
    one, two = write("b1.jsonl", *PAIRS[:3]), write("b2.jsonl.gz", "", *PAIRS[3:5])
    three = write("c.jsonl", *PAIRS[5:])
    rows, found = rows_of((f"{one[:-8]}b*", three))
    assert found == PAIRS
    expected = [(one, 1), (one, 2), (one, 3), (two, 2), (two, 3), (three, 1), (three, 2)]
    assert [rows.where(i) for i in range(7)] == expected
    assert set(rows.hashes) == {one, two, three}


def test_parquet_and_arrow(tmp_path):
    table = datasets.Dataset.from_list(
        [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": None}]}]
        * 3
    )
    paths = [str(tmp_path / f"{i}.parquet") for i in range(2)]
    for path in paths:
        table.to_parquet(path)
    rows, found = rows_of(tuple(paths), "sft")
    assert found[4] == {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    assert [rows.where(i) for i in (0, 2, 3)] == [(paths[0], 1), (paths[0], 3), (paths[1], 1)]

    folder = str(tmp_path / "saved")
    table.save_to_disk(folder)
    rows, found = rows_of(folder, "sft")
    assert len(found) == 3 and rows.where(2) == (folder, 3)
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert len(rows_of(str(arrow), "sft")[1]) == 3


def test_arrow_fills_of_other_rows_are_dropped(tmp_path):
    calls = [{"name": "f", "arguments": {"city": "x"}}, {"name": "g", "arguments": {"depth": 3}}]
    messages = [[{"role": "assistant", "tool_calls": [call]}] for call in calls]
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"messages": messages}).to_parquet(path)
    assert [row["messages"] for row in rows_of(path, "sft")[1]] == messages


def test_splits_of_a_folder(tmp_path):
    parts = {"train": PAIRS[:5], "test": PAIRS[5:]}
    folder = str(tmp_path / "saved")
    datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(folder)
    assert rows_of(folder)[1] == PAIRS[:5]
    assert rows_of(folder, split="test")[1] == PAIRS[5:]
    rows, found = rows_of(folder, split="train[-2:]")
    assert found == PAIRS[3:5] and rows.where(1)[1] == 5
    evaluation = read(DataConfig(folder, eval_split="test"), "preference", evaluation=True)
    assert [evaluation[i] for i in range(len(evaluation))] == PAIRS[5:]
    with pytest.raises(ValueError, match=r'saved: Unknown split "dev".*train.*test'):
        rows_of(folder, split="dev")


def test_slices_of_a_file(write):
    path = write("a.jsonl", "", *PAIRS)
    rows, found = rows_of(path, split="train[2:4]+train[-1:]")
    assert found == [PAIRS[2], PAIRS[3], PAIRS[6]] and [rows.where(i)[1] for i in range(3)] == [4, 5, 8]
    with pytest.raises(ValueError, match='Unknown split "test"'):
        rows_of(path, split="test")
    with pytest.raises(ValueError, match="takes no rows"):
        rows_of(path, split="train[:0]")


def test_evaluation_has_its_own_path(write):
    config = DataConfig(write("a.jsonl", *PAIRS[:5]), split="train[:2]", eval_path=write("b.jsonl", *PAIRS[5:]))
    assert len(read(config, "preference")) == 2
    assert [row["prompt"] for row in read(config, "preference", evaluation=True)] == ["p5", "p6"]


def test_columns_are_renamed(write):
    path = write("a.jsonl", {"question": "a", "answer": " b"}, {"question": "c"})
    _, found = rows_of(path, "sft", columns={"prompt": "question", "completion": "answer"})
    assert found[0]["prompt"] == "a" and found[0]["completion"] == " b" and "completion" not in found[1]
    assert rows_of(write("b.jsonl", {"body": "a"}), "sft", dataset_text_field="body")[1][0]["text"] == "a"


@pytest.mark.parametrize("kind", ["sft", "preference", "prompt"])
def test_wrong_columns_name_the_file_and_what_is_needed(write, tmp_path, kind):
    good = {"sft": {"text": "a"}, "preference": PAIRS[0], "prompt": {"prompt": "a"}}[kind]
    paths = write("good.jsonl", good), write("wrong.jsonl", {"question": 1}, {"answer": 2})
    with pytest.raises(ValueError, match=r"wrong\.jsonl: columns question, answer do not serve; needed: `"):
        rows_of(paths, kind)
    parquet = str(tmp_path / "wrong.parquet")
    datasets.Dataset.from_list([{"question": 1}]).to_parquet(parquet)
    with pytest.raises(ValueError, match=r"wrong\.parquet: columns question do not serve"):
        rows_of(parquet, kind)


def test_files_that_are_not_there_or_unknown(write, tmp_path):
    for path in ("no/such/file.jsonl", "./nothing", "/nowhere/at/all", f"{tmp_path}/*.jsonl"):
        with pytest.raises(FileNotFoundError, match=r"no such file|no file matches"):
            rows_of(path)
    for path in (write("a.txt", "x"), write("a.parquet.gz", "x")):
        with pytest.raises(ValueError, match="unknown type of file"):
            rows_of(path)
    with pytest.raises(ValueError, match="not a folder written by save_to_disk"):
        rows_of(str(tmp_path))
    for path in (write("empty.jsonl"), write("blank.jsonl", "", " "), write("list.json", "[ ]")):
        with pytest.raises(ValueError, match="no rows"):
            rows_of(path)


def test_files_with_different_columns(tmp_path):
    paths = [str(tmp_path / f"{i}.parquet") for i in range(2)]
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(paths[0])
    datasets.Dataset.from_list([{"text": 3}]).to_parquet(paths[1])
    with pytest.raises(ValueError, match=r"differ.*0\.parquet, .*1\.parquet"):
        rows_of(tuple(paths), "sft")


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in PAIRS * 50))[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged file"):
        rows_of(str(path))
    path.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged file"):
        list(json_rows(str(path)))


def test_changed_files_are_read_anew(write):
    assert len(rows_of(write("a.jsonl", *PAIRS))[0]) == 7
    assert len(rows_of(write("a.jsonl", *PAIRS[:2]))[0]) == 2


def test_the_hub(monkeypatch):
    def load_dataset(path, name, split):
        if path != "owner/pairs":
            raise DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        assert (name, split) == ("small", "train[:2]")
        return datasets.Dataset.from_list(PAIRS[:2])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, found = rows_of("owner/pairs", name="small", split="train[:2]")
    assert found == PAIRS[:2] and rows.where(1) == ("owner/pairs (train[:2])", 2)
    with pytest.raises(
        ValueError, match=r"'owner/none' is no file or folder here, and the Hub did not give it: .*exist"
    ):
        rows_of("owner/none")


def test_reading_prints_nothing(write, tmp_path, capfd):
    rows_of(write("a.jsonl", *PAIRS))
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(PAIRS).to_parquet(str(tmp_path / "a.parquet"))
    datasets.enable_progress_bars()
    rows_of(str(tmp_path / "a.parquet"))
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
