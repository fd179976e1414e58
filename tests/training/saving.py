"""One process of several that saves and restores checkpoints; prints what it saw as JSON. Run by `test_saving.py`.

Arguments: port, number of processes, this one's number, folder.
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.training import sums
from jaxalign.training.checkpoint import Checkpoints

SHUTDOWN = 5  # seconds that jax waits at the exit


def main(port: str, processes: str, process: str, folder: str) -> None:
    """Saves 1 and 2, flips a bit in 2, fails to save 3, saves 4 slowly, and ends."""
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        int(processes),
        int(process),
        shutdown_timeout_seconds=SHUTDOWN,
        heartbeat_timeout_seconds=60,
    )
    mesh = jax.make_mesh((int(processes),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec("fsdp"))

    def state(step: int) -> dict[str, jax.Array]:
        host = np.random.default_rng(step).standard_normal((8, 1 << 14), np.float32)
        return {"w": jax.make_array_from_callback(host.shape, where, lambda index: host[index])}

    read: list[str] = []
    seen: dict[str, object] = {}
    hashed = sums._sha256

    def record(path):
        read.append(str(path.relative_to(folder)))
        return hashed(path)

    def refuse(path):
        raise OSError(f"{path.name} cannot be read")

    sums._sha256 = record
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {}, {})
        checkpoints.wait()
        seen["steps"], seen["read"] = checkpoints.steps(), list(read)
        multihost_utils.sync_global_devices("saved")
        if process == "0":
            largest = max((Path(folder) / "2").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
            content = bytearray(largest.read_bytes())
            content[len(content) // 2] ^= 1
            largest.write_bytes(content)
        multihost_utils.sync_global_devices("flipped")
        read.clear()
        got = checkpoints.restore(state(0))
        assert got is not None and bool(jnp.array_equal(got.state["w"], state(1)["w"]))
        seen["restored"], seen["rejected"] = got.step, [[bad.step, bad.reason] for bad in got.rejected]
        seen["verified"] = list(read)
        if process == "1":
            sums._sha256 = refuse
        checkpoints.save(3, state(3), {}, {})
        try:
            checkpoints.wait()
        except OSError as error:
            seen["failed"] = str(error)
        sums._sha256 = record
    slow = Checkpoints(folder, before=lambda: time.sleep(SHUTDOWN + 3))
    slow.save(4, state(4), {}, {})
    slow.close()
    seen["last"] = slow.steps()
    sys.stdout.write(f"SEEN {json.dumps(seen)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
