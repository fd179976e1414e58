"""What the docs name exists: make targets, verbs, options, files, the API; and every setting and metric is in them."""

import ast
import dataclasses
import importlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from typer.core import TyperGroup
from typer.main import get_command

from jaxalign.cli import app
from jaxalign.config import SECTIONS
from jaxalign.data import Filters, MixturePart
from jaxalign.foreign_names import FOREIGN_NAMES
from jaxalign.losses import DIVERGENCES, PREFERENCE_LOSSES, REFERENCE_FREE_LOSSES, UNPAIRED_LOSSES
from jaxalign.methods import METHODS, PRESETS
from jaxalign.methods.common import needs_reference, score_labels, trains_scores
from jaxalign.methods.running import with_carry
from jaxalign.sections import CompareSection
from jaxalign.training.optimizer import Config, make_optimizer
from jaxalign.training.timings import TIMINGS
from tests.layouts import ragged_pairs, ragged_steps, ragged_texts, ragged_thumbs, tiny_model

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "data/**/*.md", "benchmarks/*.md", "launch/*.md")
    for path in ROOT.glob(pattern)
)
LOSSES = {*PREFERENCE_LOSSES, *UNPAIRED_LOSSES}  # named beside `loss`
SHELL = ("bash", "sh", "console")


def blocks(text: str, *languages: str) -> list[str]:
    """Fenced code blocks in one of the languages."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]


def commands(text: str, program: str) -> list[list[str]]:
    """Words after `program` in every shell block's lines and every inline code that is a call of it."""
    fenceless = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = [line for block in blocks(text, *SHELL) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", fenceless)
    calls = [re.sub(r"\s#.*", "", line.removeprefix("$ ")).split() for line in lines]
    return [words[1:] for words in calls if words and words[0].split("/")[-1] == program and len(words) > 1]


def make_problems(text: str) -> list[str]:
    """Targets that the text names and the Makefile lacks."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    words = [word for call in commands(text, "make") for word in call if "=" not in word and not word.startswith("-")]
    return [f"make {word}: no such target" for word in words if word not in targets]


def cli_problems(text: str) -> list[str]:
    """Verbs and options that the text names and the command line lacks."""
    found = []
    for words in commands(text, "jaxalign"):
        command, rest = get_command(app), list(words)
        while rest and isinstance(command, TyperGroup):
            word = rest.pop(0)
            if word not in command.commands:
                found.append(f"jaxalign {' '.join(words)}: no verb {word!r}")
                break
            command = command.commands[word]
        else:
            options = {"--help", *(name for param in command.params for name in param.opts)}
            named = {word.split("=")[0] for word in rest if word.startswith("-")}
            found += [f"jaxalign {' '.join(words)}: no option {name}" for name in sorted(named - options)]
    return found


def path_problems(text: str, folder: Path) -> list[str]:
    """Relative links and named files of the repository that do not exist."""
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (folder / link).exists()]
    named = re.findall(r"\b(?:configs|docs|benchmarks|tests|jaxalign)/[\w./-]*\.(?:yaml|md|py)\b", text)
    return [f"{path}: no such file" for path in [*missing, *(path for path in named if not (ROOT / path).exists())]]


def api_problems(code: str) -> list[str]:
    """Attributes of jaxalign's modules that a Python example uses and that do not exist; nothing is run."""
    tree, known, found = ast.parse(code), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {
                alias.asname or alias.name.split(".")[0]: importlib.import_module(alias.name) for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = importlib.import_module(str(node.module))
                if not hasattr(module, alias.name):
                    found.append(f"from {node.module} import {alias.name}: no such name")
                    continue
                known[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(root := _root(node), ast.Name) and root.id in known:
            value, *path = known[root.id], *ast.unparse(node).split(".")[1:]
            for name in path:
                if not hasattr(value, name):
                    found.append(f"{ast.unparse(node)}: no {name!r}")
                    break
                value = getattr(value, name)
    return found


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the table below a heading."""
    (section,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.M | re.S)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def names(cell: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`]+)`", cell)


def _root(node: ast.expr) -> ast.expr:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node


@pytest.mark.parametrize("path", DOCS)
def test_targets_and_files_exist(path: str):
    text = (ROOT / path).read_text()
    assert not [*make_problems(text), *path_problems(text, (ROOT / path).parent)]


@pytest.mark.parametrize("path", DOCS)
def test_verbs_exist(path: str):
    assert not cli_problems((ROOT / path).read_text())


@pytest.mark.parametrize("path", DOCS)
def test_examples_use_what_exists(path: str):
    assert not [problem for code in blocks((ROOT / path).read_text(), "python") for problem in api_problems(code)]


@pytest.mark.slow
def test_the_example_runs(smollm2: Path):
    (code,) = blocks((ROOT / "README.md").read_text(), "python")
    scope = {}
    exec(code.replace("models/smollm2-135m-instruct.gguf", str(smollm2)), scope)
    # The policy is the reference before its first update: every pair's loss is -log sigmoid(0).
    assert scope["metrics"]["loss"].value() == pytest.approx(math.log(2), abs=1e-5)


def test_the_two_commands_are_in_the_readme():
    named = {call[0] for call in commands((ROOT / "README.md").read_text(), "make")}
    assert {"quickstart", "test", "lint", "parity"} <= named


def test_a_false_doc_is_found():
    assert make_problems("```bash\nmake everything\n```") and make_problems("run `make everything`")
    assert path_problems("see [this](nowhere.md)", ROOT) and path_problems("`configs/no/such.yaml`", ROOT)
    assert api_problems("import jaxalign\njaxalign.models.no_such_thing()")
    assert api_problems("from jaxalign.losses import no_such_loss")


def test_a_false_command_is_found():
    assert cli_problems("```bash\njaxalign fly\n```") and cli_problems("`jaxalign data fly`")
    assert cli_problems("`jaxalign run configs/quickstart.yaml --no-such-option`")


def test_the_layout_is_that_of_the_package():
    text = (ROOT / "docs" / "architecture.md").read_text()
    layout = next(block for block in blocks(text, "") if block.startswith("jaxalign/"))
    modules = {path.name for path in (ROOT / "jaxalign").rglob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\w+\.py", layout)) == modules


def settings() -> dict[str, dict[str, str]]:
    """Default of every key by section, as docs/configuration.md writes it."""
    sections = {name: kind for name, kind in SECTIONS.items() if name != "ptx_data"}  # its keys are those of `data`
    kinds = {**sections, "compare": CompareSection, "mixture": MixturePart, "filters": Filters}
    kinds |= {name: method.Config for name, method in METHODS.items()}
    found = {name: {field.name: _default(field) for field in dataclasses.fields(kind)} for name, kind in kinds.items()}
    rates = (f"`{method.LEARNING_RATE}` (`{name}`)" for name, method in METHODS.items())
    return {**found, "optimizer": {**found["optimizer"], "learning_rate": ", ".join(rates)}}


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(field.default_factory())}`"
    return "required" if field.default is dataclasses.MISSING else "`{}`".format(json.dumps(field.default).strip('"'))


@pytest.mark.parametrize(("section", "defaults"), settings().items(), ids=settings().keys())
def test_every_setting_is_documented_with_its_default(section: str, defaults: dict[str, str]):
    rows = table((ROOT / "docs" / "configuration.md").read_text(), f"`{section}`")
    assert {names(key)[0]: default for key, default, _ in rows} == defaults


def test_foreign_names_are_documented():
    rows = table((ROOT / "docs" / "configuration.md").read_text(), "Keys of other trainers")
    assert {name for theirs, _ in rows for name in names(theirs)} == set(FOREIGN_NAMES)


@pytest.mark.parametrize(
    ("method", "examples"),
    [
        ("sft", ragged_texts),
        ("preference", ragged_pairs),
        ("reference_free", ragged_pairs),
        ("reward", ragged_pairs),
        ("process_reward", ragged_steps),
        ("unpaired_preference", ragged_thumbs),
    ],
)
def test_every_metric_is_documented(method: str, examples: Callable):
    text = (ROOT / "docs" / "metrics.md").read_text()
    shared, own = table(text, "Every method"), table(text, f"`{method}`")
    settings = [{}, *(preset for name, preset in PRESETS.values() if name == method)]
    seen = {name for each in settings for name in logged(METHODS[method], METHODS[method].Config(**each), examples(2))}
    losses = {*PREFERENCE_LOSSES, *REFERENCE_FREE_LOSSES, *UNPAIRED_LOSSES}
    assert {name for row in shared + own for name in names(row[0]) if name not in losses} == {
        *seen,
        *("epoch", "num_tokens"),
    }


def test_every_method_and_preset_is_in_the_guide():
    text = (ROOT / "docs" / "methods.md").read_text()
    rows = [set(names(line.split("|")[1])) for line in text.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in row}
    assert listed >= METHODS.keys() | PRESETS.keys()
    configuration = (ROOT / "docs" / "configuration.md").read_text()
    for name in {*PREFERENCE_LOSSES, *REFERENCE_FREE_LOSSES, *DIVERGENCES}:
        assert f"`{name}`" in configuration, name
        assert f"`{name}`" in (ROOT / "docs" / "metrics.md").read_text() or name in DIVERGENCES, name


def test_every_timing_is_documented():
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert {f"`{name}`" for name in TIMINGS} <= set(re.findall(r"`[^`\n]+`", text))


def logged(method: Any, config: Any, examples: list) -> set[str]:
    """Names of a step's metrics."""
    heads: dict[str, Any] = {}
    if trains_scores(method):
        heads = {"lm_head": False, "score_head": True, "score_labels": score_labels(method)}
    model, variables = tiny_model(num_layers=1, windows=(9,), **heads)
    optimizer, schedule = make_optimizer(Config(), 1)

    def step(variables):
        batch = method.make_batch(config, examples)
        if needs_reference(method, config):
            batch = method.make_reference(config, model)(variables, batch)
        batch = with_carry(method, config, batch)
        state, frozen = method.init(config, model, variables, optimizer, jax.random.key(0))
        return method.make_step(config, model, optimizer, schedule)(state, frozen, batch)[1]

    return set(jax.eval_shape(step, variables))
