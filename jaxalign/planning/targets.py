"""Devices that a plan is for: a TPU slice that is not here, or this machine's; and what they can do."""

from __future__ import annotations

import importlib.util
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from jaxalign.extras import install
from jaxalign.run.backend import tpu_chips
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
      network: bytes/s that it can send to other slices: its share of the data centre's network.
    """

    memory: float
    flops: float | None = None
    bandwidth: float | None = None
    links: float | None = None
    network: float | None = None


# Device kind -> memory, links, network between slices; FLOP/s and bandwidth of the memory are those of `run.hardware`.
# Memory is what the compiler says it has, somewhat less than the chip. Links and network are from Google Cloud's pages
# (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x): half of the bidirectional figure, and a chip's share of the
# pod's. A TPU7x chip is two devices. TPU v4 is not here: libtpu describes two devices per chip, one that runs is one.
TPUS = {
    "TPU v5 lite": (15.75 * GIB, 200e9, 6.4e12 / 8 / 256),
    "TPU v5": (95.74 * GIB, 600e9, None),
    "TPU v6 lite": (31.25 * GIB, 400e9, 25.6e12 / 8 / 256),
    "TPU7x": (94.75 * GIB, 300e9, None),
}
KNOWN = "v5e:2x4, v5p:2x2x2, v6e:4x8, tpu7x:2x2x1"
# The flags that `launch/worker.sh` sets on a TPU; docs/scale.md says why.
FLAGS = (
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
)


def find_devices(topology: str | None, slices: int = 1) -> list[Any]:
    """The devices of TPU slices that need not be here, or this machine's.

    Args:
      topology: version and shape of a slice, for example `v5p:4x4x4`; None for this machine.
      slices: how many of them.

    Raises:
      ValueError: there is no such topology, nothing is known of its chips, or libtpu is not installed.
    """
    if slices < 1 or (slices > 1 and topology is None):
        raise ValueError(f"--slices {slices}: a number of slices, at least 1, of the shape that --topology names")
    if topology is None:
        return jax.devices()
    if not re.fullmatch(r"\w+:\d+(x\d+)*", topology):
        raise ValueError(f"--topology {topology}: written as version and shape, for example {KNOWN}")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"--topology {topology}: compiling for TPUs takes libtpu: {install('tpu')}")
    # libtpu would ask Google's metadata server about the machine, and wait for it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    _set_flags()
    if jax.config.values["jax_platforms"] is None:
        jax.config.update("jax_platforms", "cpu")
    several = {} if slices == 1 else {"num_slices": slices}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **several)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        first = str(error).splitlines()[0][:200]
        raise ValueError(
            f"--topology {topology}: libtpu knows no such slice; examples are {KNOWN}. It said: {first}"
        ) from error
    devices = list(found.devices)
    if devices[0].device_kind not in TPUS:
        kind = devices[0].device_kind
        raise ValueError(f"--topology {topology}: a {kind} cannot be planned for; what can are {KNOWN} and their like")
    return devices


def _set_flags() -> None:
    """Has the compiler work as under `launch/worker.sh`; what the user set in LIBTPU_INIT_ARGS stays, and counts."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    missing = [flag for flag in FLAGS if flag.split("=")[0] not in given]
    library = Path(importlib.import_module("libtpu").get_library_path())
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        # It ends the process that gives it a flag it does not know.
        known = [flag for flag in missing if text.find(flag.split("=")[0].removeprefix("--").encode()) >= 0]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([*known, given]).strip()
    if not tpu_chips():
        # It takes a lock on the machine's chips, which keeps a second plan out even where there are none.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def chip_of(device: Any) -> Chip:
    """What a device can do; of CPUs and unknown GPUs only the memory."""
    kind = device.device_kind
    peak = peak_of(kind)
    best = {} if peak is None else peak._asdict()
    if kind in TPUS:
        memory, links, network = TPUS[kind]
        return Chip(memory, links=links, network=network, **best)
    if device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Chip(memory / len(jax.local_devices()))  # virtual devices share the machine
    return Chip((device.memory_stats() or {}).get("bytes_limit", 0), **best)
