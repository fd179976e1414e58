"""Which backend computes and why; and what to install where the machine has an accelerator that jax does not see."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxalign.extras import install

# Google's PCI devices that are TPU chips; the same vendor makes network cards.
GOOGLE, NVIDIA, AMD = "0x1ae0", "0x10de", "0x1002"
TPUS = {
    "0x0027": "v2 or v3",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "7x",
}
DISPLAY = ("0x0300", "0x0302", "0x0380", "0x1200")  # PCI classes of graphics cards and processing accelerators
NVIDIA_FILES = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")
PLUGINS = {"cuda12": "jax_cuda12_plugin", "cuda13": "jax_cuda13_plugin", "tpu": "libtpu"}
OLDEST_DRIVERS = {"cuda12": 525, "cuda13": 580}  # that this CUDA runs with


@dataclass(frozen=True)
class Machine:
    """Accelerators that the machine shows, whether jax can use them or not.

    Attributes:
      nvidia: what shows an NVIDIA GPU (`NVIDIA H200`, `/dev/nvidia0`, `a PCI device`); empty without one.
      driver: version of its driver, as nvidia-smi says; None where that is not known.
      tpus: TPU chips.
      tpu: their generation, or what else shows a TPU; empty without one.
      amd: GPUs of AMD.
      plugins: which of jax's plugins are installed, keys of `PLUGINS`.
    """

    nvidia: str = ""
    driver: str | None = None
    tpus: int = 0
    tpu: str = ""
    amd: int = 0
    plugins: tuple[str, ...] = ()


def probe(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> Machine:
    """Looks at PCI devices, device files, `nvidia-smi` and the environment; starts no backend.

    Args:
      root: of the file system.
      environment: `os.environ`.
    """
    environment = os.environ if environment is None else environment
    found = _pci(root)
    chips = [TPUS[device] for vendor, device, _ in found if vendor == GOOGLE and device in TPUS]
    tpu = chips[0] if chips else "TPU_WORKER_HOSTNAMES is set" if environment.get("TPU_WORKER_HOSTNAMES") else ""
    name, driver = _nvidia_smi(environment)
    files = next((f"/{file}" for file in NVIDIA_FILES if (root / file).exists()), "")
    cards = [vendor for vendor, _, kind in found if kind.startswith(DISPLAY)]
    return Machine(
        nvidia=name or files or ("a PCI device" if NVIDIA in cards else ""),
        driver=driver,
        tpus=len(chips),
        tpu=tpu,
        amd=cards.count(AMD),
        plugins=tuple(each for each, module in PLUGINS.items() if importlib.util.find_spec(module)),
    )


def tpu_chips() -> int:
    """TPU chips of this machine that jax can use: 0 without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        return 0
    return sum(vendor == GOOGLE and device in TPUS for vendor, device, _ in _pci(Path("/")))


def describe_backend(machine: Machine | None = None) -> str:
    """One line: platform, devices, processes, and why it is this one."""
    devices, forced = jax.devices(), jax.config.values["jax_platforms"]
    machine = probe() if machine is None and devices[0].platform == "cpu" else machine or Machine()
    return describe(devices[0].platform, devices[0].device_kind, len(devices), jax.process_count(), forced, machine)


def describe(platform: str, kind: str, devices: int, processes: int, forced: str | None, machine: Machine) -> str:
    """`describe_backend` of what is given.

    Args:
      platform: `cpu`, `gpu` or `tpu`.
      kind: of the devices.
      devices: their number, over all processes.
      processes: number of processes.
      forced: jax's setting jax_platforms.
      machine: what the machine shows.
    """
    count = f"{devices} CPU device(s)" if platform == "cpu" else f"{devices} × {kind}"
    if processes > 1:
        count += f" in {processes} processes"
    if forced:
        why = f"chosen by jax_platforms={forced}"
        if platform == "cpu" and (machine.nvidia or machine.tpu):
            why += f", though there is {_accelerator(machine)}: unset JAX_PLATFORMS to use it"
    elif platform != "cpu":
        why = "the first accelerator that jax found"
    else:
        why = _why_cpu(machine)
    return f"{platform}: {count} ({why})"


def _why_cpu(machine: Machine) -> str:
    if machine.tpu:
        if "tpu" not in machine.plugins:
            return f"there is {_accelerator(machine)}, but not libtpu: {install('tpu')}"
        return (
            f"there is {_accelerator(machine)} and libtpu, but jax did not get it: another process holds it (one at a "
            "time; `sudo lsof /dev/accel* /dev/vfio/*` shows it), or libtpu is too old: " + install("tpu", upgrade=True)
        )
    if machine.nvidia:
        cudas = [each for each in OLDEST_DRIVERS if each in machine.plugins]
        if not cudas:
            return f"there is {_accelerator(machine)}, but not jax's CUDA plugin: {install('cuda')}"
        if machine.driver is None:
            return (
                f"there is {_accelerator(machine)} and jax's CUDA plugin, but nvidia-smi does not answer: install or "
                "load the NVIDIA driver; in a container, start it with the GPU (docker run --gpus all)"
            )
        if all(_major(machine.driver) < OLDEST_DRIVERS[each] for each in cudas):
            return _too_old(machine.driver, cudas[0])
        return (
            f"there is {_accelerator(machine)} and jax's CUDA plugin, but it did not start: see the warnings above; "
            "CUDA_VISIBLE_DEVICES may hide the GPU, LD_LIBRARY_PATH may bring another CUDA, and plugin and jax must "
            "have one version: " + install("cuda", upgrade=True)
        )
    if machine.amd:
        return "there is a GPU of AMD: see jax's installation guide for ROCm; jaxalign has no extra for it"
    return "this machine shows no GPU and no TPU"


def _accelerator(machine: Machine) -> str:
    if machine.tpu:
        return f"a TPU ({machine.tpus} × {machine.tpu})" if machine.tpus else f"a TPU ({machine.tpu})"
    return f"an NVIDIA GPU ({machine.nvidia})"


def _pci(root: Path) -> list[tuple[str, str, str]]:
    """Vendor, device and class of every PCI device."""
    found = []
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            found.append(tuple((folder / name).read_text().strip() for name in ("vendor", "device", "class")))
        except OSError:
            continue
    return found


def _nvidia_smi(environment: Mapping[str, str]) -> tuple[str, str | None]:
    """Name and driver of the first GPU; nothing where nvidia-smi is not there or does not answer."""
    tool = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if tool is None:
        return "", None
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "", None
    name, comma, driver = answer.partition("\n")[0].rpartition(",")
    return (name.strip(), driver.strip()) if comma else ("", None)


def _too_old(driver: str, cuda: str) -> str:
    name = f"CUDA {cuda.removeprefix('cuda')}"
    told = f"the NVIDIA driver {driver} is too old for {name}: install {OLDEST_DRIVERS[cuda]} or later"
    older = _major(driver) >= OLDEST_DRIVERS["cuda12"]
    return f"{told}, or in place of jax's plugin for {name} that for CUDA 12: {install('cuda')}" if older else told


def _major(version: str) -> int:
    first = version.split(".")[0]
    return int(first) if first.isdecimal() else max(OLDEST_DRIVERS.values())
