"""Memory of a step of one's own, which no preset here knows."""

import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from rich.table import Table

from experiments.benchmarks import allocation, targets
from experiments.benchmarks.allocation import GIB

ADVICE = (
    "Arguments are the weights, the optimizer's state and the batch; temporaries are "
    "mostly activations, which no adapter makes smaller. To keep fewer of them: "
    'memory="lean" (a field of the configs of snella_jax.models), nnx.remat or '
    "jax.checkpoint around blocks, SnellaConfig(sketch=4), accumulate= in "
    "snella.Tuning.step. To keep the base in half the bytes: "
    "SnellaConfig(frozen_dtype=jnp.bfloat16)."
)


def found(text: str) -> Callable[[], Any]:
    """Imports the function that `MODULE:FUNCTION` names.

    Raises:
      ValueError: the text has another form, or the module no such function.
      ModuleNotFoundError: there is no such module; as of the current folder, too.
    """
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise ValueError(f"--function {text}: expected MODULE:FUNCTION.")
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise ValueError(f"--function {text}: {module} has no function {name}.")
    return function


def row(
    name: str,
    function: Callable[[], Any],
    target: targets.Target,
    where: SingleDeviceSharding,
) -> dict[str, Any]:
    """Compiles the step that a function returns; returns its row of `memory.json`.

    Args:
      name: name of the function.
      function: returns a step and the tuple of its arguments. It is called on shapes
        alone: arrays that it makes are never computed.
      target, where: device to compile for.

    Raises:
      ValueError: the function returns something else.
    """
    step: Any
    step, arguments = _abstract(name, function)
    given = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), arguments
    )
    jitted = step if hasattr(step, "lower") else jax.jit(step)  # may donate by itself
    start = time.perf_counter()
    bytes_of, _ = allocation.compiled(jitted.lower(*given))
    seconds = time.perf_counter() - start
    fits = bytes_of["total_bytes"] <= targets.CAPACITY.get(target, math.inf)
    return {
        "function": name,
        "target": target,
        "fits": fits,
        **bytes_of,
        "compile_seconds": round(seconds, 1),
        "device": targets.describe(target),
        "jax": jax.__version__,
    }


def table(found: dict[str, Any]) -> Table:
    """Returns a table of its row."""
    made = Table(title=f"GiB in one step of {found['function']}: {found['device']}")
    for name in ("total", "arguments", "temporary", "results", "fits"):
        made.add_column(name, justify="right")
    names = ("total", "argument", "temporary", "result")
    parts = [found.get(f"{name}_bytes") for name in names]
    cells = ["" if part is None else f"{part / GIB:.3g}" for part in parts]
    made.add_row(*cells, "yes" if found["fits"] else "NO")
    return made


def _abstract(name: str, function: Callable[[], Any]) -> tuple[Callable, tuple]:
    """Returns the step, and shapes for its arguments."""
    steps = []

    def arguments():
        made = function()
        match made:
            case (step, tuple(given)) if callable(step):
                steps.append(step)
                return given
        raise ValueError(
            f"--function {name} returned a {type(made).__name__}: expected a step and "
            "the tuple of its arguments, (step, (state, batch))."
        )

    shapes = jax.eval_shape(arguments)
    return steps[0], shapes
