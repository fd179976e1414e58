"""One of several processes that export a reward model with an adapter; prints what it saw. Run by `test_export.py`.

Arguments: port, number of processes, this one's number, a base model's folder, a folder to write to.
"""

import json
import sys
import time
from pathlib import Path

import jax

from jaxalign import models
from jaxalign.models import LoraConfig
from jaxalign.sharding import MeshConfig, make_mesh, param_shardings

LATE = 3.0  # seconds, in which a first process that does not wait has written all


def adapted(base: str | Path) -> tuple[models.Model, dict]:
    """A reward model with an adapter that changes it; its head is what an adapter's folder has beside the adapter."""
    config = LoraConfig(r=4, alpha=6, dropout=0.0, target_modules=("q_proj", "down_proj"))
    scorer = models.add_score_head(*models.load(base), jax.random.key(3))
    model, variables = models.add_lora(*scorer, config, jax.random.key(4))
    leaves, tree = jax.tree.flatten(variables["lora"])
    keys = jax.random.split(jax.random.key(5), len(leaves))
    lora = [0.1 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return model, {**variables, "lora": jax.tree.unflatten(tree, lora)}


def main(port: str, processes: str, process: str, base: str, folder: str) -> None:
    """Exports from where each process has all of the model, and from where each has a part; the last comes late."""
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    model, variables = adapted(base)
    host, seen, count = jax.device_get(variables), [], int(processes)
    for axis, config in (("data", MeshConfig(data=count, fsdp=1)), ("fsdp", MeshConfig(data=1, fsdp=count))):
        mesh = make_mesh(config)
        placed = jax.tree.map(
            lambda leaf, where: jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index]),
            host,
            param_shardings(mesh, host),
        )
        target = Path(folder) / axis
        for late in (LATE, 0):
            time.sleep(late * int(process))
            try:
                models.save(target / "export", model, placed, None, name="tiny")
            except FileExistsError as error:
                seen.append(str(error))
            models.save_adapter(target / "adapter", model.config, placed, base_model="tiny")
    sys.stdout.write(f"SEEN {json.dumps(seen)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
