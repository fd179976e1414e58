"""Foreign formats: rows as other projects write them -> rows under TRL's column names.

A format is an entry in `FORMATS`. It is named by `data.format`, or found by the columns of a file where these leave no
doubt. What an adapter cannot read is a `Bad` row, reported by file and line with all other problems.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxalign.data.dialogues import message_of, read_dialogue, split_dialogues
from jaxalign.data.formats import FORMS, Bad

Row = Mapping[str, Any]
Message = dict[str, Any]
ADAPTERS = "1"  # part of every cache key: raise it when the same row gives another one

# What `label`, `kto_tag` and their like may say.
LABELS: dict[str, bool] = {
    **dict.fromkeys(("true", "1", "1.0", "up", "good", "yes", "thumbs_up", "chosen", "desirable", "+1"), True),
    **dict.fromkeys(("false", "0", "0.0", "down", "bad", "no", "thumbs_down", "rejected", "undesirable", "-1"), False),
}
TAGS = ("kto_tag", "label", "thumbs", "rating")


@dataclass(frozen=True)
class Format:
    """A foreign format.

    Attributes:
      adapt: (row, kind of example) -> the columns that it gives, which go over the row's own.
      columns: kind -> the columns that a file of this format has for it, one tuple per variant.
      detected: whether these columns are enough to know it by.
    """

    adapt: Callable[[Row, str], dict[str, Any]]
    columns: Mapping[str, Sequence[tuple[str, ...]]] = field(default_factory=dict)
    detected: bool = True


def adapt(row: Row, kind: str, name: str | None) -> dict[str, Any]:
    """A row with the columns that its format stands for; the row itself without a format.

    Args:
      row: as found, columns renamed.
      kind: of example: `sft`, `preference`, `ranking`, `unpaired` or `prompt`.
      name: key of `FORMATS`; None or `trl`: the row is as it should be.

    Raises:
      Bad: the row is not of this format.
    """
    return dict(row) if name in (None, "trl") else {**row, **FORMATS[name].adapt(row, kind)}


def detect(found: Sequence[str], kind: str) -> str | None:
    """The format of a file by its columns; `trl` if they serve as they are, None if no format has them.

    A format whose columns include another's goes before it.

    Raises:
      ValueError: several formats fit and none includes the others; it names them.
    """
    names, candidates = set(found), {}
    for columns in FORMS.get(kind, {}).values():
        if set(columns) <= names:
            candidates.setdefault("trl", set(columns))
    for name, form in FORMATS.items():
        fitting = [set(columns) for columns in form.columns.get(kind, ()) if set(columns) <= names]
        if form.detected and fitting:
            candidates[name] = max(fitting, key=len)
    best = [name for name, columns in candidates.items() if not any(columns < other for other in candidates.values())]
    if len(best) > 1:
        raise ValueError(
            f"columns {', '.join(found)} fit the formats {' and '.join(best)}: set data.format to one of them "
            "(`trl`: take the columns as they are)"
        )
    return best[0] if best else None


def _alpaca(row: Row, kind: str) -> dict[str, Any]:
    """Taori et al. 2023, with LLaMA-Factory's `system`, `history`, `chosen`, `rejected` and `kto_tag`."""
    prompt = _opening(row)
    history = row.get("history") or []
    if not isinstance(history, list):
        raise Bad("wrong type", f"`history` is a {type(history).__name__}; a list of [question, answer] expected")
    for number, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise Bad("wrong type", f"`history`[{number}] is no [question, answer]")
        prompt += [
            _said("user", turn[0], f"history[{number}][0]"),
            _said("assistant", turn[1], f"history[{number}][1]"),
        ]
    asked, more = _text(row, "instruction"), row.get("input") or ""
    if not isinstance(more, str):
        raise Bad("wrong type", f"`input` is a {type(more).__name__}; text expected")
    prompt.append({"role": "user", "content": f"{asked}\n{more}" if more.strip() else asked})
    return {"prompt": prompt, **_answers(row, kind, "output")}


