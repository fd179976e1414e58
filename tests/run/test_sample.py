"""What `jaxalign sample` writes agrees with the model and the rewards, and its data sets can be read."""

import json
import re
import shlex
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxalign import cli, data, models, sampling
from jaxalign.config import parse_config
from jaxalign.rewards import RewardError
from jaxalign.rewards.model import make_scorer
from jaxalign.run import run
from jaxalign.run.judges import parse_score
from jaxalign.run.sample import Request, sample
from jaxalign.run.selection import Rules, select
from jaxalign.sampling import Config
from jaxalign.types import TokenRows
from tests.run.conftest import ROOT
from tests.test_docs import blocks

TEXTS = ["the cat", "seven small birds that flew over an old house near the river", "a mat", "looked at", "on"]
SETTINGS = Config(max_new_tokens=12, temperature=0.9, top_k=40, num_generations=3, slots=4)


def prompt_ids(tokenizer, messages) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    """The same prompts as text and as messages, with an `answer` and a column that has one of our names."""
    folder = tmp_path_factory.mktemp("prompts")
    more = [{"answer": str(i), "finish": "late"} for i in range(len(TEXTS))]
    texts = [{"prompt": text, **each} for text, each in zip(TEXTS, more, strict=True)]
    messages = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in texts]
    return {"text": write(folder / "text.jsonl", texts), "messages": write(folder / "messages.jsonl", messages)}


@pytest.fixture(scope="module")  # compiled as what it is compared with
def drawn(tiny, files) -> list[dict]:
    """Three completions of each conversation."""
    return sample(Request(str(tiny), prompts=files["messages"], settings=SETTINGS))


@pytest.fixture(scope="session")
def judge_folder(tiny, tmp_path_factory) -> Path:
    """A reward model of the tiny policy."""
    model, variables = models.add_score_head(*models.load(tiny), jax.random.key(5))
    return models.save(tmp_path_factory.mktemp("models") / "judge", model, variables, models.load_tokenizer(tiny))


