"""Rewards by name: registry, module, file, and what each mistake is told."""

import re
from pathlib import Path

import pytest

from jaxalign.rewards import REWARD_FUNCTIONS, call_rewards, load_reward, reward_file
from jaxalign.rewards.contract import option_names

SOURCE = """
from dataclasses import dataclass
from jaxalign.rewards import load_reward

@dataclass
class Setting:
    low: float = 0.0

def close(prompts, completions, answer, *, tolerance=0.5, **columns):
    return [float(abs(float(c) - a) <= tolerance) for c, a in zip(completions, answer)]

def loud(completions, weight=1.0):
    return [weight * c.isupper() for c in completions]

def strange(completions, /):
    return [0.0]

bound = load_reward("regex", {"pattern": "x"})
number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scores.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    return tmp_path


def scores(reward, completions, **columns):
    return call_rewards([reward], completions, completions, columns)[:, 0].tolist()


def test_a_file_from_the_current_folder(folder):
    reward = load_reward("mine/scores.py:close", {"tolerance": 2})
    assert reward.name == reward.__name__ == "close" and reward.required() == ("answer",)
    assert scores(reward, ["1", "5"], answer=[3, 8]) == [1, 0]
    assert scores(load_reward("mine/scores.py:close"), ["1", "5"], answer=[1.5, 6]) == [1, 0]
    assert scores(load_reward("mine/scores.py:loud", {"weight": 3}), ["A", "b"]) == [3, 0]
    assert scores(load_reward("mine/scores.py:bound"), ["x", "y"]) == [1, 0]


def test_a_file_that_is_edited_is_read_again(folder):
    source = folder / "own.py"
    source.write_text("def score(completions, **columns):\n    return [1.0 for _ in completions]\n")
    first = load_reward("own.py:score")
    source.write_text(source.read_text().replace("1.0", "2.0"))
    assert scores(first, ["x"]) == [1] and scores(load_reward("own.py:score"), ["x"]) == [2]


def test_which_rewards_are_named_by_their_file():
    assert reward_file("mine/scores.py:close") == Path("mine/scores.py")
    assert reward_file("gsm8k") is reward_file("a.scores:close") is reward_file("a.scores.close") is None


@pytest.mark.parametrize("name", ["my_scores_package.scores:close", "my_scores_package.scores.close"])
def test_a_module(folder, monkeypatch, name):
    (folder / "mine").rename(folder / "my_scores_package")
    monkeypatch.syspath_prepend(folder)
    assert scores(load_reward(name), ["1"], answer=[1]) == [1]


def test_a_built_in_by_its_name():
    reward = load_reward("overlong", {"max_completion_length": 4, "soft_punish_cache": 2})
    assert reward.name == "overlong" and reward.required() == ("completion_ids",)
    assert load_reward("gsm8k", {"column": "solution"}).required() == ("solution",)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gsmk8", {}, r"no reward 'gsmk8' \(did you mean gsm8k"),
        ("", {}, "no reward ''"),
        ("regex", {"patern": "x"}, r"'regex' has no option 'patern' \(did you mean pattern\?\); known: pattern, flags"),
        ("regex", {}, "'regex' needs the option 'pattern'"),
        ("regex", {"pattern": "("}, r"pattern='\(' is no regular expression"),
        ("regex", {"pattern": "a", "flags": "q"}, "flags='q'"),
        ("no_such_module:score", {}, r"cannot import no_such_module.*file: no_such_module\.py:score"),
        ("nowhere.py:score", {}, r"there is no file .*nowhere\.py"),
        ("broken.py:score", {}, "broken.py cannot be imported: ModuleNotFoundError.*no_such_library"),
        ("mine/scores.py:clsoe", {}, r"has no function 'clsoe' \(did you mean close"),
        ("mine/scores.py:number", {}, "has no function 'number'"),
        ("mine/scores.py:strange", {}, "passed by keyword"),
        ("mine/scores.py:close", {"tolerence": 1}, r"no option 'tolerence' \(did you mean tolerance\?\)"),
        ("mine/scores.py:close", {"answer": 1}, "no option 'answer'; known: tolerance"),
        ("mine/scores.py:bound", {"pattern": "y"}, "already bound"),
        ("length_target", {"target": 0}, "width=0"),
        ("length_target", {"target": 5, "unit": "lines"}, "unit='lines' is unknown; known: tokens, words"),
        ("length_target", {"target": 5, "side": "left"}, "side='left'"),
        ("overlong", {"max_completion_length": 4, "soft_punish_cache": 5}, "soft_punish_cache=5"),
        ("format_tags", {"tags": "think"}, "tags='think'"),
        ("repetition_penalty", {"ngram": 0}, "ngram=0"),
        ("answer_match", {"extract": "box"}, "extract='box' is unknown; known: all, boxed"),
        ("python_tests", {"score": "some"}, "score='some'"),
        ("python_tests", {"seconds": 0}, "seconds=0"),
    ],
)
def test_mistakes(folder, name, options, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name, options)


@pytest.mark.parametrize(
    ("name", "options", "package"),
    [
        ("math_equivalence", {}, "math-verify"),
        ("reasoning_gym", {}, "reasoning-gym"),
        ("json_valid", {"schema": {}}, "jsonschema"),
    ],
)
def test_what_is_not_installed_names_the_extra(monkeypatch, name, options, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"'{name}' needs {package}: pip install -e '\.\[rlvr\]'"):
        load_reward(name, options)


def test_every_built_in_is_documented_with_its_options():
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE))
    assert set(rows) >= set(REWARD_FUNCTIONS)
    for name, factory in REWARD_FUNCTIONS.items():
        named = {option.split("=")[0] for option in re.findall(r"`(\w+(?:=[^`]*)?)`", rows[name].rsplit("|", 1)[-1])}
        assert named == set(option_names(factory)), name
