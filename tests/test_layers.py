"""The import order and the one door per library, read from the source with `ast`."""

import ast
import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxalign"

# Lowest first. A module imports from stages below its own and from its own package.
ORDER = (
    ("types", "extras"),
    ("placing",),
    ("packing",),
    ("losses", "sharding", "exchange", "buckets", "files"),
    ("models",),
    ("sampling",),
    ("data",),
    ("rewards",),
    ("training",),
    ("methods",),
    ("evaluation",),
    ("sections", "foreign_names"),
    ("config",),
    ("run",),
    ("planning", "verify", "report", "display"),
    ("plan_command",),
    ("cli",),
    ("__main__",),
)
STAGES = {name: stage for stage, names in enumerate(ORDER) for name in names}
ONLY = {"training": {"types", "extras", "sharding", "exchange", "files"}}
NEVER = {"methods": {"training.checkpoint", "training.metrics"}}
DOORS = {
    "flax": ("models/",),
    "orbax": ("training/checkpoint.py",),
    "yaml": ("config.py",),
    "pydantic": ("config.py",),
    "transformers": ("models/pretrained.py", "data/"),
    "tensorboardX": ("training/metrics.py",),
    "wandb": ("training/metrics.py",),
    "torch": (),
    "trl": (),
    "tensorflow": (),
}
LINES = 380
# Not imported by name: transformers renders chat templates with it.
INDIRECT = {"jinja2"}

SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(path: str, source: str) -> list[tuple[int, str]]:
    """Line and absolute dotted name of every import in a module, those inside functions included.

    `from a import b` gives `a.b`, whether b is a module or not; a literal handed to `import_module` counts too.
    """
    package = ["jaxalign", *Path(path).parent.parts]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            found += [(node.lineno, name) for name in names if isinstance(name, str)]
    return found


def stage_name(path: str) -> str:
    """The package or module right below jaxalign that a path belongs to."""
    return path.split("/")[0].removesuffix(".py")


def order_problem(path: str, target: str) -> str | None:
    """Why `jaxalign/<path>` may not import `target`, a dotted name below jaxalign; None where it may."""
    own = stage_name(path)
    first, *rest = target.split(".")
    if own == "__init__" or own not in STAGES:
        return None
    if first not in STAGES:
        return f"imports jaxalign.{target}, which has no place in the import order"
    if first == own:
        barred = {name for names in NEVER.values() for name in names}
        leaks = path == f"{own}/__init__.py" and any(f"{target}.".startswith(f"{name}.") for name in barred)
        return f"{own} re-exports {target}, which not everyone who imports {own} may import" if leaks else None
    if STAGES[first] >= STAGES[own]:
        return f"{own} imports {first}, which is not below it"
    if own in ONLY and first not in ONLY[own]:
        return f"{own} imports {first}; it may import {', '.join(sorted(ONLY[own]))} only"
    barred = NEVER.get(own, set())
    if any(f"{target}.".startswith(f"{name}.") for name in barred):
        return f"{own} imports {target}"
    if not rest and any(name.startswith(f"{first}.") for name in barred):
        return f"{own} imports the whole of {first}; name the module, so that {', '.join(sorted(barred))} stay out"
    return None


def door_problem(path: str, target: str) -> str | None:
    """Why `jaxalign/<path>` may not import the library of `target`; None where it may."""
    library = target.split(".")[0]
    doors = DOORS.get(library)
    if doors is None or any(path == door or (door.endswith("/") and path.startswith(door)) for door in doors):
        return None
    return f"imports {library}, whose place is {', '.join(doors) or 'outside the package'}"