def test_text_tokens_and_log_probs_agree(tiny, files, drawn):
    tokenizer, asked = models.load_tokenizer(tiny), read(files["messages"])
    assert [row["prompt"] for row in drawn] == [row["prompt"] for row in asked for _ in range(3)]
    assert [row["answer"] for row in drawn] == [str(i) for i in range(5) for _ in range(3)]
    model, variables = models.load(tiny)
    # One plain forward pass of prompts and completions: log softmax(logits / temperature) at the tokens drawn.
    prompts = [prompt_ids(tokenizer, row["prompt"]) for row in drawn]
    padded, lengths = np.zeros((len(drawn), 96), np.int32), []
    for i, row in enumerate(drawn):
        whole = [*prompts[i], *row["completion_ids"]]
        padded[i, : len(whole)] = whole
        lengths.append(len(whole))
    rows = TokenRows.from_padded(padded, np.arange(96)[None] < np.array(lengths)[:, None])
    logits = jax.jit(lambda v: model.logits(v, model.apply(v, rows)[0]))(variables)
    log_probs = np.asarray(jax.nn.log_softmax(logits / SETTINGS.temperature, axis=-1))
    finished = Counter()
    for row, prompt, full in zip(drawn, prompts, log_probs, strict=True):
        ids = row["completion_ids"]
        assert row["completion"] == [{"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}]
        assert row["finish"] == ("eos" if ids[-1] == 2 else "length") and (row["finish"] == "eos" or len(ids) == 12)
        finished[row["finish"]] += 1
        full = full[len(prompt) - 1 : len(prompt) - 1 + len(ids)]
        np.testing.assert_allclose(row["logps"], full[np.arange(len(ids)), ids], atol=1e-4)
        # top-k of 40: what it kept is the mass of the 40 best.
        np.testing.assert_allclose(row["log_mass"], np.log(np.exp(np.sort(full)[:, -40:]).sum(-1)), atol=1e-4)
        assert row["cumulative_logp"] == pytest.approx(sum(row["logps"]), abs=1e-5)
    assert finished["length"] and len({tuple(row["completion_ids"]) for row in drawn}) > 10


def test_a_stop_string_cuts_tokens_and_log_probs_too(tiny, files, drawn):
    found = (re.search("(?<=.)[A-Za-z]{2}", row["completion"][0]["content"]) for row in drawn)
    stop = next(match.group() for match in found if match)
    request = Request(str(tiny), prompts=files["messages"], settings=SETTINGS, stop=(stop, "never there"))
    cut = sample(request)
    kept = sample(Request(**{**vars(request), "keep_stop": True}))
    decode = models.load_tokenizer(tiny).decode
    stopped = 0
    for whole, row, other in zip(drawn, cut, kept, strict=True):
        before, found, _ = whole["completion"][0]["content"].partition(stop)
        size = len(row["completion_ids"])
        assert row["completion"][0]["content"] == before
        assert other["completion"][0]["content"] == before + found
        assert row["completion_ids"] == other["completion_ids"] == whole["completion_ids"][:size]
        assert row["logps"] == whole["logps"][:size] and row["log_mass"] == whole["log_mass"][:size]
        assert row["finish"] == ("stop" if found else whole["finish"])
        if found:  # the last token is the one that completes it
            stopped += 1
            assert stop in decode(row["completion_ids"], skip_special_tokens=True)
            assert stop not in decode(row["completion_ids"][:-1], skip_special_tokens=True)
    assert stopped


@pytest.fixture
def counted(monkeypatch) -> list[dict[str, int]]:
    """The counters of each draw."""
    found, draw = [], sampling.sample_prompts

    def kept(*args, **kwargs):
        samples = draw(*args, **kwargs)
        found.append({name: int(count) for name, count in samples.counters.items()})
        return samples

    monkeypatch.setattr(sampling, "sample_prompts", kept)
    return found


def test_a_stop_sequence_ends_completions_inside_the_loop(tiny, drawn, counted):
    """The text is what the stop string alone makes of it; fewer tokens are drawn for it."""
    tokenizer = models.load_tokenizer(tiny)
    letters = Counter(i for row in drawn for i in row["completion_ids"][1:-3] if str(tokenizer.decode([i])).isalpha())
    stops = tuple(str(tokenizer.decode([i])) for i, _ in letters.most_common(6))
    assert all(len(tokenizer(stop, add_special_tokens=False)["input_ids"]) == 1 for stop in stops)
    # A single prompt is completed on one device: on several the one that draws longest would hide what is saved.
    request = Request(str(tiny), prompt="the cat", settings=replace(SETTINGS, num_generations=12), stop=stops)
    for keep_stop in (False, True):
        late = sample(replace(request, keep_stop=keep_stop))
        early = sample(replace(request, keep_stop=keep_stop, stop_sequences=stops))
        for row, other in zip(early, late, strict=True):
            assert all(row[name] == other[name] for name in ("completion", "completion_ids", "finish"))
            np.testing.assert_allclose(row["logps"], other["logps"], atol=1e-4)
    assert sum(row["finish"] == "stop" for row in late) >= 3
    without, _, _, within = counted
    assert within["drawn"] < without["drawn"] and within["decode_steps"] < without["decode_steps"]
    assert within["refills"] == without["refills"] == 12 - 4
    # Without strings to look for afterwards, the end is cut off the text all the same.
    for row, other in zip(sample(replace(request, stop=(), stop_sequences=stops)), early, strict=True):
        ended = row["finish"] == "stop"
        ids = row["completion_ids"][:-1] if ended else row["completion_ids"]
        assert row["completion"][0]["content"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert len(row["completion_ids"]) >= len(other["completion_ids"])


def test_a_stop_token_ends_completions_as_eos_does(tiny, files, drawn, counted):
    tokenizer = models.load_tokenizer(tiny)
    (stop, count), *_ = Counter(i for row in drawn for i in row["completion_ids"][:-1] if i != 2).most_common(1)
    rows = sample(Request(str(tiny), prompts=files["messages"], settings=SETTINGS, stop_token_ids=(stop,)))
    assert count and any(row["completion_ids"][-1] == stop for row in rows)
    for row, whole in zip(rows, drawn, strict=True):
        ids = whole["completion_ids"]
        ids = ids[: ids.index(stop) + 1] if stop in ids else ids
        assert row["completion_ids"] == ids
        assert row["finish"] == ("eos" if ids[-1] in (2, stop) else "length")
        text = tokenizer.decode(ids[:-1] if ids[-1] == stop else ids, skip_special_tokens=True)
        assert row["completion"][0]["content"] == text
    assert counted[0]["drawn"] == sum(len(row["completion_ids"]) for row in rows)


def test_functions_and_models_score_together(tiny, files, judge_folder, tmp_path):
    (tmp_path / "own.py").write_text(
        "def known(prompts, completions, answer, completion_ids, *, scale=1.0):\n"
        "    assert all(c[0]['role'] == 'assistant' for c in completions)\n"
        "    return [None if a == '2' else scale * (int(a) + len(i)) for a, i in zip(answer, completion_ids)]\n"
    )
    own, same = f'{tmp_path}/own.py:known:{{"scale": 2.0}}', f"{tmp_path}/own.py:known"
    lines = []
    request = Request(
        str(tiny),
        prompts=files["messages"],
        settings=SETTINGS,
        scores=(own, str(judge_folder), same),
        weights=(1.0, 0.5, -1.0),
    )
    rows = sample(request, say=lines.append)
    tokenizer = models.load_tokenizer(tiny)
    prompts = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    whole = [[*prompt, *row["completion_ids"]] for prompt, row in zip(prompts, rows, strict=True)]
    expected = make_scorer(*models.load(judge_folder))(whole)
    for row, score in zip(rows, expected, strict=True):
        base = None if row["answer"] == "2" else int(row["answer"]) + len(row["completion_ids"])
        assert row["scores"]["known"] == (None if base is None else 2 * base) and row["scores"]["known_2"] == base
        assert row["scores"]["judge"] == pytest.approx(score, abs=1e-4)
        # A score that is not there adds nothing.
        assert row["score"] == pytest.approx(0.5 * score + (base or 0), abs=1e-4)
    assert lines[0].startswith("known: mean ") and lines[0].endswith("12 completions, 3 without")


def test_data_sets_load_as_what_they_are(tiny, files, tmp_path):
    """Both forms, through the command line: every row is read back without a problem, in the prompts' form."""
    tokenizer, runner = models.load_tokenizer(tiny), CliRunner()
    own = tmp_path / "own.py"
    own.write_text("def size(prompts, completions, completion_ids):\n    return [sum(ids) for ids in completion_ids]\n")
    counts = {}
    for form, path in files.items():
        for how, kind in (("best", "sft"), ("pairs", "preference"), ("pairs", "ranking")):
            output = tmp_path / f"{form}_{kind}.jsonl"
            arguments = ["sample", tiny, "--prompts", path, "--num-generations", 4, "--max-new-tokens", 9]
            arguments += ["--score", f"{own}:size", "--select", how, "--output", output]
            if kind != "ranking":
                result = runner.invoke(cli.app, [str(each) for each in arguments], catch_exceptions=False)
                assert f" rows in {output.name}" in result.output.replace(str(tmp_path) + "/", "").replace("\n", " ")
            else:
                output = tmp_path / f"{form}_preference.jsonl"
            found = data.load(data.DataConfig(str(output), max_length=200), tokenizer, kind)
            rows = read(output)
            assert len(found.train) == len(rows) >= 2 and not found.report.train.problems
            counts[form, kind] = len(rows)
            asked = {row["answer"]: row["prompt"] for row in read(path)}
            for row, example in zip(rows, found.train, strict=True):
                completions = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
                assert {type(each) for each in (row["prompt"], *completions)} == {str if form == "text" else list}
                assert row["prompt"] == asked[row["answer"]] and "logps" not in row
                if kind == "ranking":
                    assert example["margins"][0] == pytest.approx(row["score_chosen"] - row["score_rejected"])
                    assert row["margin"] > 0 and example["ranks"].tolist() == [0, 1]
    assert counts["messages", "sft"] == 5


def completions(scores, **changes):
    """Completions of one prompt, by score; `changes` are by number."""
    rows = []
    for i, score in enumerate(scores):
        text = [{"role": "assistant", "content": f"cat {i}"}]
        row = {"prompt": [{"role": "user", "content": "on"}], "completion": text, "completion_ids": [i], "logps": [0.0]}
        row |= {"cumulative_logp": 0.0, "finish": "eos", "score": score, "scores": {"r": score}, "answer": "x"}
        rows.append({**row, **changes.get(f"c{i}", {})})
    return rows


EMPTY = {"completion": [{"role": "assistant", "content": " \n"}]}
CUT = {"finish": "length"}


def said(row, name="completion"):
    return row[name][0]["content"]


def test_selection_by_hand(tiny):
    tokenizer = models.load_tokenizer(tiny)
    rows = [
        *completions([0.0, 2.0, 2.0]),  # the first of two equals; the worst is 0
        *completions([None, 1.0, None]),  # one score makes no pair
        *completions([1.0, 1.0, 1.0]),  # a tie
        *completions([None, None, None]),
        *completions([3.0, -1.0, 5.0], c2=EMPTY),  # the best says nothing
        *completions([3.0, -1.0, 5.0], c2=CUT),  # the best was cut
        *completions([7.0, 7.0, 7.0], c0=CUT, c1=CUT, c2=CUT),
    ]
    best = select(rows, 3, "best", Rules(), tokenizer)
    assert [said(row) for row in best.rows] == ["cat 1", "cat 1", "cat 0", "cat 0", "cat 2", "cat 0"]
    assert best.dropped == {"no score": 1}
    assert best.rows[0].keys() == {"prompt", "completion", "score", "scores", "finish", "answer"}
    ended = select(rows, 3, "best", Rules(min_score=2, ended=True), tokenizer)
    assert [said(row) for row in ended.rows] == ["cat 1", "cat 0", "cat 0"]
    assert ended.dropped == {"no score": 1, "score below 2": 2, "not ended": 1}
    pairs = select(rows, 3, "pairs", Rules(), tokenizer)
    found = [(said(row, "chosen"), said(row, "rejected"), row["margin"]) for row in pairs.rows]
    assert found == [("cat 1", "cat 0", 2.0), ("cat 0", "cat 1", 4.0), ("cat 2", "cat 1", 6.0)]
    assert pairs.dropped == {"tie": 3, "no score": 1}
    # Rejected ones need no least score: 3 against -1.
    strict = select(rows, 3, "pairs", Rules(min_score=3, ended=True), tokenizer)
    assert [row["margin"] for row in strict.rows] == [4.0, 4.0]
    assert strict.dropped == {"score below 3": 3, "no score": 1, "not ended": 1}
    every = select(rows, 3, "all", Rules(min_score=2, ended=True), tokenizer)
    assert [row["completion_ids"] for row in every.rows] == [[1], [2], [0], [2], [0]]
    assert every.dropped == {"score below 2": 1 + 1 + 3 + 1 + 1, "no score": 2 + 3, "not ended": 4}


def test_rows_that_training_would_refuse_are_left_out(tiny):
    """' c' + 'at' has the tokens of ' cat', so those of the prompt alone are no prefix; two equal texts are no pair."""
    tokenizer = models.load_tokenizer(tiny)
    rows = completions([1.0, 0.0])
    joined = [{**row, "prompt": "the c", "completion": f"at {i}"} for i, row in enumerate(rows)]
    apart = [{**row, "prompt": "the cat", "completion": " sat"} for row in rows]
    assert select(joined + apart, 2, "best", Rules(), tokenizer).dropped == {"prompt is no prefix": 1}
    found = select(joined + apart, 2, "pairs", Rules(), tokenizer)
    assert not found.rows and found.dropped == {"prompt is no prefix": 1, "identical pair": 1}


LONG = "seven small birds " * 90


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": [{"prompt": "a"}, {"prompt": LONG}]},
            r"1 of 2 prompts are too long:\n  .*p\.jsonl:2: the prompt has",
        ),
        ({"prompts": [{"prompt": "a"}, {"prompt": 3}]}, r"p\.jsonl:2: wrong type: `prompt` is a number"),
        ({"prompts": [{"question": "a"}]}, r"p\.jsonl: columns question do not serve"),
        ({"prompts": None}, "give either --prompt TEXT or --prompts FILE"),
        ({"settings": Config(max_new_tokens=256)}, "leaves no room for a prompt in the model's context of 256"),
        ({"settings": Config(temperature=0, num_generations=2)}, "--temperature 0 draws the same 2 times"),
        ({"stop": ("x", "")}, "--stop needs a text"),
        ({"select": "worst"}, "--select worst is unknown; known: all, best, pairs"),
        ({"select": "best"}, "--select best chooses by score: give --score"),
        ({"scores": ("gsm8k",), "select": "pairs"}, "--select pairs writes a data set: give --output"),
        ({"scores": ("gsm8k",)}, "reward 'gsm8k' needs the column 'answer'; there are: .*tone"),
        ({"scores": ("gsm9k",)}, "there is no reward 'gsm9k'.*did you mean gsm8k"),
        ({"scores": ('regex:{"pattern": }',)}, "--score regex.*: the options of regex are no JSON"),
        ({"scores": ("TINY",)}, "a language model; a reward model has a score head"),
        ({"scores": ("OTHER",)}, "the reward model has another tokenizer than the policy: eos_token is"),
        ({"scores": ("json_valid",), "weights": (1.0, 2.0)}, "--score-weight: 2 given for 1 --score"),
        ({"stop_token_ids": (320,)}, "--stop-token-id: 320 is no token id of the model, which has 0 to 319"),
        ({"stop_sequences": ("",)}, "--stop-sequence: a sequence has no tokens"),
        ({"scores": ("json_valid",), "on_error": "zero"}, "--on-score-error zero is unknown; known: raise, none"),
        ({"model": "JUDGE"}, "a reward model, which has no LM head to draw with"),
        ({"output": Path("nowhere/at/all.jsonl")}, "nowhere/at/all.jsonl: there is no folder"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_drawn(changes, message, tiny, judge_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxalign.run.sample.complete", lambda *args, **kwargs: pytest.fail("drawn"))
    folders = {"TINY": str(tiny), "JUDGE": str(judge_folder), "OTHER": str(tmp_path / "other")}
    model, variables = models.load(judge_folder)
    tokenizer = models.load_tokenizer(judge_folder)
    tokenizer.eos_token = "<|endoftext|>"
    models.save(tmp_path / "other", model, variables, tokenizer)
    rows = changes.get("prompts", [{"prompt": "a", "tone": "dry"}])
    changes = {"model": str(tiny), "settings": Config(max_new_tokens=8), **changes}
    changes["prompts"] = None if rows is None else write(tmp_path / "p.jsonl", rows)
    changes["model"] = folders.get(changes["model"], changes["model"])
    changes["scores"] = tuple(folders.get(each, each) for each in changes.get("scores", ()))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sample(Request(**changes))


def test_what_was_drawn_outlives_a_reward_that_fails(tiny, files, drawn, tmp_path, monkeypatch, capsys):
    own = tmp_path / "own.py"
    own.write_text("def bad(prompts, completions, **columns):\n    return [0.0 * float('inf')] * len(prompts)\n")
    output = tmp_path / "out.jsonl"
    request = Request(
        str(tiny), prompts=files["messages"], settings=SETTINGS, scores=(f"{own}:bad",), output=output, select="best"
    )
    with pytest.raises(RewardError, match="reward 'bad', sample 0"):
        sample(request)
    assert not output.exists() and read(tmp_path / "out.unscored.jsonl") == drawn
    assert sample(Request(**{**vars(request), "on_error": "none"})) == []
    monkeypatch.setattr("jaxalign.cli._keep_compiled", lambda: None)
    command = f"jaxalign sample {tiny} --prompt on --max-new-tokens 4 --score {own}:bad --output {output}"
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr().out.replace("\n", "")
    assert end.value.code == 1 and "error: reward 'bad', sample 0" in told and "out.unscored.jsonl" in told


def test_options_of_a_score():
    assert parse_score("gsm8k") == ("gsm8k", {})
    assert parse_score('my/own.py:known:{"scale": {"a": 1}}') == ("my/own.py:known", {"scale": {"a": 1}})


def test_every_command_of_the_docs_runs(tiny, judge_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxalign.cli._keep_compiled", lambda: None)
    rows = (ROOT / "data" / "arithmetic" / "train.jsonl").read_text().splitlines(keepends=True)[:3]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "sampling.md").read_text().replace("\\\n", " ")
    commands = [line for block in blocks(text, "bash") for line in block.splitlines()]
    stand_ins = {"MODEL": str(tiny), "REWARD_MODEL": str(judge_folder), "data/arithmetic/train.jsonl": "prompts.jsonl"}
    written = 0
    for command in commands:
        words = [stand_ins.get(word, word) for word in shlex.split(command)]
        result = CliRunner().invoke(cli.app, words[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        if "--output" in words:
            written += (tmp_path / words[words.index("--output") + 1]).is_file()
    assert len(commands) == 5 and written == 4


def test_samples_are_shown_as_they_are_written(settings):
    settings["train"] |= {"max_steps": 2, "eval_steps": 9}
    settings["log"] = {"sample_steps": 1, "sample_prompts": 2, "sample_max_new_tokens": 4}
    shown = []
    result = run(parse_config(settings), show=lambda step, records: shown.append((step, list(records))))
    assert [step for step, _ in shown] == [1, 2] and len(shown[0][1]) == 2
    assert [{"step": step, **record} for step, records in shown for record in records] == read(
        result.folder / "samples.jsonl"
    )
