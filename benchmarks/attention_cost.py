"""What attention costs beside the blocks' matrix products: the factor that `make_layout` reckons with.

    python benchmarks/attention_cost.py [--length 512] [--rows 2]

Times one block of SmolLM2-135M forward at two row lengths with the same number of tokens; whatever the longer rows cost
more is attention, since all else is the same.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.methods.row_length import attention_weight
from jaxalign.models import ModelConfig, Rope, build
from jaxalign.types import TokenRows

LAYERS = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    options = parser.parse_args()
    windows = (None,) * LAYERS
    config = ModelConfig(
        "llama", 256, 576, LAYERS, 9, 3, 64, 1536, 8192, rope=Rope(1e5), windows=windows, tie_embeddings=True
    )
    model = build(config)
    variables = model.init(jax.random.key(0))
    short, long = options.length // 4, options.length
    times = {
        length: measure(model, variables, options.rows * options.length // length, length) for length in (short, long)
    }
    tokens = options.rows * options.length
    # time = tokens * (token + key * length), so two lengths give both.
    key = (times[long] - times[short]) / tokens / (long - short)
    token = times[short] / tokens - key * short
    by_flops = attention_weight(config)
    print(f"token {token * 1e6:.2f} us, token and key {key * 1e9:.2f} ns, ratio {key / token:.2e}")
    print(f"used by make_layout: {by_flops:.2e}; the measured ratio over it: {key / token / by_flops:.2f}")


def measure(model, variables, rows: int, length: int) -> float:
    """Fastest of several forward passes, in seconds."""
    ones = np.ones((rows, length), np.int32)
    batch = TokenRows.from_padded(jnp.asarray(ones), jnp.asarray(ones))
    apply = jax.jit(lambda variables, batch: model.apply(variables, batch)[0])
    jax.block_until_ready(apply(variables, batch))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(apply(variables, batch))
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
