"""What the docs name exists: make targets, CLI verbs and options, files, and the API in Python examples."""

import ast
import importlib
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
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
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    words = [word for call in commands(text, "make") for word in call if "=" not in word and not word.startswith("-")]
    return [f"make {word}: no such target" for word in words if word not in targets]


def cli_problems(text: str) -> list[str]:
    """Verbs and options that the text names and the command line lacks."""
    from jaxalign.cli import app
    from typer.core import TyperGroup
    from typer.main import get_command

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
    tree, names, found = ast.parse(code), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.split(".")[0]: importlib.import_module(alias.name) for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = importlib.import_module(str(node.module))
                if not hasattr(module, alias.name):
                    found.append(f"from {node.module} import {alias.name}: no such name")
                    continue
                names[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(root := _root(node), ast.Name) and root.id in names:
            value, *path = names[root.id], *ast.unparse(node).split(".")[1:]
            for name in path:
                if not hasattr(value, name):
                    found.append(f"{ast.unparse(node)}: no {name!r}")
                    break
                value = getattr(value, name)
    return found


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
    names = {}
    exec(code.replace("models/smollm2-135m-instruct.gguf", str(smollm2)), names)
    # The policy is the reference before its first update: every pair's loss is -log sigmoid(0).
    assert names["metrics"]["loss"].value() == pytest.approx(math.log(2), abs=1e-5)


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
