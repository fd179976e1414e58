"""Rows as other projects write them: look-alikes of the real sets, whole and broken."""

import dataclasses
import gzip
import json
import lzma
import sys

import pytest

from jaxalign.data import Bad, DataConfig, encode, inspect, load, read
from jaxalign.data.adapters import FORMATS, adapt, detect
from jaxalign.data.files import csv_rows
from jaxalign.data.reading import MISSING, look_up


def said(role, content):
    return {"role": role, "content": content}


def turn(speaker, value):
    return {"from": speaker, "value": value}


DIALOGUE = "\n\nHuman: Is the sea deep?\n\nAssistant: Yes.\n\nHuman: How deep?\n\nAssistant:"
ASKED = [said("user", "Is the sea deep?"), said("assistant", "Yes."), said("user", "How deep?")]
HH = {"chosen": f"{DIALOGUE} Eleven kilometres.\n\nThat is all.", "rejected": f"{DIALOGUE} I do not know "}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Paris"}}}
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
ALPACA = {"instruction": "Translate.", "input": "mer", "output": "sea", "system": "Be short."}
HISTORY = {**ALPACA, "input": "", "history": [["Hi", "Hello"]]}
SHARED = [turn("system", "Be short."), turn("human", "Rain in Paris?"), turn("gpt", "No.")]
TOOL_TURNS = [
    turn("human", "Rain in Paris?"),
    turn("function_call", json.dumps({"name": "rain", "arguments": {"city": "Paris"}})),
    turn("observation", '{"mm": 0}'),
    turn("gpt", "No."),
]

GOOD = [
    ("alpaca", "sft", ALPACA,
     {"prompt": [said("system", "Be short."), said("user", "Translate.\nmer")],
      "completion": [said("assistant", "sea")]}),
    ("alpaca", "sft", HISTORY,
     {"prompt": [said("system", "Be short."), said("user", "Hi"), said("assistant", "Hello"),
                 said("user", "Translate.")],
      "completion": [said("assistant", "sea")]}),
    ("alpaca", "preference", {"instruction": "Q", "chosen": "yes", "rejected": "no"},
     {"prompt": [said("user", "Q")], "chosen": [said("assistant", "yes")], "rejected": [said("assistant", "no")]}),
    ("alpaca", "unpaired", {"instruction": "Q", "output": "a", "kto_tag": False},
     {"prompt": [said("user", "Q")], "completion": [said("assistant", "a")], "label": False}),
    ("alpaca", "prompt", {"instruction": "Q", "answer": 4}, {"prompt": [said("user", "Q")]}),
    ("sharegpt", "sft", {"conversations": SHARED},
     {"messages": [said("system", "Be short."), said("user", "Rain in Paris?"), said("assistant", "No.")]}),
    ("sharegpt", "sft", {"conversations": TOOL_TURNS, "system": "Be short.", "tools": json.dumps(TOOLS)},
     {"messages": [said("system", "Be short."), said("user", "Rain in Paris?"),
                   {"role": "assistant", "content": "", "tool_calls": [CALL]}, said("tool", '{"mm": 0}'),
                   said("assistant", "No.")], "tools": json.dumps(TOOLS)}),
    ("sharegpt", "preference",
     {"conversations": SHARED[:2], "chosen": turn("gpt", "No."), "rejected": turn("gpt", "Yes.")},
     {"prompt": [said("system", "Be short."), said("user", "Rain in Paris?")],
      "chosen": [said("assistant", "No.")], "rejected": [said("assistant", "Yes.")]}),
    ("sharegpt", "unpaired", {"conversations": SHARED, "kto_tag": "true"},
     {"prompt": [said("system", "Be short."), said("user", "Rain in Paris?")],
      "completion": [said("assistant", "No.")], "label": True}),
    ("hh", "preference", HH,
     {"prompt": ASKED, "chosen": [said("assistant", "Eleven kilometres.\n\nThat is all.")],
      "rejected": [said("assistant", "I do not know")]}),
    ("hh", "sft", HH, {"prompt": ASKED, "completion": [said("assistant", "Eleven kilometres.\n\nThat is all.")]}),
    ("openai", "sft",
     {"messages": [said("user", "Rain?"),
                   {"role": "assistant", "content": None, "weight": 1,
                    "tool_calls": [{"id": "c1", "type": "function",
                                    "function": {"name": "rain", "arguments": '{"city": "Paris"}'}}]},
                   {"role": "tool", "tool_call_id": "c1", "content": "0 mm"}, said("assistant", "No.")],
      "tools": TOOLS},
     {"messages": [said("user", "Rain?"), {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]},
                   {"role": "tool", "tool_call_id": "c1", "content": "0 mm"}, said("assistant", "No.")],
      "tools": TOOLS}),
    ("openai", "sft",
     {"messages": [said("user", "Rain?"),
                   {"role": "assistant", "function_call": {"name": "rain", "arguments": '{"city": "Paris"}'}},
                   {"role": "function", "name": "rain", "content": "0"}],
      "functions": [TOOLS[0]["function"]]},
     {"messages": [said("user", "Rain?"), {"role": "assistant", "content": "", "tool_calls": [CALL]},
                   {"role": "tool", "name": "rain", "content": "0"}], "tools": TOOLS}),
    ("openai", "preference",
     {"input": {"messages": [said("user", "Q")], "tools": TOOLS},
      "preferred_output": [said("assistant", "yes")], "non_preferred_output": [said("assistant", "no")]},
     {"prompt": [said("user", "Q")], "chosen": [said("assistant", "yes")], "rejected": [said("assistant", "no")],
      "tools": TOOLS}),
    ("thumbs", "unpaired", {"prompt": "Q", "completion": " a", "thumbs": "Up", "timestamp": 3}, {"label": True}),
    ("thumbs", "unpaired", {"prompt": "Q", "completion": " a", "kto_tag": 0}, {"label": False}),
    ("chat", "sft", {"prompt": "2 + 2?", "completion": "#### 4"},
     {"prompt": [said("user", "2 + 2?")], "completion": [said("assistant", "#### 4")]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "row", "expected"), GOOD, ids=[f"{n}-{k}-{i}" for i, (n, k, *_) in enumerate(GOOD)]
)
def test_rows_become_ours(name, kind, row, expected):
    made = adapt(row, kind, name)
    assert {column: made[column] for column in expected} == expected
    assert {key: value for key, value in made.items() if key not in expected and value is not None} == {
        key: value for key, value in row.items() if key not in expected
    }


