"""What the devices could do at best, for MFU."""

from __future__ import annotations

import time
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh


class Peak(NamedTuple):
    """What a maker's data sheet says of one device, as jax lists them.

    Attributes:
      flops: dense bfloat16 operations a second, with float32 sums and without sparsity.
      bandwidth: bytes a second of its memory.
    """

    flops: float
    bandwidth: float


# The first name within the device kind counts. A device is what jax lists: of TPU7x half a chip, of TPU v4 a whole one.
# TPUs: Google Cloud's page of each version (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x).
PEAKS: tuple[tuple[str, Peak], ...] = (
    ("TPU7x", Peak(1153.5e12, 3.69e12)),
    ("TPU v6", Peak(918e12, 1.638e12)),
    ("TPU v5p", Peak(459e12, 2.765e12)),
    ("TPU v5 lite", Peak(197e12, 0.819e12)),
    ("TPU v5e", Peak(197e12, 0.819e12)),
    ("TPU v5", Peak(459e12, 2.765e12)),
    ("TPU v4", Peak(275e12, 1.228e12)),
    ("GB200", Peak(2500e12, 8e12)),
    ("B200", Peak(2250e12, 8e12)),
    ("GH200", Peak(989e12, 4e12)),
    ("H200", Peak(989e12, 4.8e12)),
    ("H100 PCIe", Peak(756e12, 2e12)),
    ("H100 NVL", Peak(835e12, 3.9e12)),
    ("H100", Peak(989e12, 3.35e12)),
    ("A100-SXM4-40GB", Peak(312e12, 1.555e12)),
    ("A100-PCIE-40GB", Peak(312e12, 1.555e12)),
    ("A100 80GB PCIe", Peak(312e12, 1.935e12)),
    ("A100", Peak(312e12, 2.039e12)),
    ("L40S", Peak(362e12, 0.864e12)),
    ("L4", Peak(121e12, 0.3e12)),
    ("4090", Peak(165e12, 1.008e12)),
)


def peak_of(device_kind: str) -> Peak | None:
    """What a kind of device, as jax names it, could do at best; None for one that is not known."""
    return next((peak for name, peak in PEAKS if name in device_kind), None)


def peak_flops(mesh: Mesh, compute_dtype: str) -> float | None:
    """FLOP/s of all devices of the mesh together; on CPU a matrix product is timed; None for an unknown device."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        # Virtual devices share the same cores.
        return _measured(compute_dtype)
    known = peak_of(device.device_kind)
    return None if known is None else known.flops * mesh.devices.size


def peak_bandwidth(mesh: Mesh) -> float | None:
    """Bytes a second that all devices of the mesh together could read; None for an unknown device, and on CPU."""
    known = peak_of(mesh.devices.flat[0].device_kind)
    return None if known is None else known.bandwidth * mesh.devices.size


@cache
def _measured(compute_dtype: str, size: int = 1536, repeats: int = 3) -> float:
    x = jnp.ones((size, size), compute_dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
