"""Configs near one that does not fit: what `run` would refuse is none of them, and what fits was compiled."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from jaxalign.methods.offline import check_split
from jaxalign.planning import neighbour_line, plan_stage, what_fits
from jaxalign.planning.neighbours import neighbours
from jaxalign.planning.plan import Plan, changed
from jaxalign.planning.targets import Chip
from jaxalign.sharding import AXES
from tests.planned import offline, online, stage_of

RULE = {"rewards": [{"name": "regex", "options": {"pattern": "a"}}]}


@dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def hosts(count: int, each: int) -> list[Any]:
    """Devices of several hosts."""
    return [Device(i, i // each) for i in range(count * each)]


def short(stage, devices, mesh, *failed, slices=1) -> Plan:
    """A plan in which these programs do not fit."""
    programs = [SimpleNamespace(name=name, fits=False, memory=SimpleNamespace(models=1)) for name in failed]
    sizes = dict.fromkeys(AXES, 1) | mesh
    return Plan(
        "stage", "target", len(devices), 2, slices, "cpu", sizes, Chip(1.0), (1, 1, 1), (), cast(Any, programs), 1, 0.4
    )


def test_processes_share_what_they_can():
    """Two hosts of four devices: as `run` checks it, whoever plans."""

    def mesh(**sizes):
        shape = dict.fromkeys(AXES, 1) | sizes
        return cast(Any, SimpleNamespace(devices=np.array(hosts(2, 4)).reshape(tuple(shape.values())), shape=shape))

    check_split(mesh(fsdp=2, tensor=4), 2)
    with pytest.raises(
        ValueError, match=r"train\.micro_batch_size=3 must be a multiple of the number of processes \(2"
    ):
        check_split(mesh(fsdp=8), 3)
    with pytest.raises(ValueError, match="mesh: data × fsdp × expert = 1 must be a multiple of the 2 processes"):
        check_split(mesh(tensor=8), 2)


def test_only_what_the_hosts_can_share_is_offered(bare, tmp_path):
    settings = offline(bare, {"name": "sft"}, batch_size=32, micro_batch_size=32)
    settings["mesh"] = {"data": 2, "fsdp": 16}
    stage, devices = stage_of(tmp_path, settings), hosts(8, 4)
    offered = list(neighbours(stage, short(stage, devices, settings["mesh"], "train step"), devices))
    assert offered[0] == {"mesh.data": 1, "mesh.fsdp": 32}
    # No micro-batch below the eight hosts, and no rows that two hosts share: not eight devices of `tensor`.
    assert {each.get("mesh.tensor") for each in offered} == {None, 2, 4}
    least = stage_of(tmp_path, {**settings, "train": {**settings["train"], "batch_size": 24, "micro_batch_size": 24}})
    micro = [
        each.get("train.micro_batch_size")
        for each in neighbours(least, short(least, devices, settings["mesh"], "train step"), devices)
    ]
    assert set(micro) == {None}


def test_a_rollout_that_does_not_fit_gets_a_mesh_of_its_own(bare, tmp_path):
    stage, devices = stage_of(tmp_path, online(bare, {"name": "grpo"}, rollout=RULE)), hosts(2, 4)
    plan = short(stage, devices, {"data": 1, "fsdp": 8}, "decoding copy", "rollout")
    offered = list(neighbours(stage, plan, devices))
    assert [each.get("rollout.mesh.tensor") for each in offered[:3]] == [2, 4, 8]
    assert {"rollout.slots": 64} in offered
    assert not any("model.remat" in each or "train.micro_batch_size" in each for each in offered)
    drawn = changed(stage, offered[1]).rollout.mesh
    assert drawn is not None and (drawn.data, drawn.tensor) == (-1, 4)


@pytest.mark.parity
@pytest.mark.usefixtures("libtpu")
def test_a_plan_refuses_what_the_run_refuses(bare, tmp_path):
    settings = offline(bare, {"name": "preference"}, batch_size=8, micro_batch_size=8)
    stage = stage_of(tmp_path, {**settings, "mesh": {"data": 1, "fsdp": 1, "tensor": 8}})
    with pytest.raises(ValueError, match="mesh: data × fsdp × expert = 1 must be a multiple of the 2 processes"):
        plan_stage(stage, "v5p:2x2x2")
    odd = stage_of(tmp_path, offline(bare, {"name": "preference"}, batch_size=9, micro_batch_size=3))
    with pytest.raises(ValueError, match=r"must be a multiple of the number of processes \(2\)"):
        plan_stage(odd, "v5p:2x2x2")
    # A TPU's host has memory apart, to which a reference may go.
    stage = stage_of(tmp_path, settings)
    plan = plan_stage(stage, "v5p:2x2x2", chip=Chip(1.0))
    assert (plan.devices, plan.hosts, plan.fits) == (8, 2, False)
    told = what_fits(stage, plan, "v5p:2x2x2", most=2)
    assert told[1].changes == {"mesh.data": 1, "mesh.fsdp": 8, "model.offload_reference": True}
    near = told[1].plan
    assert near is not None and max(each.memory.models for each in near.programs) == 0


def test_a_suggestion_is_compiled(bare, tmp_path):
    """The first neighbour does not fit the same small devices either; the second does, and there it ends."""
    settings = offline(bare, {"name": "sft"}, batch_size=32, micro_batch_size=32)
    settings["model"]["remat"] = "none"
    stage = stage_of(tmp_path, settings)
    plan = plan_stage(stage)
    full, whole = {"model.remat": "full"}, {"model.remat": "full", "mesh.data": 1, "mesh.fsdp": 8}
    peaks = [plan_stage(changed(stage, each)).peak for each in (full, whole)]
    assert plan.peak > peaks[0] > peaks[1]
    chip = replace(plan.chip, memory=sum(peaks) / 2)
    told = []
    found = what_fits(stage, plan_stage(stage, chip=chip), None, tell=told.append)
    assert told == found
    assert [(each.changes, each.fits) for each in found] == [(full, False), (whole, True)]
    assert [each.plan and each.plan.peak for each in found] == peaks


@pytest.mark.slow
def test_the_walk_goes_on_past_what_run_refuses(bare, tmp_path, monkeypatch):
    stage = stage_of(tmp_path, offline(bare, {"name": "sft"}))
    plan = plan_stage(stage)
    walk = [{"mesh.data": 3}, {"train.micro_batch_size": 16}]
    monkeypatch.setattr("jaxalign.planning.neighbours.neighbours", lambda *given: iter(walk))
    refused, taken = what_fits(stage, plan, None)
    assert (refused.plan, refused.fits, taken.fits) == (None, False, True)
    assert refused.refused.startswith("mesh: data=3 fsdp=4 tensor=1 needs 12 devices")
    assert neighbour_line(refused) == f"  mesh.data=3: {refused.refused}"
    assert what_fits(stage, plan, None, most=1)[0].plan is None