def _chat(row: Row, kind: str) -> dict[str, Any]:
    """Plain texts `prompt` and `completion` (or `chosen` and `rejected`) as a user's and an assistant's messages."""
    prompt = [*_opening(row), {"role": "user", "content": _text(row, "prompt")}]
    return {"prompt": prompt, **_answers(row, kind, "completion")}


def _sharegpt(row: Row, kind: str) -> dict[str, Any]:
    """`conversations` of {from, value}, as of ShareGPT; `chosen` and `rejected` as one such turn or several."""
    turns = row.get("conversations", row.get("conversation"))
    if not isinstance(turns, list):
        raise Bad("wrong type", f"`conversations` is a {type(turns).__name__}; a list of {{from, value}} expected")
    said = [message_of(turn, f"`conversations`[{number}]") for number, turn in enumerate(turns)]
    messages = [*([] if said and said[0]["role"] == "system" else _opening(row)), *said]
    if kind in ("preference", "ranking"):
        return {"prompt": messages, **{name: _turns(row, name) for name in ("chosen", "rejected")}}
    if kind == "sft":
        return {"messages": messages}
    asked, answer = _last_answer(messages, "`conversations`")
    label = _labelled(row) if kind == "unpaired" else {}
    return {"prompt": asked, "completion": answer, **label}


def _hh(row: Row, kind: str) -> dict[str, Any]:
    """`chosen` and `rejected` dialogues of "Human:" and "Assistant:" that share a prompt (Bai et al. 2022)."""
    if kind not in ("preference", "ranking"):
        asked, answer = _last_answer(read_dialogue(_text(row, "chosen"), "chosen"), "`chosen`")
        return {"prompt": asked, "completion": answer}
    prompt, chosen, rejected = split_dialogues(_text(row, "chosen"), _text(row, "rejected"))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _openai(row: Row, kind: str) -> dict[str, Any]:
    """OpenAI's files: `messages` with `tool_calls`, and `tools`; or, for preferences, `input` and two outputs."""
    if "preferred_output" in row or "non_preferred_output" in row:
        asked = row.get("input")
        if not isinstance(asked, dict):
            raise Bad("wrong type", "`input` is no object with `messages`")
        sides = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
        pair = {ours: _openai_messages(row.get(theirs), theirs) for ours, theirs in sides.items()}
        return {"prompt": _openai_messages(asked.get("messages"), "input.messages"), **pair, **_tools(asked)}
    messages = _openai_messages(row.get("messages"), "messages")
    if kind in ("sft", "prompt"):
        return {"messages": messages, "prompt": messages if kind == "prompt" else None, **_tools(row)}
    asked, answer = _last_answer(messages, "`messages`")
    return {"prompt": asked, "completion": answer, **_tools(row), **(_labelled(row) if kind == "unpaired" else {})}


def _thumbs(row: Row, kind: str) -> dict[str, Any]:
    """`prompt` and `completion` with a thumb up or down under `kto_tag`, `label`, `thumbs` or `rating`."""
    del kind
    return _labelled(row)


def _answers(row: Row, kind: str, answer: str) -> dict[str, Any]:
    """The completion columns of a row whose answers are plain texts."""
    if kind == "prompt":
        return {}
    if kind in ("preference", "ranking"):
        return {name: [_said("assistant", row.get(name), name)] for name in ("chosen", "rejected")}
    completion = [_said("assistant", row.get(answer), answer)]
    return {"completion": completion, **(_labelled(row) if kind == "unpaired" else {})}


def _opening(row: Row) -> list[Message]:
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise Bad("wrong type", f"`system` is a {type(system).__name__}; text expected")
    return [{"role": "system", "content": system}] if system and system.strip() else []


def _said(role: str, content: Any, name: str) -> Message:
    if content is None:
        raise Bad("missing column", f"this row has no `{name}`")
    if not isinstance(content, str):
        raise Bad("wrong type", f"`{name}` is a {type(content).__name__}; text expected")
    return {"role": role, "content": content}


def _text(row: Row, name: str) -> str:
    return _said("", row.get(name), name)["content"]


