"""Operations of the matmuls and convolutions of a traced step.

They say what a recompute costs where there is no device to time it on: a matmul that is
computed again counts again, work on elements does not count.
"""

import math
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr


def matmul_flops(program: Jaxpr) -> int:
    """Returns the floating-point operations of a program's matmuls and convolutions.

    What no result depends on does not count, as compilers leave it out. A scan's body
    counts as often as it runs, of branches the largest, a shard's program once for each
    device, a while loop's body once. Pallas kernels do not count.

    >>> import jax, jax.numpy as jnp
    >>> matmul_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5))).jaxpr)
    60
    """
    needed, _ = dce_jaxpr(program, [True] * len(program.outvars))
    return _counted(needed)


def _counted(program: Jaxpr) -> int:
    return sum(map(_of_equation, program.eqns))


def _of_equation(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "pallas_call":
        return 0
    inner = [_counted(program) for program in jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    times = {"scan": params.get("length", 1)}
    if name == "shard_map":
        times[name] = params["mesh"].size
    return times.get(name, 1) * sum(inner)


def _dot(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = _shape(equation.invars[0])
    summed = math.prod(shape[axis] for axis in contracted)
    return 2 * summed * math.prod(_shape(equation.outvars[0]))


def _convolution(equation: JaxprEqn) -> int:
    """Counts a product for each number of the kernel and of its output's places."""
    numbers = equation.params["dimension_numbers"]
    kernel, result = _shape(equation.invars[1]), _shape(equation.outvars[0])
    features = kernel[numbers.rhs_spec[0]]
    return 2 * math.prod(kernel) * math.prod(result) // features


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
