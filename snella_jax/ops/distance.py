"""Pairwise Euclidean distances of factor rows, with their own gradient."""

import functools
import operator
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def distance(a: Float[Array, "*n d"], b: Float[Array, "*m d"]) -> Float[Array, "..."]:
    """Returns `||a_j - b_i||_2` for every pair, with a gradient of 0 where it is 0.

    >>> import jax.numpy as jnp
    >>> distance(jnp.zeros((1, 2)), jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[5.0, 0.0]]
    """
    return weighted_distances(jnp.ones(1, a.dtype), a[None], b[None])


def _sum_of_distances(
    coeff: Float[Array, " P"], a: Float[Array, "P *n d"], b: Float[Array, "P *m d"]
) -> Float[Array, "..."]:
    values = _of_pieces(_distance, a, b)
    return _sum(coeff[p] * value for p, value in enumerate(values))


weighted_distances = jax.custom_vjp(_sum_of_distances)


def _forward(coeff, a, b):
    return _sum_of_distances(coeff, a, b), (coeff, a, b)


def _backward(factors, cotangent):
    coeff, a, b = factors
    return pull_distances(coeff, a, b, cotangent)


weighted_distances.defvjp(_forward, _backward)


def _sum_beyond_origin(
    coeff: Float[Array, " P"], a: Float[Array, "P *n d"], b: Float[Array, "P *m d"]
) -> Float[Array, "..."]:
    values = _of_pieces(_beyond_norm, a, b)
    return _sum(coeff[p] * value for p, value in enumerate(values))


# Weighted distances less what they are at `b = 0`: `||a_j - b_i|| - ||a_j||`, exactly 0
# where `b_i` is.
beyond_origin = jax.custom_vjp(_sum_beyond_origin)


def _beyond_forward(coeff, a, b):
    return _sum_beyond_origin(coeff, a, b), (coeff, a, b)


def _beyond_backward(factors, cotangent):
    coeff, a, b = factors
    dcoeff, da, db = pull_distances(coeff, a, b, cotangent)
    sums = jnp.sum(cotangent, tuple(range(a.ndim - 2, cotangent.ndim)))
    of_coeff, of_a = pull_norms(coeff, a, sums)
    return dcoeff - of_coeff, da - of_a, db


beyond_origin.defvjp(_beyond_forward, _beyond_backward)


def pull_norms(
    coeff: Float[Array, " P"], a: Float[Array, "P *n d"], cotangent: Float[Array, "*n"]
) -> tuple[Array, Array]:
    """Pulls a gradient back through `sum_p coeff[p] * ||a_j^p||` to its arguments."""
    norm = jnp.sqrt(_squares(a))
    dcoeff = jnp.sum(norm * cotangent, tuple(range(1, norm.ndim)))
    scale = coeff.reshape(-1, *(1,) * cotangent.ndim) * cotangent
    ratio = jnp.where(norm > 0, scale / jnp.where(norm > 0, norm, 1), 0)
    return dcoeff, ratio[..., None] * a


def pull_distances(
    coeff: Float[Array, " P"],
    a: Float[Array, "P *n d"],
    b: Float[Array, "P *m d"],
    cotangent: Float[Array, "..."],
) -> tuple[Array, Array, Array]:
    """Pulls a gradient back through `weighted_distances` to its arguments."""
    # Distances do not see a shift; without it a large offset shared by all rows would
    # cancel only after rounding, in the inner products below.
    middle = (_row_mean(a) + _row_mean(b)) / 2
    a, b = (x - middle.reshape(len(x), *(1,) * (x.ndim - 2), -1) for x in (a, b))
    # Behind the barrier the distances are made again, fused into the one pass that
    # needs them: stored, they cost two n x m arrays and the time to fill them (a
    # 768 x 3072 layer, forward and backward: 36 MiB of temporaries against 72).
    a, b = jax.lax.optimization_barrier((a, b))
    da, db = _through_ratios([cotangent * x for x in _of_pieces(_inverse, a, b)], a, b)
    # A distance is homogeneous of degree 1: it is the sum of its derivatives times
    # what they are taken by (Euler), which spares another pass over n x m.
    dcoeff = sum(
        jnp.sum(x * dx, tuple(range(1, x.ndim))) for x, dx in ((a, da), (b, db))
    )
    scale = [coeff.reshape(-1, *(1,) * (x.ndim - 1)) for x in (a, b)]
    return jnp.asarray(dcoeff), scale[0] * da, scale[1] * db


