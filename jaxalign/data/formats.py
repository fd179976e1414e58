"""What a data set may look like: its configuration, the forms of its rows (TRL's), and one canonical form for each."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxalign.data.settings import Filters, MixturePart, check_sources

# What serves a method, by the kind of example that it trains on: form -> the columns it needs; the first match counts.
FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "sft": {"prompt-completion": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)},
    "preference": {"preference": ("chosen", "rejected")},
    "ranking": {"preference": ("chosen", "rejected"), "ranking": ("prompt", "completions")},
    "stepwise": {"stepwise": ("prompt", "completions", "labels")},
    "unpaired": {"unpaired": ("prompt", "completion", "label"), "preference": ("chosen", "rejected")},
    "prompt": {"prompt-only": ("prompt",)},
}
NEEDS = {
    "sft": "`prompt` and `completion`, or `messages`, or `text`",
    "preference": "`chosen` and `rejected`, with or without `prompt`",
    "ranking": "`chosen` and `rejected`, with or without `prompt`, or `prompt` and `completions`",
    "stepwise": "`prompt`, `completions` (the steps) and `labels`",
    "unpaired": "`prompt`, `completion` and `label`, or `chosen` and `rejected`, with or without `prompt`",
    "prompt": "`prompt`",
}
LABELS = {True: 1, False: 0, "true": 1, "false": 0}  # 1 and 0 too, which are equal to the first two
MOST_COMPLETIONS = 7  # of one prompt in ranked data


class Bad(ValueError):
    """Why one row cannot be used.

    Attributes:
      kind: a few words that are the same for all rows with this problem.
      detail: what is wrong with this row.
    """

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class DataConfig:
    """Where the examples come from and how they become tokens.

    Attributes:
      path: a file (JSON lines, JSON, CSV, Parquet, Arrow; the JSON and CSV ones also compressed), a glob, several of
        these, a folder written by `save_to_disk`, or a data set's name on the Hub.
      name: subset of a Hub data set.
      split: split to train on; slices such as `train[:10%]` work everywhere. Files have the one split `train`.
      eval_path: like `path`, for evaluation.
      eval_split: split to evaluate on, of `eval_path` if given (then `train` by default), else of `path`.
      eval_ratio: share of the rows, in (0, 1), to hold out for evaluation; which ones depends on `seed` alone.
      columns: our column name -> the data set's, for example `{"prompt": "question", "completion": "answers.0.text"}`.
      dataset_text_field: the column of plain texts.
      max_length: most tokens of an example, prompt and (longer) completion together.
      max_prompt_length: most tokens of a prompt; None for no limit of its own.
      truncation_mode: None makes an example that does not fit a problem. `keep_start` cuts completions at the end (and
        with it their EOS), `keep_end` cuts prompts at the start; both are counted, and an example that would lose
        its whole completion stays a problem.
      completion_only_loss: train on the completion only; None means yes where there is one.
      assistant_only_loss: train only on what the assistant says: what the chat template marks with `{% generation %}`,
        or, where it has no marks, what `masks.assistant_mask` finds.
      on_bad: `stop` raises when there are problems, `drop` leaves these rows out and counts them.
      shuffle: shuffle anew each epoch.
      seed: of the shuffle and of `eval_ratio`.
      chat_template_path: a Jinja file, or a tokenizer's folder or Hub name, whose template is used.
      eos_token: the token that ends a completion, if not the tokenizer's own.
      format: key of `FORMATS`, or `trl`; None finds it by the columns.
      mixture: parts instead of `path`.
      mixture_temperature: T; without weights, a part of n examples has a share proportional to `n ** (1 / T)`.
      mixture_epoch: an epoch ends when the `first` part is used up, or when `all` are, shorter ones being repeated.
      sort_by: column by whose values rows are ordered, for example a timestamp; needs `shuffle=False`.
      filters: what is left out of the training data although it could be trained on.
      streaming: read the training data while training, without a pass over them before.
      shuffle_window: examples that are shuffled among each other when streaming.
      stream_sample: examples at the beginning of a stream from which lengths are estimated.
      step_separator: what ends each step in stepwise data; a step is judged at its last token.
    """

    path: str | tuple[str, ...] | None = None
    name: str | None = None
    split: str = "train"
    eval_path: str | tuple[str, ...] | None = None
    eval_split: str | None = None
    eval_ratio: float | None = None
    columns: dict[str, str] = field(default_factory=dict)
    dataset_text_field: str = "text"
    max_length: int = 1024
    max_prompt_length: int | None = None
    truncation_mode: str | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    on_bad: str = "stop"
    shuffle: bool = True
    seed: int = 42
    chat_template_path: str | None = None
    eos_token: str | None = None
    format: str | None = None
    mixture: tuple[MixturePart, ...] = ()
    mixture_temperature: float = 1.0
    mixture_epoch: str = "all"
    sort_by: str | None = None
    filters: Filters | None = None
    streaming: bool = False
    shuffle_window: int = 4096
    stream_sample: int = 1000
    step_separator: str = "\n"

    def __post_init__(self):
        check_sources(self)
        _one_of("on_bad", self.on_bad, ("stop", "drop"))
        _one_of("truncation_mode", self.truncation_mode, (None, "keep_start", "keep_end"))
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}: an example has at least 2 tokens")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise ValueError(f"max_prompt_length={self.max_prompt_length} must be at least 1 and below max_length")
        if self.eval_ratio is not None and not 0 < self.eval_ratio < 1:
            raise ValueError(f"eval_ratio={self.eval_ratio} must lie between 0 and 1")
        if self.eval_ratio is not None and (self.eval_path or self.eval_split):
            raise ValueError("eval_ratio holds rows out of the training data: leave eval_path and eval_split away")


def form_of(row: Mapping[str, Any], kind: str) -> str:
    """The form of a row for a kind of example, a key of `FORMS[kind]`; raises `Bad` where columns are missing."""
    for form, columns in FORMS[kind].items():
        if all(row.get(name) is not None for name in columns):
            return form
    raise Bad(
        "missing column", f"needed: {NEEDS[kind]}; this row has {', '.join(k for k in row if row[k] is not None)}"
    )


def normalise(row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A row as its form's columns alone, checked, with an explicit prompt.

    For `ranking`, a row is a pair (`chosen`, `rejected`, and perhaps `margin`, the number by which the chosen score
    should exceed the other, 0 by default), or one `prompt` with 2 to 7 `completions`: the best first, or in any order
    with `ranks` (numbers, 1 is best) or `scores` (numbers, the higher the better). Equal ranks or scores make no pair.

    Args:
      row: columns by name; extra ones are left out.
      kind: `sft`, `preference`, `ranking`, `stepwise`, `unpaired` or `prompt`.

    Returns:
      `{text}`, `{messages}`, `{prompt}`, `{prompt, completion}` or `{prompt, chosen, rejected}`, all strings or all
      lists of `{role, content}` messages; besides `tools` (list or None) and `chat_template_kwargs` (dict). `ranking`
      gives `{prompt, completions}` (a list of such texts or lists) or `{prompt, chosen, rejected}`, either with `ranks`
      (per completion, int from 0 = best) and `margins` (per completion, float: its lead over those ranked below).
      `stepwise` gives `{prompt, steps, labels}`: a text, a list of texts and a list of as many booleans.
      `unpaired` gives `{prompt, completion}`, or of a pair `{prompt, chosen, rejected}`, with `labels` (per completion,
      1 where it is desirable, else 0).

    Raises:
      Bad: a column is missing or of the wrong type, or the prompt is repeated in the completions.
    """
    form = form_of(row, kind)
    if form == "stepwise":
        return {**_steps(row), "tools": None, "chat_template_kwargs": {}}
    if form == "ranking":
        return {**_ranked(row), "tools": _tools(row.get("tools")), "chat_template_kwargs": _kwargs(row)}
    example = {name: _content(row[name], name) for name in FORMS[kind][form] if name != "label"}
    if form == "preference":
        example = _with_prompt(row, example)
    if form == "messages" and isinstance(example["messages"], str):
        raise Bad("wrong type", "`messages` is text; a list of {role, content} expected")
    if len({isinstance(value, str) for value in example.values()}) > 1:
        kinds = ", ".join(f"`{k}` is {'text' if isinstance(v, str) else 'messages'}" for k, v in example.items())
        raise Bad("mixed forms", f"{kinds}; all must be text or all messages")
    if kind == "ranking":
        margin = 0.0 if row.get("margin") is None else _numbers([row["margin"]], "margin")[0]
        example |= {"ranks": [0, 1], "margins": [margin, 0.0]}
    if kind == "unpaired":
        example["labels"] = [1, 0] if form == "preference" else [_label(row["label"])]
        if form == "unpaired":
            _check_repeated(example)
    return {**example, "tools": _tools(row.get("tools")), "chat_template_kwargs": _kwargs(row)}


