"""One tile of the update and of its gradient, from rows and columns of the factors.

The same arithmetic for every platform and kernel, in the order of the plain code. A
tile's `a` is a list of `r` arrays, one for each column of the factor, that spread over
the tile's outputs; its `b` one of `r` arrays that spread over its inputs. Nothing here
reads memory.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

INFINITY = 0x7F800000  # its bit pattern; those above it are NaN's
ALWAYS = -1  # below every magnitude's pattern: a limit that all weights exceed
GATES = ("product", "released", "soft", "hard")

# The survivor's value and its derivative, from delta, |delta| and tau.
VALUES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "product": lambda delta, size, tau: delta * (size - tau),
    "released": lambda delta, size, tau: delta * size,
    "soft": lambda delta, size, tau: delta - jnp.where(delta < 0, -tau, tau),
    "hard": lambda delta, size, tau: delta,
}
SLOPES: dict[str, Callable[[Array, Array], Array | float]] = {
    "product": lambda size, tau: 2 * size - tau,
    "released": lambda size, tau: size,
    "soft": lambda size, tau: 1.0,
    "hard": lambda size, tau: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Form:
    """What an update is made of: static, equal by value.

    Attributes:
      pieces: `P`, parts of the rank.
      softmax: True to add `alpha * softmax(kappa / gamma) + beta` over the outputs.
      temperature: True if there is a `gamma`.
      gate: value of a survivor, one of `GATES`.
    """

    pieces: int
    softmax: bool
    temperature: bool = False
    gate: str = "product"

    @property
    def scalars(self) -> int:
        """Length of the scalars: coefficients, alpha, beta, gamma, tau."""
        return self.pieces + 4

    @property
    def sums(self) -> int:
        """Number of sums over the outputs beside the factors', see `Sums.others`."""
        return self.pieces + (2 + self.temperature if self.softmax else 0)

    @property
    def tail_sums(self) -> int:
        """Number of them that `tail` makes: without the first two."""
        return self.pieces + self.temperature


class Scalars(NamedTuple):
    """The scalars of an update, read one by one from where a kernel has them."""

    coeff: list[Array]
    alpha: Array
    beta: Array
    gamma: Array
    tau: Array

    @classmethod
    def read(cls, form: Form, ref: Array) -> "Scalars":
        """Reads them from an array of length `form.scalars`."""
        coeff = [ref[p] for p in range(form.pieces)]
        return cls(coeff, *(ref[form.pieces + i] for i in range(4)))


class Row(NamedTuple):
    """Statistics of the softmax of every input: its maximum and its sum."""

    top: Array
    total: Array


class Made(NamedTuple):
    """A tile of the update, and what its gradient is made of."""

    distances: list[Array]
    kappa: Array
    soft: Array | None
    delta: Array


class Sums(NamedTuple):
    """Where the sums of a tile go: functions of their place and value.

    Attributes:
      of_rows: `(k, sum over the outputs)` of the gradient of column `k` of `a`.
      of_columns: `(k, sum over the inputs)`, of `b`.
      others: `(k, sum over the outputs)`: for the softmax, of the gradient itself, for
        gamma, and for each coefficient; as many as there are.
      over_outputs, over_inputs: sums of an array.
    """

    of_rows: Callable[[int, Array], None]
    of_columns: Callable[[int, Array], None]
    others: Callable[[int, Array], None]
    over_outputs: Callable[[Array], Array]
    over_inputs: Callable[[Array], Array]


Root = Callable[[Array], Array]


def distances(
    form: Form, a: Sequence[Array], b: Sequence[Array], root: Root = jnp.sqrt
) -> list[Array]:
    """Returns the `P` distances of every pair."""
    d = len(a) // form.pieces
    squares = []
    for p in range(form.pieces):
        pairs = [a[k] - b[k] for k in range(p * d, (p + 1) * d)]
        square = pairs[0] * pairs[0]
        for pair in pairs[1:]:
            square = square + pair * pair
        squares.append(square)
    return [root(square) for square in squares]


def kappa_of(s: Scalars, parts: Sequence[Array]) -> Array:
    """Returns the weighted sum of distances."""
    kappa = s.coeff[0] * parts[0]
    for coeff, part in zip(s.coeff[1:], parts[1:], strict=True):
        kappa = kappa + coeff * part
    return kappa


