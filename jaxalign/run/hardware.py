"""What the devices could do at best, for MFU."""

from __future__ import annotations

import time
from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; the first name within the device kind counts.
PEAK_BF16 = (
    ("TPU v6", 918e12),
    ("TPU v5p", 459e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
    ("H200", 989e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("4090", 165e12),
)


def peak_flops(mesh: Mesh, compute_dtype: str) -> float | None:
    """FLOP/s of all devices of the mesh together; on CPU a matrix product is timed; None for an unknown device."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        # Virtual devices share the same cores.
        return _measured(compute_dtype)
    known = next((peak for name, peak in PEAK_BF16 if name in device.device_kind), None)
    return None if known is None else known * mesh.devices.size


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
