"""Devices that a plan is for: a TPU slice that is not here, or this machine's; and what they can do."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from jaxalign.extras import install
from jaxalign.run.hardware import peak_of

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What one device can do at best; None = not known.

    Attributes:
      memory: bytes that a program may use.
      flops: bfloat16 FLOP/s.
      bandwidth: bytes/s between its memory and its cores.
      links: bytes/s that it can send to its neighbours, one direction, all links together.
    """

    memory: float
    flops: float | None = None
    bandwidth: float | None = None
    links: float | None = None


# Device kind -> the device. FLOP/s, bandwidths and links are from Google Cloud's page of each TPU version
# (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x), the links half of the bidirectional figure; memory is what
# the compiler says it has, somewhat less than the chip. TPU v4 and TPU7x are two devices per chip.
TPUS = {
    "TPU v4": Chip(15.25 * GIB, 137.5e12, 614e9, 150e9),
    "TPU v5 lite": Chip(15.75 * GIB, 197e12, 819e9, 200e9),
    "TPU v5": Chip(95.74 * GIB, 459e12, 2765e9, 600e9),
    "TPU v6 lite": Chip(31.25 * GIB, 918e12, 1638e9, 400e9),
    "TPU7x": Chip(94.75 * GIB, 1153.5e12, 3690e9, 300e9),
}
KNOWN = "v4:2x2x1, v5e:2x4, v5p:2x2x2, v6e:4x8, tpu7x:2x2x1"


def find_devices(topology: str | None) -> list[Any]:
    """The devices of a TPU slice that need not be here, or this machine's.

    Args:
      topology: version and shape, for example `v5p:4x4x4`; None for this machine.

    Raises:
      ValueError: there is no such topology, or libtpu is not installed.
    """
    if topology is None:
        return jax.devices()
    if not re.fullmatch(r"\w+:\d+(x\d+)*", topology):
        raise ValueError(f"--topology {topology}: written as version and shape, for example {KNOWN}")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"--topology {topology}: compiling for TPUs takes libtpu: {install('tpu')}")
    # libtpu would ask Google's metadata server about the machine, and wait for it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if jax.config.values["jax_platforms"] is None:
        jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        first = str(error).splitlines()[0][:200]
        raise ValueError(
            f"--topology {topology}: libtpu knows no such slice; examples are {KNOWN}. It said: {first}"
        ) from error
    return list(found.devices)


def chip_of(device: Any) -> Chip:
    """What a device can do; of CPUs and unknown GPUs only the memory."""
    kind = device.device_kind
    if kind in TPUS:
        return TPUS[kind]
    if device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Chip(memory / len(jax.local_devices()))  # virtual devices share the machine
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    peak = peak_of(kind)
    return Chip(limit) if peak is None else Chip(limit, peak.flops, peak.bandwidth)
