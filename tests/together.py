"""Several processes of one script, connected by `jax.distributed` on loopback."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port that is free, and the one after it; the kernel gives neither to whoever connects somewhere.

    The tests that run beside this one connect all the time, and seconds pass before a process of a run listens.
    """
    kernel = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(kernel.read_text().split()[0]) if kernel.is_file() else 32768
    while True:
        port = random.randrange(10_000, max(first, 10_100) - 1)
        try:
            for number in (port, port + 1):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port


def run_together(module: str, processes: int, *words: object, flags: str = "") -> list[str]:
    """What each process of a module printed; all must end with status 0.

    A module's arguments are the coordinator's port, the number of processes, its own number, and `words`; `flags` are
    XLA's.
    """
    port = free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAXALIGN", "XLA_"))}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, (port, processes, number, *words))],
            env={**kept, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for number in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs
