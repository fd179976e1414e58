"""Which backend, why, and what to install: on machines made of a few files."""

import os
from pathlib import Path

import pytest

from jaxalign.run.backend import Machine, describe, describe_backend, probe

PLUGINS = ("cuda12", "tpu")


def machine(root: Path, devices: list[tuple[str, str, str]], files: tuple[str, ...] = ()) -> Path:
    """A root folder with PCI devices (vendor, device, class) and files."""
    for number, device in enumerate(devices):
        folder = root / f"sys/bus/pci/devices/0000:00:{number:02x}.0"
        folder.mkdir(parents=True)
        for name, value in zip(("vendor", "device", "class"), device, strict=True):
            (folder / name).write_text(f"{value}\n")
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def tool(folder: Path, text: str) -> dict[str, str]:
    """An environment whose nvidia-smi is this shell script."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{folder}:{os.defpath}"}


def test_tpu_chips_are_told_from_google_network_cards(tmp_path):
    chip, card = ("0x1ae0", "0x0063", "0xff0000"), ("0x1ae0", "0x0042", "0x020000")
    found = probe(machine(tmp_path, [chip, card, chip, chip, chip]), {"PATH": ""})
    assert (found.tpus, found.tpu, found.nvidia) == (4, "v5e", "")


def test_a_gpu_shows_by_its_tool_its_file_or_its_slot(tmp_path):
    root = machine(tmp_path / "root", [("0x10de", "0x2330", "0x030200")], ("dev/nvidiactl",))
    answers = tool(tmp_path / "bin", "echo 'NVIDIA H200, 570.86.15'; echo 'NVIDIA H200, 570.86.15'")
    silent = tool(tmp_path / "silent", "echo 'no devices were found'; exit 6")
    assert probe(root, answers) == Machine("NVIDIA H200", "570.86.15", plugins=probe(root, {}).plugins)
    assert (probe(root, silent).nvidia, probe(root, silent).driver) == ("/dev/nvidiactl", None)
    slot = machine(tmp_path / "slot", [("0x10de", "0x2330", "0x030200"), ("0x10de", "0x10f8", "0x040300")])
    assert probe(slot, {"PATH": ""}).nvidia == "a PCI device"
    sound_alone = machine(tmp_path / "sound", [("0x10de", "0x10f8", "0x040300")])
    assert not probe(sound_alone, {"PATH": ""}).nvidia


@pytest.mark.parametrize(
    ("shown", "forced", "told"),
    [
        (Machine(), None, ["no GPU and no TPU"]),
        (Machine(nvidia="H200", driver="570.1"), None, ["(H200)", "pip install -e '.[cuda]'"]),
        (Machine(nvidia="/dev/nvidia0", plugins=PLUGINS), None, ["nvidia-smi does not answer", "--gpus all"]),
        (Machine(nvidia="K80", driver="470.2", plugins=PLUGINS), None, ["470.2 is too old", "525 or later"]),
        (
            Machine(nvidia="L4", driver="570.1", plugins=("cuda13",)),
            None,
            ["for CUDA 13", "580 or later", "pip install -e '.[cuda]'"],
        ),
        (Machine(nvidia="K80", driver="470.2", plugins=("cuda13",)), None, ["for CUDA 13: install 580 or later)"]),
        (Machine(nvidia="L4", driver="570.1", plugins=("cuda12", "cuda13")), None, ["did not start"]),
        (Machine(nvidia="H200", driver="570.1", plugins=PLUGINS), None, ["did not start", "CUDA_VISIBLE_DEVICES"]),
        (Machine(tpus=4, tpu="v5e"), None, ["4 × v5e", "pip install -e '.[tpu]'"]),
        (Machine(tpus=4, tpu="v5e", plugins=PLUGINS), None, ["another process holds it"]),
        (Machine(tpu="TPU_WORKER_HOSTNAMES is set"), None, [".[tpu]"]),
        (Machine(amd=1), None, ["ROCm"]),
        (Machine(nvidia="H200", driver="570.1", plugins=PLUGINS), "cpu", ["jax_platforms=cpu", "unset JAX_PLATFORMS"]),
    ],
)
def test_why_it_is_the_cpu(shown: Machine, forced: str | None, told: list[str]):
    text = describe("cpu", "cpu", 1, 1, forced, shown)
    assert text.startswith("cpu: 1 CPU device(s) (")
    assert all(part in text for part in told), text


def test_an_accelerator_needs_no_advice():
    text = describe("tpu", "TPU v5p", 16, 4, None, Machine())
    assert text == "tpu: 16 × TPU v5p in 4 processes (the first accelerator that jax found)"


def test_here():
    assert describe_backend().startswith("cpu: 8 CPU device(s) (chosen by jax_platforms=cpu")
