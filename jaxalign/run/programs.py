"""The programs of a stage and what they take, made in one place: a run calls them, `jaxalign plan` compiles them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from jaxalign import models
from jaxalign.models.quantized import Quantization, quantize_params
from jaxalign.run.adapting import adapt
from jaxalign.sharding import Mesh, param_shardings
from jaxalign.training.offload import on_host, to_device
from jaxalign.training.optimizer import make_optimizer
from jaxalign.types import PyTree, Variables

if TYPE_CHECKING:
    from jaxalign.run.prepare import Prepared


@dataclass(frozen=True)
class Training:
    """The train step, and what it takes, before any array is there.

    Attributes:
      init: variables of what is trained -> the state at step 0 and the frozen variables.
      state: the state as `ShapeDtypeStruct`s with their shardings.
      frozen: the frozen variables likewise.
      step: `(state, frozen, batch) -> (state, metrics)`, jitted; it donates the state.
    """

    init: Callable[[Any], tuple[Any, PyTree]]
    state: Any
    frozen: PyTree
    step: Any


def make_training(ready: Prepared, model: Any, shapes: Any, key: jax.Array) -> Training:
    """The train step of a stage.

    Args:
      ready: the stage.
      model: what the method's `init` and `make_step` take.
      shapes: the variables that `init` takes, as shapes.
      key: the run's.
    """
    stage, method = ready.stage, ready.method
    optimizer, schedule = make_optimizer(stage.optimizer, ready.num_steps)
    init = partial(method.init, stage.method, model, optimizer=optimizer, key=key)
    state, frozen = placed(ready.mesh, jax.eval_shape(init, shapes))
    step = jax.jit(
        method.make_step(stage.method, model, optimizer, schedule),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
    )
    return Training(init, state, frozen, step)


def make_reference_pass(ready: Prepared) -> Any:
    """`(variables, batch) -> batch` with what the loss of an offline method needs of a reference, jitted.

    Under `model.offload_reference` the variables are in the host's memory before and after.
    """
    run = ready.method.make_reference(ready.stage.method, ready.model)
    if not ready.stage.model.offload_reference:
        return jax.jit(run)
    return jax.jit(lambda variables, batch: run(to_device(variables), batch))


def make_field_passes(ready: Prepared, functions: Mapping[str, Callable[..., Any]]) -> dict[str, tuple[str, Any]]:
    """By the name of the field that it fills, each pass of an online method: whose it is, and the jitted function.

    Args:
      ready: the stage.
      functions: per model (`policy`, `value`), `(params, frozen, batch) -> [micro, rows, predictions]`; of `reference`
        `(variables, batch)`.
    """
    wanted = ready.method.passes(ready.stage.method, narrow=ready.compute_dtype != "float32")
    return {name: (role, jax.jit(functions[role])) for name, role in wanted.items()}


def placed(mesh: Mesh, shapes: PyTree) -> PyTree:
    """Shapes of parameters or states with the shardings that `jaxalign.sharding` gives them."""
    return at(shapes, param_shardings(mesh, shapes))


def at(shapes: PyTree, places: PyTree) -> PyTree:
    """Shapes with these shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def base_shapes(model: models.Model, quantization: Quantization | None) -> Variables:
    """Shapes of a model's variables as they are loaded: without an adapter, quantised if the stage wants that."""

    def start(key: jax.Array) -> Variables:
        variables = model.init(key)
        if quantization is None:
            return variables
        return {**variables, "params": quantize_params(variables["params"], quantization)}

    return jax.eval_shape(start, jax.random.key(0))


def start_shapes(ready: Prepared, key: jax.Array) -> Variables:
    """Shapes of the policy's start: as loaded, with what of it trains, see `run.adapting.adapt`."""
    shapes = base_shapes(ready.model, ready.stage.model.quantization)
    return jax.eval_shape(lambda each: adapt(ready.stage, ready.model.config, each, key), shapes)


def placed_reference(ready: Prepared) -> Variables:
    """`reference_shapes` with their shardings, under `model.offload_reference` in the host's memory."""
    shapes = placed(ready.mesh, reference_shapes(ready))
    if not ready.stage.model.offload_reference:
        return shapes
    return at(shapes, on_host(jax.tree.map(lambda leaf: leaf.sharding, shapes), shapes))


def reference_shapes(ready: Prepared) -> Variables:
    """Shapes of the reference's variables, see `run.inputs.load_reference`."""
    stage = ready.stage
    if stage.model.reference is None and stage.lora is not None and stage.lora.path is not None:
        return start_shapes(ready, jax.random.key(0))
    return base_shapes(ready.model, stage.model.quantization)