def logits_of(form: Form, s: Scalars, kappa: Array) -> Array:
    """Returns what the softmax is taken of."""
    return kappa / s.gamma if form.temperature else kappa


def make(
    form: Form,
    s: Scalars,
    a: Sequence[Array],
    b: Sequence[Array],
    row: Row | None,
    root: Root = jnp.sqrt,
) -> Made:
    """Makes a tile of the dense update."""
    parts = distances(form, a, b, root)
    kappa = kappa_of(s, parts)
    if row is None:
        return Made(parts, kappa, None, kappa)
    powers = jnp.exp(logits_of(form, s, kappa) - row.top)
    delta = kappa + powers * (s.alpha / row.total) + s.beta
    return Made(parts, kappa, powers * (1 / row.total), delta)


def bits_of(delta: Array) -> Array:
    """Returns the bit pattern of the magnitudes, int32: monotone in `|delta|`."""
    return lax.bitcast_convert_type(jnp.abs(delta), jnp.int32)


def gated(form: Form, s: Scalars, delta: Array, limit: Array) -> Array:
    """Returns the sparse update: survivors' patterns are above `limit`."""
    value = VALUES[form.gate](delta, jnp.abs(delta), s.tau)
    return jnp.where(bits_of(delta) > limit, value, 0.0)


def slope(form: Form, s: Scalars, delta: Array, limit: Array, g: Array) -> Array:
    """Returns the gradient of delta, from that of the weight."""
    value = g * SLOPES[form.gate](jnp.abs(delta), s.tau)
    return jnp.where(bits_of(delta) > limit, value, 0.0)


def pull(
    form: Form,
    s: Scalars,
    a: Sequence[Array],
    b: Sequence[Array],
    made: Made,
    g: Array,
    to: Sums,
) -> None:
    """Reduces a tile of delta's gradient `g`, but for what the softmax takes off.

    The softmax's backward pass takes `soft * D` off its cotangent, `D[j] = sum_i g p`,
    which is known once all tiles of a row were seen; what comes of it is linear in `D`
    and added by `tail`.
    """
    if made.soft is None:
        return _reduce(form, s, a, b, made, g, 0, to)
    weighted = g * made.soft
    to.others(0, to.over_outputs(weighted))
    to.others(1, to.over_outputs(g))
    if form.temperature:
        to.others(2, to.over_outputs(weighted * made.kappa))
    g = g + _share(form, s) * weighted
    _reduce(form, s, a, b, made, g, 2 + form.temperature, to)


def tail(
    form: Form,
    s: Scalars,
    a: Sequence[Array],
    b: Sequence[Array],
    made: Made,
    valid: Array,
    total: Array,
    to: Sums,
) -> None:
    """Reduces what the softmax takes off: `-alpha / gamma * soft * D`.

    Args:
      form, s, a, b, made, to: as in `pull`, without the first two of `others`.
      valid: where the tile is inside the matrix.
      total: `D` of the tile's rows.
    """
    assert made.soft is not None
    taken = jnp.where(valid, made.soft * total, 0.0)
    if form.temperature:
        to.others(0, to.over_outputs(taken * made.kappa))
    g = -_share(form, s) * taken
    _reduce(form, s, a, b, made, g, int(form.temperature), to)


def _share(form: Form, s: Scalars) -> Array:
    return s.alpha / s.gamma if form.temperature else s.alpha


def _reduce(form, s, a, b, made, g, first, to) -> None:
    """Reduces a tile of kappa's gradient into those of coefficients and factors."""
    d = len(a) // form.pieces
    for p, value in enumerate(made.distances):
        to.others(first + p, to.over_outputs(g * value))
        # A difference of columns never cancels, so rows that coincide need no care but
        # a ratio of 0.
        apart = value > 0
        ratio = jnp.where(apart, s.coeff[p] * g / jnp.where(apart, value, 1.0), 0.0)
        for k in range(p * d, (p + 1) * d):
            pair = ratio * (a[k] - b[k])
            to.of_rows(k, to.over_outputs(pair))
            to.of_columns(k, -to.over_inputs(pair))
