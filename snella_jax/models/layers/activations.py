"""Activations, some with a derivative that takes 2 bits an element to keep.

The derivative of "gelu2" and "silu2" is a step function of four values, that of the sum
of three ReLUs which is nearest to the activation (Yang et al., arXiv 2406.16282:
ReGELU2, ReSiLU2). The output is the exact one.

    >>> slopes = jax.grad(lambda x: gelu2(x).sum())(jnp.array([-4.0, -1.0, 1.0, 4.0]))
    >>> [f"{slope:.2f}" for slope in slopes]
    ['0.00', '-0.05', '1.05', '1.00']
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from snella_jax.models.layers.memory import HIDDEN
from snella_jax.ops.names import named

Gelu = Literal["gelu", "gelu2"]
Silu = Literal["silu", "silu2"]


class Steps(NamedTuple):
    """Slopes 0, `-below`, `1 + below` and 1, between `-edge`, 0 and `edge`.

    The ReLUs' sum is `below (2 relu(x) - relu(x + edge) - relu(x - edge)) + relu(x)`:
    like the activation, it differs from `x / 2` by an even function.
    """

    below: float
    edge: float


# They minimise the integral of the squared difference, 0.009507 and 0.039941. The
# paper's, found by annealing, are not quite symmetric: 0.009509 and 0.039944.
GELU = Steps(0.0495752, 3.1713107)
SILU = Steps(0.0405243, 6.3199319)


# Made again in the backward pass: else three arrays as wide as the MLP are kept.
@jax.checkpoint
def gelu(x: Array) -> Array:
    """Computes the exact GELU."""
    return jax.nn.gelu(x, approximate=False)


# Made again in the backward pass: else three arrays as wide as the MLP are kept.
@jax.checkpoint
def gelu_tanh(x: Array) -> Array:
    """Computes the tanh approximation of a GELU."""
    return jax.nn.gelu(x, approximate=True)


def stepped(function: Callable[[Array], Array], steps: Steps) -> Any:
    """Makes an activation whose derivative is a step function, of 2 bits an element."""
    run = jax.custom_vjp(lambda x: function(x))

    def forward(x: Array) -> tuple[Array, Array]:
        return function(x), named(packed(_interval(x, steps)), HIDDEN)

    def backward(codes: Array, g: Array) -> tuple[Array]:
        return (g * _slopes(unpacked(codes, g.shape[-1]), steps).astype(g.dtype),)

    run.defvjp(forward, backward)
    return run


gelu2, gelu_tanh2 = (stepped(f, GELU) for f in (gelu, gelu_tanh))
silu2 = stepped(jax.nn.silu, SILU)


def activated(
    x: Float[Array, "*B D"],
    name: str,
    exact: Callable[[Array], Array] = gelu,
    in_steps: Callable[[Array], Array] = gelu2,
) -> Float[Array, "*B D"]:
    """Applies the activation of a config, and names what it keeps.

    Args:
      x: what is activated.
      name: "gelu" for the exact derivative, which keeps `x`, "gelu2" for the steps.
      exact, in_steps: the activation with either.
    """
    if name == "gelu":
        return exact(named(x, HIDDEN))
    return named(in_steps(x), HIDDEN)


def check_activation(name: str, kind: Any) -> None:
    """Raises a `ValueError` for a name that is not of this kind, `Gelu` or `Silu`."""
    if name not in get_args(kind):
        known = ", ".join(get_args(kind))
        raise ValueError(f"activation={name!r}: expected {known}.")


def _slopes(codes: UInt8[Array, "*B D"], steps: Steps) -> Float[Array, "*B D"]:
    low = jnp.where(codes == 0, 0.0, -steps.below)
    return jnp.where(codes < 2, low, jnp.where(codes == 2, 1 + steps.below, 1.0))


def _interval(x: Array, steps: Steps) -> UInt8[Array, "*B D"]:
    """Returns the number of edges below each element."""
    low, middle, high = (
        (x > edge).astype(jnp.uint8) for edge in (-steps.edge, 0.0, steps.edge)
    )
    return low + middle + high


def packed(codes: UInt8[Array, "*B D"]) -> UInt8[Array, "*B D/4"]:
    """Packs numbers from 0 to 3 four to a byte, the last ones with zeros.

    >>> packed(jnp.array([1, 2, 3, 0, 1], jnp.uint8)).tolist()
    [57, 1]
    """
    missing = -codes.shape[-1] % 4
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, missing)]
    fours = jnp.pad(codes, padding).reshape(*codes.shape[:-1], -1, 4)
    one, two, three, four = (fours[..., i] << 2 * i for i in range(4))
    return one | two | three | four


def unpacked(codes: UInt8[Array, "*B D/4"], width: int) -> UInt8[Array, "*B D"]:
    """Undoes `packed` of an array of this width.

    >>> unpacked(jnp.array([57, 1], jnp.uint8), 5).tolist()
    [1, 2, 3, 0, 1]
    """
    fours = jnp.stack([codes >> 2 * i & 3 for i in range(4)], -1)
    return fours.reshape(*codes.shape[:-1], -1)[..., :width]
