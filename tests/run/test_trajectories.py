"""Guarantee 2 over whole trainings: processes and meshes change neither losses nor what is drawn, in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.together import run_together

METHODS = ["sft", "dpo", "grpo", "ppo"]
# As in `tests/compiling.py`: what is compared are sums, not speed.
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
MESHES = {
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "context": {"data": 4, "context": 2},
}


def case(mesh: dict[str, int], methods: list[str] = METHODS, steps: int = 10, sparse: bool = False) -> dict[str, Any]:
    return {"mesh": mesh, "methods": methods, "steps": steps, "sparse": sparse}


def trained(processes: int, devices: int, path: Path, *cases: dict[str, Any]) -> list[dict[str, Any]]:
    """What `tests/run/trajectories.py` finds with so many processes and devices of each, case by case."""
    run_together("tests.run.trajectories", processes, devices, json.dumps(cases), path, flags=FLAGS)
    return json.loads(path.read_text())


def assert_same(found: dict[str, Any], expected: dict[str, Any], steps: int) -> None:
    """Losses to 1e-9 relative, tokens exactly; and there is something to compare."""
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = found[name]
        assert len(theirs["losses"]) == steps and len(set(theirs["losses"])) == steps, name
        np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-9, atol=1e-12, err_msg=name)
        assert ours["tokens"] == theirs["tokens"], name
        assert (len({json.dumps(each) for each in theirs["tokens"]}) > 1) == (name in ("grpo", "ppo"))


@pytest.mark.slow
def test_two_processes_draw_and_learn_as_one_does(tmp_path):
    """The representative of the tests below."""
    short = {"methods": ["grpo"], "steps": 3}
    (expected,) = trained(1, 2, tmp_path / "1.json", case({"data": 2}, **short))
    (found,) = trained(2, 1, tmp_path / "2.json", case({"data": 2}, **short))
    assert_same(found, expected, 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Any]:
    """All methods on one process with eight devices."""
    return trained(1, 8, tmp_path_factory.mktemp("whole") / "whole.json", case({"data": 8}))[0]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 4), (4, 2)])
def test_processes_change_neither_losses_nor_tokens(processes, devices, whole, tmp_path):
    (found,) = trained(processes, devices, tmp_path / "found.json", case({"data": 8}))
    assert_same(found, whole, 10)


@pytest.mark.slow
def test_every_mesh_axis_changes_neither_losses_nor_tokens(whole, tmp_path):
    found = trained(1, 8, tmp_path / "found.json", *(case(mesh) for mesh in MESHES.values()))
    for each in found:
        assert_same(each, whole, 10)


@pytest.mark.slow
def test_so_does_the_axis_of_experts(tmp_path):
    """In one process and in two, on a model with experts."""
    split = case({"data": 4, "expert": 2}, sparse=True)
    expected, found = trained(1, 8, tmp_path / "1.json", case({"data": 8}, sparse=True), split)
    assert_same(found, expected, 10)
    (found,) = trained(2, 4, tmp_path / "2.json", split)
    assert_same(found, expected, 10)
