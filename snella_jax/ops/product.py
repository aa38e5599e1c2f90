"""The one product `x @ w` inside a call, taken out of it.

A layer's call is more than its product: a bias, a cast, a reshape. What makes the
product itself has to know where it is.

    >>> import jax.numpy as jnp
    >>> x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
    >>> rest, extras = around_product(lambda x, w: x @ w + jnp.arange(4.0), x, w)
    >>> rest(x, 2 * jnp.ones((2, 4)), extras)[0].tolist()
    [2.0, 3.0, 4.0, 5.0]
    >>> around_product(lambda x, w: x @ w.T.T, x, w) is None
    True
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jaxtyping import Array


def around_product(
    op: Callable[[Array, Array], Any], x: Array, w: Array
) -> tuple[Callable[..., Any], list[Array]] | None:
    """Returns what `op` does besides `x @ w`; None if it does more with `w`.

    Args:
      op: any function of two arrays.
      x: `[..., n]`.
      w: `[n, m]`, of the dtype of `x`.

    Returns:
      `rest(x, y, extras)`, which is `op(x, w)` for `y = x @ w`, and the extras that
      `op` closes over, such as a bias.
    """
    closed, shapes = jax.make_jaxpr(op, return_shape=True)(x, w)
    jaxpr, outputs = closed.jaxpr, jax.tree.structure(shapes)
    places = [i for i, eqn in enumerate(jaxpr.eqns) if _uses(eqn, jaxpr.invars[1])]
    if len(places) != 1 or jaxpr.invars[1] in jaxpr.outvars:
        return None
    (place,) = places
    eqn = jaxpr.eqns[place]
    if list(eqn.invars) != list(jaxpr.invars) or not _is_product(eqn, x):
        return None
    others = [*jaxpr.eqns[:place], *jaxpr.eqns[place + 1 :]]
    # The product takes the weight's place among the inputs.
    given = [jaxpr.invars[0], eqn.outvars[0]]
    remaining = jaxpr.replace(eqns=others, invars=given)

    def rest(x: Array, y: Array, extras: list[Array]) -> Any:
        return jax.tree.unflatten(outputs, eval_jaxpr(remaining, extras, x, y))

    return rest, closed.consts


def _usual_precision() -> Any:
    """Returns that of a product that names none, as `jax_default_matmul_precision`."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    return jax.make_jaxpr(jnp.matmul)(one, one).eqns[0].params["precision"]


def _uses(eqn: Any, var: Any) -> bool:
    return any(given is var for given in eqn.invars)


def _is_product(eqn: Any, x: Array) -> bool:
    """Returns True for a contraction of the last axis of `x` with the first of `w`."""
    if len(eqn.outvars) != 1 or eqn.outvars[0].aval.dtype != x.dtype:
        return False
    inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    if inner is not None:  # a function with a gradient of its own, or a compiled one
        inner = getattr(inner, "jaxpr", inner)
        if len(inner.eqns) != 1 or inner.outvars != inner.eqns[0].outvars:
            return False
        (product,) = inner.eqns
        return product.invars == inner.invars and _is_product(product, x)
    if eqn.primitive is not jax.lax.dot_general_p:
        return False
    if eqn.params["precision"] not in (None, _usual_precision()):
        return False
    contracted = [
        tuple(axes) for pair in eqn.params["dimension_numbers"] for axes in pair
    ]
    return contracted == [(x.ndim - 1,), (0,), (), ()]
