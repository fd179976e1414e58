"""Compiling in a sixth of the time, for tests of what is computed and not of the program."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from jax._src import compiler

# XLA's options: without most of its optimisations and without its newer code generator.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@contextmanager
def quick_compiles() -> Iterator[None]:
    """Programs compiled inside have the options `QUICKLY`, which jax has no public setting for."""
    usual = compiler.get_compile_options

    def quick(*args, **kwargs):
        options = usual(*args, **kwargs)
        options.env_option_overrides = [*options.env_option_overrides, *QUICKLY.items()]
        return options

    with mock.patch.object(compiler, "get_compile_options", quick):
        yield
