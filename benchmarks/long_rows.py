"""Memory of a training step on long rows: attention on whole score arrays, block by block, and by splash.

    python benchmarks/long_rows.py [--lengths 4096 8192 32768] [--model smollm2 | 8b] [--tpu v5p:2x2x1]
        [--attention whole blocks splash] [--remat full attention ...]

Compiles the SFT step (AdamW, one row of one document per data shard) and prints what the compiler says that it needs;
nothing is run, so a row that would not fit this machine can be asked for. With `--tpu` it compiles for that slice, its
devices as `fsdp`, which takes libtpu (`pip install libtpu`) and no TPU. Splash is for TPUs: elsewhere what is compiled
is its interpreter.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxalign.methods import sft
from jaxalign.models import ModelConfig, Rope, attention, build
from jaxalign.models.remat import POLICIES, Remat
from jaxalign.sharding import MeshConfig, batch_shardings, data_shards, make_mesh, param_shardings
from jaxalign.training.optimizer import Config, make_optimizer
from jaxalign.types import Batch, Predictions, TokenRows

MODELS = {
    "smollm2": ModelConfig(
        "llama", 49152, 576, 30, 9, 3, 64, 1536, 1 << 20, rope=Rope(1e5), windows=(None,) * 30, tie_embeddings=True
    ),
    "8b": ModelConfig("llama", 128256, 4096, 32, 32, 8, 128, 14336, 1 << 20, rope=Rope(5e5), windows=(None,) * 32),
}
NEVER = 1 << 40


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 32768])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--tpu", help="a slice, for example v5p:2x2x1")
    kinds = ("whole", "blocks", "splash")
    parser.add_argument("--attention", choices=kinds, nargs="+", default=["whole", "blocks"])
    parser.add_argument("--remat", choices=("none", *POLICIES), nargs="+", default=["full"])
    options = parser.parse_args()
    devices = None
    if options.tpu:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=options.tpu).devices)
    print(f"{options.model} on {options.tpu or jax.default_backend()}: GiB per device")
    names = ("row length", "attention", "remat", "arguments", "temporary", "on host", "compiled in")
    print("  ".join(f"{name:>14}" for name in names))
    for length, kind, remat in itertools.product(options.lengths, options.attention, options.remat):
        attention.BLOCKWISE_FROM = NEVER if kind == "whole" else 1
        start = time.perf_counter()
        try:
            found = compile_step(MODELS[options.model], length, devices, "splash" if kind == "splash" else "xla", remat)
        except jax.errors.JaxRuntimeError as error:  # TPU's compiler refuses what does not fit, and says by how much
            print(f"{length:>14}  {kind:>14}  {remat:>14}  {str(error).splitlines()[0]}", flush=True)
            continue
        assert found is not None  # XLA's compilers for CPU, GPU and TPU all say
        sizes = (found.argument_size_in_bytes, found.temp_size_in_bytes, found.host_temp_size_in_bytes)
        cells = [length, kind, remat, *(f"{x / 2**30:.2f}" for x in sizes), f"{time.perf_counter() - start:.0f} s"]
        print("  ".join(f"{cell:>14}" for cell in cells), flush=True)


def compile_step(
    config: ModelConfig, length: int, devices: list | None, kind: attention.Attention = "xla", remat: Remat = "full"
):
    """What the compiler says of the memory of one step."""
    dtype = "float32" if devices is None and jax.default_backend() == "cpu" else "bfloat16"
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), devices or jax.devices()[:1])
    model = build(config, compute_dtype=dtype, remat=remat, attention=kind, mesh=mesh)
    optimizer, schedule = make_optimizer(Config(), 100)
    key = jax.random.key(0)

    def begin(key):
        return sft.init(sft.Config(), model, model.init(key), optimizer, key)

    state, frozen = jax.eval_shape(begin, key)
    batch = one_document(length, data_shards(mesh))
    arguments = (state, frozen, batch)
    places = (*param_shardings(mesh, (state, frozen)), batch_shardings(mesh, batch))
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arguments, places)
    step = jax.jit(
        sft.make_step(sft.Config(), model, optimizer, schedule), donate_argnums=0, out_shardings=(places[0], None)
    )
    return step.lower(*shapes).compile().memory_analysis()


def one_document(length: int, rows: int) -> Batch:
    """The shapes of a batch with one document in each row, all of it trained on."""

    def make() -> Batch:
        cells = jnp.zeros((1, rows, length), jnp.int32)
        return Batch(TokenRows(*[cells] * 4), Predictions(*[cells] * 4), jnp.ones((1, rows)))

    return jax.eval_shape(make)


if __name__ == "__main__":
    main()