def problems(path: str, source: str) -> list[str]:
    """Every violation in one module; `path` is relative to `jaxalign/`."""
    found = []
    if stage_name(path) not in {*STAGES, "__init__"}:
        found.append(f"jaxalign/{path}: has no place in the import order")
    for line, name in imports(path, source):
        inside = name.removeprefix("jaxalign.") if name.startswith("jaxalign.") else None
        if name == "jaxalign":
            problem = "imports the whole of jaxalign; name the module"
        else:
            problem = order_problem(path, inside) if inside else door_problem(path, name)
        found += [f"jaxalign/{path}:{line}: {problem}"] if problem else []
    if path != "cli.py":
        found += [
            f"jaxalign/{path}:{node.lineno}: prints; return the value or log it"
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
    lines = source.count("\n")
    return [*found, *([f"jaxalign/{path}: {lines} lines, more than {LINES}"] if lines > LINES else [])]


@pytest.mark.parametrize("path", SOURCES)
def test_layers(path: str):
    assert not problems(path, (PACKAGE / path).read_text())


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("types.py", "from jaxalign.packing import pack"),
        ("packing.py", "import jaxalign.losses.tokens"),
        ("losses/kl.py", "from jaxalign import sharding"),
        ("sharding.py", "from jaxalign.losses.kl import kl"),
        ("models/transformer.py", "def build():\n    from jaxalign.sampling import generate"),
        ("models/transformer.py", "from ..data import chat"),
        ("models/transformer.py", "from .. import data"),
        ("sampling/generate.py", "if TYPE_CHECKING:\n    import jaxalign.data.chat as chat"),
        ("data/chat.py", "importlib.import_module('jaxalign.rewards')"),
        ("training/step.py", "from jaxalign.models import Model"),
        ("training/step.py", "from jaxalign.packing import pack"),
        ("methods/sft.py", "from jaxalign.training import checkpoint"),
        ("methods/sft.py", "from jaxalign.training.checkpoint import save"),
        ("methods/sft.py", "import jaxalign.training.metrics"),
        ("methods/sft.py", "from jaxalign import training"),
        ("training/__init__.py", "from jaxalign.training.checkpoint import save"),
        ("methods/sft.py", "from jaxalign.evaluation import evaluate"),
        ("evaluation/losses.py", "from jaxalign.config import RunConfig"),
        ("config.py", "from jaxalign.run import run"),
        ("run.py", "from jaxalign import cli"),
        ("verify.py", "from jaxalign.report import write"),
        ("methods/sft.py", "import jaxalign"),
        ("methods/sft.py", "from jaxalign.helpers import thing"),
        ("helpers.py", "import numpy"),
        ("helpers.py", "from jaxalign import types"),
        ("training/state.py", "from flax import struct"),
        ("run.py", "import orbax.checkpoint as ocp"),
        ("training/loop.py", "def save():\n    import orbax.checkpoint"),
        ("models/config.py", "import yaml"),
        ("methods/sft.py", "import pydantic"),
        ("models/gguf.py", "from transformers import PreTrainedTokenizerFast"),
        ("database.py", "import transformers"),
        ("run.py", "from tensorboardX import SummaryWriter"),
        ("training/loop.py", "import wandb"),
        ("models/pretrained.py", "import torch"),
        ("run.py", "print('hello')"),
        ("run.py", "x = 1\n" * (LINES + 1)),
    ],
)
def test_a_violation_is_found(path: str, source: str):
    assert problems(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("methods/sft.py", "from jaxalign.training import step\nfrom jaxalign.training.state import TrainState"),
        ("methods/sft.py", "from jaxalign import losses, models, packing, types\nfrom . import preference"),
        ("training/loop.py", "from jaxalign.types import Metrics\nfrom .step import make_step\nimport jax"),
        ("training/checkpoint.py", "import orbax.checkpoint as ocp"),
        ("models/gguf.py", "import gguf\nfrom jaxalign.sharding import param_specs\nfrom flax import linen"),
        ("data/tokenizer.py", "import transformers"),
        ("config.py", "import pydantic, yaml\nfrom jaxalign.methods import METHODS"),
        ("run.py", "from jaxalign.training import checkpoint, metrics"),
        ("cli.py", "print('hello')\nfrom jaxalign.run import run"),
        ("__init__.py", "from jaxalign import models"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str):
    assert not problems(path, source)


def test_dependencies_are_those_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for extra in ("wandb", "rlvr", "zstd") for line in project["optional-dependencies"][extra]]
    required, extras = ({_distribution(line) for line in lines} for lines in (project["dependencies"], optional))
    owners = packages_distributions()
    imported = set()
    for path in SOURCES:
        for _, name in imports(path, (PACKAGE / path).read_text()):
            imported |= {_distribution(owner) for owner in owners.get(name.split(".")[0], [])}
    imported -= {"jaxalign"}
    assert not imported - required - extras, "imported, not declared"
    assert not required - imported - INDIRECT, "declared, never imported"


def _distribution(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]).lower()