BROKEN = [
    ("alpaca", "sft", {"instruction": "Q"}, "missing column"),
    ("alpaca", "sft", {"instruction": 3, "output": "a"}, "wrong type"),
    ("alpaca", "sft", {**ALPACA, "history": [["only a question"]]}, "wrong type"),
    ("alpaca", "sft", {**ALPACA, "input": ["a"]}, "wrong type"),
    ("alpaca", "preference", {"instruction": "Q", "chosen": "yes"}, "missing column"),
    ("sharegpt", "sft", {"conversations": "text"}, "wrong type"),
    ("sharegpt", "sft", {"conversations": [turn("narrator", "Once")]}, "unknown speaker"),
    ("sharegpt", "sft", {"conversations": [turn("human", None)]}, "wrong type"),
    ("sharegpt", "sft", {"conversations": [turn("human", "a"), turn("function_call", "{rain")]}, "wrong type"),
    ("sharegpt", "sft", {"conversations": [turn("human", "a"), turn("function_call", '{"city": 1}')]}, "wrong type"),
    ("sharegpt", "unpaired", {"conversations": SHARED, "kto_tag": "perhaps"}, "wrong label"),
    ("sharegpt", "unpaired", {"conversations": SHARED[:2], "kto_tag": True}, "no answer"),
    ("hh", "preference", {**HH, "rejected": "I do not know"}, "no dialogue"),
    ("hh", "preference", {**HH, "rejected": DIALOGUE.replace("How deep", "Why") + " No"}, "prompts differ"),
    ("hh", "preference", {**HH, "rejected": "\n\nHuman: Is the sea deep?\n\nAssistant: No"}, "prompts differ"),
    ("hh", "preference", {**HH, "chosen": DIALOGUE + " a\n\nHuman: And?"}, "no answer"),
    (
        "hh",
        "preference",
        {"chosen": "\n\nHuman:\n\nAssistant: a", "rejected": "\n\nHuman:\n\nAssistant: b"},
        "no dialogue",
    ),
    ("hh", "preference", {"chosen": DIALOGUE}, "missing column"),
    ("openai", "sft", {"messages": "text", "tools": TOOLS}, "wrong type"),
    ("openai", "sft", {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "wrong type"),
    ("openai", "preference", {"input": "Q", "preferred_output": [], "non_preferred_output": []}, "wrong type"),
    ("thumbs", "unpaired", {"prompt": "Q", "completion": "a"}, "missing column"),
    ("thumbs", "unpaired", {"prompt": "Q", "completion": "a", "label": 1, "thumbs": "down"}, "wrong label"),
    ("chat", "sft", {"prompt": [said("user", "Q")], "completion": "a"}, "wrong type"),
]


@pytest.mark.parametrize(
    ("name", "kind", "row", "problem"), BROKEN, ids=[f"{n}-{p}-{i}" for i, (n, _, _, p) in enumerate(BROKEN)]
)
def test_broken_rows_are_bad(name, kind, row, problem):
    with pytest.raises(Bad) as caught:
        adapt(row, kind, name)
    assert caught.value.kind == problem


@pytest.mark.parametrize(
    ("columns", "kind", "name"),
    [
        (["instruction", "input", "output"], "sft", "alpaca"),
        (["conversations", "id"], "sft", "sharegpt"),
        (["conversations", "chosen", "rejected"], "preference", "sharegpt"),  # goes before TRL's chosen and rejected
        (["chosen", "rejected"], "preference", "trl"),
        (["messages"], "sft", "trl"),
        (["messages", "tools"], "sft", "openai"),
        (["prompt", "completion", "kto_tag"], "unpaired", "thumbs"),
        (["question", "answer"], "sft", None),
        (["instruction", "output"], "preference", None),
    ],
)  # fmt: skip
def test_formats_are_found_by_columns(columns, kind, name):
    assert detect(columns, kind) == name


def test_ambiguous_columns_name_the_candidates(write):
    row = {**ALPACA, "text": "all of it", "conversations": SHARED}
    path = write("a.jsonl", row)
    with pytest.raises(
        ValueError, match=r"a\.jsonl: columns .* fit the formats trl and alpaca and sharegpt: set data\.format"
    ):
        read(DataConfig(path), "sft")
    assert read(DataConfig(path, format="alpaca"), "sft")[0]["completion"] == [said("assistant", "sea")]
    assert read(DataConfig(path, format="trl"), "sft")[0] == row
    with pytest.raises(ValueError, match=r"data\.format='alpacca' is no format; did you mean 'alpaca'\?"):
        read(DataConfig(path, format="alpacca"), "sft")


def test_files_of_two_formats_are_two_parts(write):
    paths = write("a.jsonl", ALPACA), write("b.jsonl", {"text": "a"})
    with pytest.raises(ValueError, match=r"a\.jsonl is alpaca, .*b\.jsonl is trl; name them as parts of data\.mixture"):
        read(DataConfig(paths), "sft")


def test_adapted_rows_are_encoded_and_broken_ones_named(chatml, write, caplog):
    broken = {**HH, "rejected": "Is the sea deep?"}
    path = write("hh.jsonl", HH, "", broken, {**HH, "chosen": DIALOGUE})
    with pytest.raises(ValueError, match=r"hh\.jsonl:3: no dialogue: `rejected`.*\n.*hh\.jsonl:4: empty completion"):
        load(DataConfig(path, format="hh"), chatml, "preference")
    pair = load(DataConfig(path, format="hh", on_bad="drop"), chatml, "preference").train[0]
    expected = {"prompt": ASKED, "chosen": [said("assistant", HH["chosen"].split("Assistant: ")[-1])]}
    whole = encode(chatml, {**expected, "rejected": [said("assistant", "I do not know")]}, "preference", DataConfig(""))
    assert {name: ids.tolist() for name, ids in pair.items()} == {name: ids.tolist() for name, ids in whole.items()}
    assert not caplog.records
    plain = load(DataConfig(write("plain.jsonl", HH)), chatml, "preference").train[0]
    assert chatml.decode(plain["prompt_ids"]).endswith("Assistant:")  # TRL's reading, as text; one is told
    assert "data.format=hh makes messages of it" in caplog.text


def test_the_format_decides_the_cache(chatml, write):
    path = write("a.jsonl", {"prompt": "2 + 2?", "completion": " 4"})
    plain, chat = (inspect(DataConfig(path, format=name), chatml, "sft").train[0] for name in (None, "chat"))
    assert len(chat["input_ids"]) > len(plain["input_ids"])


def test_nested_columns(write):
    row = {"data": {"question": "a"}, "answers": [{"text": " b"}, {"text": " c"}], "a.b": "literal"}
    path = write("a.jsonl", row, {"data": 3, "answers": []})
    columns = {"prompt": "data.question", "completion": "answers.-1.text", "x": "a.b"}
    rows = read(DataConfig(path, columns=columns), "sft")
    assert (rows[0]["prompt"], rows[0]["completion"], rows[0]["x"]) == ("a", " c", "literal")
    assert "prompt" not in rows[1] and "completion" not in rows[1]
    assert look_up(row, "answers.2.text") is MISSING and look_up(row, "data.question.x") is MISSING
    wrong = DataConfig(path, columns={**columns, "completion": "anwsers.0.text"})
    with pytest.raises(
        ValueError, match=r"a\.jsonl: columns: completion: 'anwsers\.0\.text' is in none.*mean 'answers'"
    ):
        read(wrong, "sft")


def test_csv_and_tsv(write, tmp_path, chatml):
    text = 'prompt,completion,margin\nThe sky," is, blue\nand deep",0.5\n\nThe sea, is wide,\nThe sun, is far,1,2\n'
    path = tmp_path / "a.csv"
    path.write_text("\ufeff" + text)
    rows = read(DataConfig(str(path)), "sft")
    assert rows[0] == {"prompt": "The sky", "completion": " is, blue\nand deep", "margin": 0.5}
    assert rows[1] == {"prompt": "The sea", "completion": " is wide", "margin": None}
    assert [rows.where(i)[1] for i in range(3)] == [2, 5, 6]
    with pytest.raises(Bad, match="wrong CSV: 4 fields for 3 columns"):
        rows[2]
    (tmp_path / "b.tsv.xz").write_bytes(lzma.compress(b"text\tid\nThe sky\t007\n"))
    assert read(DataConfig(str(tmp_path / "b.tsv.xz")), "sft")[0] == {"text": "The sky", "id": "007"}
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"text\n" + b"The sky\n" * 500)[:-9])
    with pytest.raises(ValueError, match=r"c\.csv\.gz: damaged file"):
        read(DataConfig(str(tmp_path / "c.csv.gz")), "sft")
    (tmp_path / "d.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"d\.csv: no rows"):
        list(csv_rows(str(tmp_path / "d.csv")))


def test_zstandard_needs_its_package(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: \.zst needs the package zstandard: pip install"):
        read(DataConfig(str(path)), "sft")


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"text": "a"}\n\n{"text": "b"}\n'))
    rows = read(DataConfig(str(path)), "sft")
    assert [rows[i]["text"] for i in range(2)] == ["a", "b"] and rows.where(1)[1] == 3


def test_rows_in_order_of_a_column(write):
    rows = [{"text": f"t{i}", "meta": {"at": at}} for i, at in enumerate(["2024-03", "2023-01", "2024-03", "2022"])]
    path = write("a.jsonl", *rows[:2], "{broken", *rows[2:])
    config = DataConfig(path, sort_by="meta.at", shuffle=False)
    found = read(config, "sft")
    assert [found.where(i)[1] for i in range(5)] == [5, 2, 1, 4, 3]  # stable, what cannot be read last
    assert found[0]["text"] == "t3"
    with pytest.raises(ValueError, match=r"a\.jsonl:1: data\.sort_by='at' is nothing here"):
        read(dataclasses.replace(config, sort_by="at"), "sft")
    with pytest.raises(ValueError, match="sort_by orders the rows, and shuffle would mix them"):
        DataConfig(path, sort_by="at")


def test_every_format_is_tested():
    assert {name for name, *_ in GOOD} == {name for name, *_ in BROKEN} == set(FORMATS)