def _turns(row: Row, name: str) -> list[Message]:
    """One turn, several, or the text of one."""
    value = row.get(name)
    if value is None or isinstance(value, str):
        return [_said("assistant", value, name)]
    listed = value if isinstance(value, list) else [value]
    return [message_of(turn, f"`{name}`[{number}]") for number, turn in enumerate(listed)]


def _last_answer(messages: list[Message], name: str) -> tuple[list[Message], list[Message]]:
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        last = messages[-1]["role"] if messages else "nothing"
        raise Bad("no answer", f"{name} must end with an assistant's turn after another one; it ends with {last}")
    return messages[:-1], messages[-1:]


def _labelled(row: Row) -> dict[str, Any]:
    given = [name for name in TAGS if row.get(name) is not None]
    if not given:
        raise Bad("missing column", f"this row has none of {', '.join(TAGS)}")
    found = {name: LABELS.get(str(row[name]).strip().lower()) for name in given}
    wrong = next((name for name, label in found.items() if label is None), None)
    if wrong is not None:
        raise Bad("wrong label", f"`{wrong}` is {row[wrong]!r}; true or false, 1 or 0, up or down expected")
    if len(set(found.values())) > 1:
        raise Bad("wrong label", f"{' and '.join(given)} contradict each other")
    return {"label": found[given[0]]}


def _tools(row: Row) -> dict[str, Any]:
    """`tools`, or the older `functions`, as tools."""
    if row.get("functions") and not row.get("tools"):
        return {"tools": [{"type": "function", "function": function} for function in row["functions"]]}
    return {"tools": row["tools"]} if row.get("tools") else {}


def _openai_messages(messages: Any, name: str) -> list[Message]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Bad("wrong type", f"`{name}` is no list of {{role, content}}")
    return [_openai_message(message, f"`{name}`[{number}]") for number, message in enumerate(messages)]


def _openai_message(message: Message, where: str) -> Message:
    """Arguments of calls as objects, which templates write out; an older `function_call` as a call."""
    calls = message.get("tool_calls")
    rest = {key: value for key, value in message.items() if key not in ("function_call", "tool_calls", "weight")}
    if message.get("function_call"):
        calls = [{"type": "function", "function": message["function_call"]}]
    if message.get("role") == "function":
        rest["role"] = "tool"
    if not calls:
        return rest
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Bad("wrong type", f"the tool_calls of {where} are no list of objects")
    return {**rest, "content": rest.get("content") or "", "tool_calls": [_call(call, where) for call in calls]}


def _call(call: Message, where: str) -> Message:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Bad("wrong type", f"a tool call of {where} has no name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise Bad("wrong type", f"the arguments of a tool call of {where} are no JSON: {error.msg}") from error
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


_ALPACA = ("instruction", "output")
_PAIR = ("chosen", "rejected")
FORMATS: dict[str, Format] = {
    "alpaca": Format(
        _alpaca,
        {
            "sft": [_ALPACA],
            "preference": [("instruction", *_PAIR)],
            "ranking": [("instruction", *_PAIR)],
            "unpaired": [(*_ALPACA, "kto_tag"), (*_ALPACA, "label")],
            "prompt": [("instruction",)],
        },
    ),
    "sharegpt": Format(
        _sharegpt,
        {
            "sft": [("conversations",), ("conversation",)],
            "preference": [("conversations", *_PAIR)],
            "ranking": [("conversations", *_PAIR)],
            "unpaired": [("conversations", "kto_tag"), ("conversations", "label")],
            "prompt": [("conversations",)],
        },
    ),
    "openai": Format(
        _openai,
        {
            "sft": [("messages", "tools"), ("messages", "functions")],
            "preference": [("input", "preferred_output", "non_preferred_output")],
            "ranking": [("input", "preferred_output", "non_preferred_output")],
        },
    ),
    "thumbs": Format(_thumbs, {"unpaired": [("prompt", "completion", tag) for tag in TAGS if tag != "label"]}),
    # Their columns are TRL's too: only the name says what is in them.
    "hh": Format(_hh, detected=False),
    "chat": Format(_chat, detected=False),
}
