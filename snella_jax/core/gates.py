"""Competition inside a matrix: the exact threshold and the gates (Eq. 13).

`budget` weights of an update survive: those whose magnitude is strictly above `tau`,
the `(budget+1)`-th largest magnitude. (The paper takes the `budget`-th largest, which
leaves `budget - 1`.) Everything is decided on the bit patterns of the magnitudes, which
order like the numbers themselves, so ties, zeros and subnormals need no special case.

    >>> import jax.numpy as jnp
    >>> delta = jnp.array([[3.0, -1.0], [0.5, -2.0]])
    >>> float(threshold(delta, 2))
    1.0
    >>> sparsify(delta, 2, gate="hard").tolist()
    [[3.0, 0.0], [0.0, -2.0]]
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from snella_jax.ops.threshold import bit_pattern, check_budget, in_int32, threshold


@dataclasses.dataclass(frozen=True)
class Gate:
    """What becomes of a survivor.

    Attributes:
      value: its value, from delta, |delta| and tau.
      slope: what its gradient is multiplied by, from |delta| and tau.
    """

    value: Callable[[Array, Array, Array], Array]
    slope: Callable[[Array, Array], Array]


GATES = {
    "product": Gate(
        lambda delta, size, tau: delta * (size - tau), lambda size, tau: 2 * size - tau
    ),
    "released": Gate(
        lambda delta, size, tau: delta * jax.lax.stop_gradient(size),
        lambda size, tau: size,
    ),
    "soft": Gate(
        lambda delta, size, tau: delta - jnp.sign(delta) * tau,
        lambda size, tau: jnp.ones_like(size),
    ),
    "hard": Gate(lambda delta, size, tau: delta, lambda size, tau: jnp.ones_like(size)),
}


def sparsify(
    delta: Float[Array, " *axes"],
    budget: int | Int[Array, ""],
    gate: str = "product",
    tau: Float[Array, ""] | None = None,
) -> Float[Array, " *axes"]:
    """Keeps the `budget` weights of largest magnitude and puts them through a gate.

    The gate gives the survivor's value, and the gradient is that of it:

    - `product` (Eq. 13): `delta * (|delta| - tau)`;
    - `released`: `delta * |delta|`, with the gradient of `|delta|` left out;
    - `soft`: `sign(delta) * (|delta| - tau)`;
    - `hard`: `delta`;
    - `none`: `delta` of every weight, whatever the budget: no threshold at all.

    `tau` carries no gradient, and neither does a weight that does not survive. Fewer
    than `budget` survive where magnitudes tie with `tau`. A NaN always survives, so
    that a broken update is seen and not hidden.

    Args:
      delta: the dense update of one matrix, floats in any shape.
      budget: number of weights that survive, at least 0; may be traced.
      gate: name in the list above.
      tau: the threshold, a scalar as `threshold` returns it; None to search for it.

    Raises:
      ValueError: `gate` is not in the table, `budget` is no scalar, or as in
        `threshold`.
    """
    check_gate(gate)
    check_budget(budget)
    if jnp.ndim(budget):
        raise ValueError(
            f"budget of shape {jnp.shape(budget)}: expected one number for one matrix. "
            "For several at once use jax.vmap, or a Layout with slices."
        )
    if gate == "none":
        return delta
    tau = threshold(delta, budget) if tau is None else jax.lax.stop_gradient(tau)
    value = GATES[gate].value(delta, jnp.abs(delta), tau)
    return jnp.where(_survives(delta, budget, tau), value, 0)


def pull(
    delta: Float[Array, " *axes"],
    budget: Int[Array, ""],
    gate: str,
    tau: Float[Array, ""],
    cotangent: Float[Array, " *axes"],
) -> Float[Array, " *axes"]:
    """Pulls a gradient back through `sparsify`: what JAX derives, in fewer operations.

    Args:
      delta, budget, gate, tau: as given to `sparsify`.
      cotangent: gradient of its result.
    """
    if gate == "none":
        return cotangent
    slope = GATES[gate].slope(jnp.abs(delta), tau)
    return jnp.where(_survives(delta, budget, tau), cotangent * slope, 0)


def _survives(delta, budget, tau):
    pattern = bit_pattern(delta)
    # A NaN has a pattern above infinity's: it survives whatever tau is.
    nan = bit_pattern(jnp.asarray(jnp.inf, delta.dtype)) + 1
    least = jnp.minimum(bit_pattern(tau.astype(delta.dtype)) + 1, nan)
    # A budget that covers the matrix drops nothing, nor the gradient of a zero.
    full = in_int32(budget, delta.size) >= delta.size
    return pattern >= jnp.where(full, 0, least)


def check_gate(gate: str) -> None:
    """Raises a `ValueError` that lists the gates if `gate` is none of them."""
    if gate not in (*GATES, "none"):
        raise ValueError(
            f"No gate is called {gate!r}: expected {', '.join(GATES)}, none."
        )
