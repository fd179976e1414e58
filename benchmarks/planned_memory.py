"""Planned memory against what a process really takes: on the CPU, two train steps with a state of gigabytes.

    python benchmarks/planned_memory.py [--devices 1 8] [--layers 30] [--rows 8] [--length 512]

A model of SmolLM2's shape with random parameters is trained for two steps, in a process of its own per device count.
Printed are the planned peak of the train step, summed over the devices, and the growth of the process's resident set
from before the state is made (its programs compiled) to the peak of the second step, less the batch on the host.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measure(options)))
        return
    print(f"{'devices':>7}  {'planned MiB':>11}  {'grown MiB':>9}  {'grown / planned':>15}  {'state MiB':>9}")
    for devices in options.devices:
        found = apart(devices, options)
        planned, grown = found["planned"] / MIB, found["grown"] / MIB
        print(
            f"{devices:>7}  {planned:>11.0f}  {grown:>9.0f}  {grown / planned:>15.3f}  {found['state'] / MIB:>9.0f}",
            flush=True,
        )


def apart(devices: int, options: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    # Freed memory goes back to the system at once, so that the resident set is what is in use.
    malloc = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, "--inside", "--devices", str(devices), "--layers", str(options.layers)]
    command += ["--rows", str(options.rows), "--length", str(options.length)]
    environment = {**os.environ, **malloc, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Planned and real bytes of the second step."""
    import jax
    import numpy as np

    from jaxalign.config import parse_config
    from jaxalign.planning import prepare_plan
    from jaxalign.planning.measure import measure as measure_program
    from jaxalign.planning.programs import largest_batch, stage_programs
    from jaxalign.planning.targets import chip_of
    from jaxalign.run import pick_stage
    from jaxalign.sharding import place_batch

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**MODEL, "num_hidden_layers": options.layers}))
        settings = {
            "model": {"path": folder},
            "data": {"path": "(none)", "max_length": options.length},
            "method": {"name": "sft"},
            "mesh": {"data": 1, "fsdp": -1},
            "train": {"batch_size": options.rows, "max_steps": 10},
        }
        ready, _ = prepare_plan(pick_stage(parse_config(settings), None))
    devices = len(jax.devices())
    programs = stage_programs(ready)
    (step,) = programs.programs
    planned = measure_program(step, programs, chip_of(jax.devices()[0]), devices).memory
    training, key = programs.training, jax.random.key(0)
    # Made where they go, as `models.load` does: no array is ever whole on one device.
    begin = jax.jit(lambda key: training.init(ready.model.init(key))[0], out_shardings=places(training.state))
    begin = begin.lower(key).compile()
    host = largest_batch(ready)
    before = resident()
    state = jax.block_until_ready(begin(key))
    for _ in range(2):
        forget_peak()
        batch = place_batch(ready.mesh, host)
        state, metrics = step.compiled(state, training.frozen, batch)
        jax.block_until_ready((state, metrics))
    if not np.isfinite(float(metrics["loss"].total)):
        raise RuntimeError("the loss is not finite")
    return {
        "planned": planned.total * devices,
        "grown": peak() - before,
        "state": (planned.parameters + planned.optimizer) * devices,
    }


def places(tree):
    """Shardings of a tree of `ShapeDtypeStruct`."""
    import jax

    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def resident() -> int:
    """Bytes of this process in memory."""
    return _status("VmRSS")


def peak() -> int:
    """Most bytes that this process had in memory since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """The peak begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


if __name__ == "__main__":
    main()