def conversational(example: Mapping[str, Any]) -> bool:
    """Whether a normalised example consists of messages."""
    return not isinstance(
        example["text" if "text" in example else "messages" if "messages" in example else "prompt"], str
    )


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt that two completions share, and what is left of them.

    For messages, the longest common run of leading messages. For strings, the longest common prefix that ends before
    white space, so that no word is cut and the completions keep the space in front of their first word (TRL cuts
    between any two characters; the tokens of half a word are no prefix of the word's). Each side of a differing pair of
    strings keeps at least one word.
    """
    common = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        common += 1
    if isinstance(chosen, str):
        common = _word_boundary(chosen, rejected, common)
    return chosen[:common], chosen[common:], rejected[common:]


def prompt_key(example: Mapping[str, Any]) -> int:
    """A 64-bit hash of a normalised example's prompt: of `messages` what precedes the first answer, of `text` all."""
    prompt = example.get("prompt", example.get("text"))
    if prompt is None:
        roles = [message["role"] for message in example["messages"]]
        prompt = example["messages"][: roles.index("assistant") if "assistant" in roles else None]
    text = json.dumps(prompt, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _with_prompt(row: Mapping[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = example["chosen"], example["rejected"]
    if chosen == rejected:
        raise Bad("identical pair", "chosen and rejected are the same")
    prompt = None if row.get("prompt") is None else _content(row["prompt"], "prompt")
    # A prompt in words beside whole conversations is a label (as in UltraFeedback): the conversations hold the prompt.
    if prompt is None or (isinstance(prompt, str) and not isinstance(chosen, str)):
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise Bad("mixed forms", "one of chosen and rejected is text, the other messages")
        prompt, chosen, rejected = split_prompt(chosen, rejected)
    elif not isinstance(prompt, str) and prompt and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        raise Bad(
            "repeated prompt", "chosen and rejected begin with the messages of `prompt`; leave one of the two away"
        )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _label(value: Any) -> int:
    label = value.strip().lower() if isinstance(value, str) else value
    if isinstance(label, bool | int | float | str) and label in LABELS:
        return LABELS[label]
    raise Bad("wrong label", f"`label` is {_name(value)}; true or false (or 1 or 0) expected")


def _check_repeated(example: Mapping[str, Any]) -> None:
    prompt, completion = example["prompt"], example["completion"]
    if not isinstance(prompt, str) and prompt and completion[: len(prompt)] == prompt:
        raise Bad("repeated prompt", "the completion begins with the messages of `prompt`; leave one of the two away")


def _ranked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt with several completions, their ranks and margins."""
    prompt, listed = _content(row["prompt"], "prompt"), row["completions"]
    if not isinstance(listed, list):
        raise Bad("wrong type", f"`completions` is {_name(listed)}; a list of texts or of lists of messages expected")
    if not 2 <= len(listed) <= MOST_COMPLETIONS:
        raise Bad("wrong number", f"{len(listed)} `completions`; 2 to {MOST_COMPLETIONS} can be ranked")
    completions = [_content(each, f"completions[{i}]") for i, each in enumerate(listed)]
    if len({isinstance(each, str) for each in (prompt, *completions)}) > 1:
        raise Bad("mixed forms", "`prompt` and all of `completions` must be text, or all messages")
    if not isinstance(prompt, str) and prompt and all(each[: len(prompt)] == prompt for each in completions):
        raise Bad("repeated prompt", "the completions begin with the messages of `prompt`; leave one of the two away")
    given = [name for name in ("ranks", "scores") if row.get(name) is not None]
    if len(given) > 1:
        raise Bad("ambiguous ranking", "there are `ranks` and `scores`; leave one of the two away")
    if not given and row.get("labels") is not None:
        raise Bad("ambiguous ranking", "`completions` with `labels` are steps, not a ranking; `ranks` or `scores` rank")
    values = _numbers(row[given[0]], given[0]) if given else [float(i) for i in range(len(listed))]
    if len(values) != len(listed):
        raise Bad("wrong number", f"{len(values)} `{given[0]}` for {len(listed)} `completions`")
    order = sorted(set(values), reverse=given == ["scores"])
    if len(order) < 2:
        raise Bad("no pair", f"all `{given[0]}` are equal, so nothing is better than anything")
    ranks = [order.index(value) for value in values]
    return {"prompt": prompt, "completions": completions, "ranks": ranks, "margins": [0.0] * len(ranks)}


def _steps(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt with the steps of one completion, and which of them are right."""
    prompt, steps, labels = row["prompt"], row["completions"], row["labels"]
    if not isinstance(prompt, str):
        raise Bad("wrong type", f"`prompt` is {_name(prompt)}; stepwise data are text")
    for name, values, kind, wanted in (("completions", steps, str, "text"), ("labels", labels, bool, "true or false")):
        if not isinstance(values, list):
            raise Bad("wrong type", f"`{name}` is {_name(values)}; a list expected, one entry per step")
        for i, value in enumerate(values):
            if not isinstance(value, kind):
                raise Bad("wrong type", f"`{name}[{i}]` is {_name(value)}; {wanted} expected")
    if len(steps) != len(labels):
        raise Bad("wrong number", f"{len(labels)} `labels` for {len(steps)} steps in `completions`")
    if not steps:
        raise Bad("no steps", "`completions` is empty")
    for i, step in enumerate(steps):
        if not step.strip():
            raise Bad("empty step", f"`completions[{i}]` has no text")
    return {"prompt": prompt, "steps": steps, "labels": labels}


def _numbers(values: Any, name: str) -> list[float]:
    if not isinstance(values, list):
        raise Bad("wrong type", f"`{name}` is {_name(values)}; a list of numbers expected")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise Bad("wrong type", f"`{name}` is or holds {_name(value)}; a finite number expected")
    return [float(value) for value in values]


def _word_boundary(a: str, b: str, common: int) -> int:
    end = common
    if not (common < min(len(a), len(b)) and a[common].isspace() and b[common].isspace()):
        while end > 0 and not a[end - 1].isspace():
            end -= 1
    prompt = a[:end].rstrip()
    while prompt and not (a[len(prompt) :].strip() and b[len(prompt) :].strip()):
        words = prompt.rsplit(None, 1)  # one continues the other: they part at the last word that both have
        prompt = words[0] if len(words) > 1 else ""
    return len(prompt)


def _content(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise Bad("wrong type", f"`{name}` is {_name(value)}; text or a list of {{role, content}} expected")
    for number, message in enumerate(value):
        _check_message(message, f"`{name}`[{number}]")
    return value


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise Bad("wrong type", f"{where} is {_name(message)}; an object with role and content expected")
    if not isinstance(message.get("role"), str):
        raise Bad("wrong type", f"{where} has no role; it has {', '.join(message) or 'nothing'}")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise Bad("wrong type", f"{where} has no content")
    if content is not None and not isinstance(content, str | list):
        raise Bad("wrong type", f"the content of {where} is {_name(content)}; text expected")


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise Bad("wrong type", f"`tools` is text but no JSON: {error.msg} at column {error.colno}") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Bad("wrong type", f"`tools` is {_name(tools)}; a list of JSON schemas expected")
    return tools


def _kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise Bad("wrong type", f"`chat_template_kwargs` is {_name(kwargs)}; an object expected")
    return kwargs


def _name(value: Any) -> str:
    words = {bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    shown = repr(value)
    return f"{words.get(type(value), type(value).__name__)} ({shown[:40] + '...' if len(shown) > 40 else shown})"


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: one of {', '.join(map(repr, allowed))} expected")
