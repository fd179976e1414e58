"""What a sparse layer costs by the way its experts' matrices are multiplied.

    python benchmarks/experts_cost.py [--tokens 512] [--experts 32] [--per-token 4] [--embed 512] [--width 256]

Times gate, up and down products of one layer, forward and with gradients, three ways: `dense` runs every token through
every expert and throws most away, `ragged_dot` is XLA's own product by group, `grouped` is what jaxalign runs on this
device (on TPU that is `ragged_dot`). The floor is the time of as many FLOPs in one dense product.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.grouped import grouped_matmul


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("tokens", 512), ("experts", 32), ("per-token", 4), ("embed", 512), ("width", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tokens, experts, k = options.tokens, options.experts, options.per_token
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)

    x, gate, up = draw(tokens, options.embed), *(draw(experts, options.embed, options.width) for _ in range(2))
    down, wide = draw(experts, options.width, options.embed), draw(options.embed, 3 * k * options.width)
    # Experts are not used evenly: Zipf's law, as badly as an unbalanced router may do it.
    odds = np.log(1 / np.arange(1, experts + 1)) + rng.gumbel(size=(tokens, experts))
    chosen = jnp.asarray(np.argsort(-odds, axis=-1)[:, :k])
    ways = {
        "dense": lambda *kernels: dense(x, chosen, *kernels),
        "ragged_dot": lambda *kernels: by_group(jax.lax.ragged_dot, x, chosen, *kernels),
        "grouped": lambda *kernels: by_group(grouped_matmul, x, chosen, *kernels),
    }
    kernels, outputs = (gate, up, down), {}
    shape = f"{tokens} tokens of width {options.embed} to {k} of {experts} experts of width {options.width}"
    print(f"{jax.devices()[0].device_kind}: {shape}")
    floor = measure(lambda wide: x @ wide, (wide,), options.repeats)
    print(f"{'floor':12} forward {1e3 * floor:8.2f} ms")
    for name, way in ways.items():
        outputs[name] = way(*kernels)
        forward = measure(way, kernels, options.repeats)
        both = measure(jax.grad(lambda *kernels, way=way: way(*kernels).sum(), (0, 1, 2)), kernels, options.repeats)
        apart = float(jnp.abs(outputs[name] - outputs["dense"]).max())
        print(f"{name:12} forward {1e3 * forward:8.2f} ms, with gradients {1e3 * both:8.2f} ms, apart {apart:.1e}")


def dense(x, chosen, gate, up, down):
    """Every token through every expert; the chosen ones count."""
    inner = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, up)
    picked = jax.nn.one_hot(chosen, gate.shape[0]).sum(1)
    return jnp.einsum("tef,efd->td", inner * picked[..., None], down)


def by_group(product, x, chosen, gate, up, down):
    """Rows sorted by expert, a product by group, and back."""
    numbers, k = chosen.reshape(-1), chosen.shape[1]
    order = jnp.argsort(numbers)
    sizes, rows = jnp.bincount(numbers, length=gate.shape[0]), x[order // k]
    out = product(jax.nn.silu(product(rows, gate, sizes)) * product(rows, up, sizes), down, sizes)
    return out[jnp.argsort(order)].reshape(*chosen.shape, -1).sum(1)


def measure(function, arguments, repeats: int) -> float:
    """Fastest of several runs, in seconds."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
