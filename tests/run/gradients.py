"""One process of several: the gradients of a tiny model in float64, written by the first. Run by `test_processes.py`.

Arguments: port, number of processes, this one's number, its devices, JSON of mesh sizes, file.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.methods import preference, sft
from jaxalign.methods.common import to_documents
from jaxalign.models import build
from jaxalign.packing import build as build_rows
from jaxalign.packing import pieces_of, plan
from jaxalign.sharding import MeshConfig, data_shards, make_mesh, param_shardings, place_batch
from tests.layouts import flat, ragged_pairs, ragged_texts, tiny_model
from tests.methods.test_layouts import gradient


def main(port: str, processes: str, process: str, devices: str, sizes: str, path: str) -> None:
    """Computes and writes them."""
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_enable_x64", True)
    if int(processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    mesh = make_mesh(MeshConfig(**json.loads(sizes)))
    model, values = tiny_model(dtype="float64", num_layers=2, windows=(None, 9))
    model = build(model.config, param_dtype="float64", compute_dtype="float64", mesh=mesh)
    host = jax.device_get(values)
    placed = jax.tree.map(
        lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index]),
        host,
        param_shardings(mesh, host),
    )
    found = []
    for method, examples in ((sft, ragged_texts(11)), (preference, ragged_pairs(11))):
        config = method.Config(logits_chunk=17)
        documents = to_documents(method, config, examples)
        planned = plan(
            [pieces_of(document, True) for document in documents],
            micro_batches=2,
            micro_batch_size=8,
            length=128,
            shards=data_shards(mesh) // int(processes),
            processes=int(processes),
        )
        batch = build_rows(
            planned,
            dict(enumerate(documents)),
            micro_batch_size=8,
            completions=method.COMPLETIONS,
            process=int(process),
        )
        if method is preference:
            # Numbers by completion and step, so that they are the same whatever row a token lies in.
            asked = batch.predictions
            noise = np.sin(asked.completions * 7.0 + asked.steps) - 4
            batch = replace(batch, fields={**batch.fields, "ref_logps": noise.astype(np.float32)})
        grads = gradient(method, config, model, placed, place_batch(mesh, batch))[0]
        found.append(multihost_utils.process_allgather(grads, tiled=True) if int(processes) > 1 else grads)
    if process == "0":
        np.save(Path(path), flat(jax.device_get(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