def _through_ratios(
    ratios: list[Array], a: Float[Array, "P *n d"], b: Float[Array, "P *m d"]
) -> tuple[Array, Array]:
    # d||a - b|| = (a - b).(da - db) / ||a - b||, expanded into inner products: two
    # matmuls instead of an n x m reduction for each column of a and b.
    n_axes, m_axes = tuple(range(a.ndim - 2)), tuple(range(a.ndim - 2, ratios[0].ndim))

    def dots(x, axes):
        # The column of ones makes the sums of a ratio part of the same two matmuls.
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
        axes = axes, tuple(range(len(axes)))
        pairs = zip(ratios, x, strict=True)
        return jnp.stack([jnp.tensordot(*p, axes, precision="highest") for p in pairs])

    over_m, over_n = dots(b, m_axes), dots(a, n_axes)
    da, db = (x * y[..., -1:] - y[..., :-1] for x, y in ((a, over_m), (b, over_n)))
    return da, db


def _of_pieces(
    make: Callable[[Array, Array], Array],
    a: Float[Array, "P *n d"],
    b: Float[Array, "P *m d"],
) -> list[Array]:
    """Makes an `[*n, *m]` array of each piece of two factors.

    For a GPU all pieces are written as one array, which XLA fuses with what reads a
    part of it: half of the operations to compile for two pieces. XLA's CPU backend
    would store that array.
    """

    def at_once(a, b):
        made = jax.vmap(make)(a, b)
        return [made[p] for p in range(len(made))]

    def one_by_one(a, b):
        return [make(a[p], b[p]) for p in range(len(a))]

    return jax.lax.platform_dependent(
        a, b, cuda=at_once, rocm=at_once, default=one_by_one
    )


def _distance(a: Float[Array, "*n d"], b: Float[Array, "*m d"]) -> Float[Array, "..."]:
    return jnp.sqrt(squared_distance(a, b))


def _beyond_norm(
    a: Float[Array, "*n d"], b: Float[Array, "*m d"]
) -> Float[Array, "..."]:
    # ||a - b|| - ||a|| by the difference of the squares, b.(b - 2 a): nothing cancels
    # where b is small, and of b = 0 nothing is left, however it is rounded.
    columns = range(a.shape[-1])
    pairs = (_crossed(a[..., i], b[..., i]) for i in columns)
    squares = _sum(y * (y - 2 * x) for x, y in pairs)
    norm = jnp.sqrt(_squares(a))
    both = _distance(a, b) + norm.reshape(*norm.shape, *(1,) * (b.ndim - 1))
    return jnp.where(both > 0, squares / jnp.where(both > 0, both, 1), 0)


def _inverse(a: Float[Array, "*n d"], b: Float[Array, "*m d"]) -> Float[Array, "..."]:
    """Returns the inverses of distances; 0 of coincident rows.

    Rows within rounding of each other count as coincident: their difference, expanded
    into inner products, would be noise over almost 0.
    """
    value = _distance(a, b)
    norm_a, norm_b = (jnp.sqrt(_squares(jax.lax.stop_gradient(x))) for x in (a, b))
    norm_a, norm_b = _crossed(norm_a, norm_b)
    noise = 4 * jnp.finfo(value.dtype).eps * (norm_a + norm_b)
    apart = value > noise
    return jnp.where(apart, 1 / jnp.where(apart, value, 1), 0)


def squared_distance(a: Float[Array, "*n d"], b: Float[Array, "*m d"]) -> Array:
    """Returns the squared distance of every row of `a` from every row of `b`."""
    # The sum of squared differences never cancels, and XLA fuses it into one loop when
    # the few columns are written out.
    columns = range(a.shape[-1])
    pairs = (_crossed(a[..., i], b[..., i]) for i in columns)
    return _sum((x - y) ** 2 for x, y in pairs)


def _crossed(x: Float[Array, "*n"], y: Float[Array, "*m"]) -> tuple[Array, Array]:
    """Reshapes to `x[*n, 1...]` and `y[1..., *m]`, which meet in every pair."""
    outer = x.reshape(*x.shape, *(1,) * y.ndim)
    return outer, y.reshape(*(1,) * x.ndim, *y.shape)


def _sum(terms: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, terms)


def _row_mean(x: Float[Array, "P *n d"]) -> Float[Array, "P d"]:
    return jnp.mean(x, tuple(range(1, x.ndim - 1)))


def _squares(x: Array) -> Array:
    return jnp.sum(x * x, -1)


def dot(a: Float[Array, "*n d"], b: Float[Array, "*m d"]) -> Array:
    """Returns the product of every row of `a` and of `b`, in full precision."""
    return jnp.tensordot(a, b, axes=(-1, -1), precision="highest")
