"""Recomputes in the backward pass what a plain call would keep.

An adapted call keeps its arguments and its thresholds for the backward pass, and no
update, no sum of weights and nothing that the call made on its way. A block of a model
that is rematerialised keeps its arguments and what its layers mark with `kept`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jaxtyping import Array

from snella_jax.ops.names import KEPT
from snella_jax.ops.sketch import Sketch


def rematerialised(
    function: Callable, *, keep: Iterable[str] = (), prevent_cse: bool = True
) -> Callable:
    """Recomputes a function in its backward pass, but for what is marked with `kept`.

    Args:
      function: function of trees of arrays.
      keep: names that `named` gave; their arrays are kept, too.
      prevent_cse: as in `jax.checkpoint`; False inside a scan.

    >>> from snella_jax.ops.names import kept
    >>> def sines(mark):
    ...     block = rematerialised(lambda x: x * mark(jnp.sin(x)))
    ...     return str(jax.make_jaxpr(jax.grad(block))(1.0)).count(" sin ")
    >>> sines(lambda x: x), sines(kept)
    (2, 1)
    """
    names = (f"snella_jax.{name}" for name in keep)
    policy = jax.checkpoint_policies.save_only_these_names(KEPT, *names)
    return jax.checkpoint(function, policy=policy, prevent_cse=prevent_cse)


class Arrays:
    """The arrays of a tree, whose other leaves stay what they are.

    >>> tree = Arrays({"x": jnp.ones(2), "name": "fc"})
    >>> tree.filled([jnp.zeros(2)])["name"], len(tree.arrays)
    ('fc', 1)
    """

    def __init__(self, tree: Any, is_leaf: Callable[[Any], bool] | None = None):
        self._leaves, self._structure = jax.tree.flatten(tree, is_leaf)
        self._where = [
            i for i, x in enumerate(self._leaves) if isinstance(x, Array | np.ndarray)
        ]
        self.arrays = [self._leaves[i] for i in self._where]

    def taken(self) -> list[Array]:
        """Returns the arrays and forgets them: tracers must not outlive their trace."""
        arrays, self.arrays = self.arrays, []
        for i in self._where:
            self._leaves[i] = None
        return arrays

    def filled(self, arrays: list[Array]) -> Any:
        """Returns the tree with other arrays."""
        leaves = list(self._leaves)
        for i, array in zip(self._where, arrays, strict=True):
            leaves[i] = array
        return jax.tree.unflatten(self._structure, leaves)


def opened(op: Callable[[Any, Any], Any], x: Any, w: Any) -> tuple[Callable, Any]:
    """Returns `op` as `run(x, w, extras)`, and the extras that it closes over: a bias.

    They have to be arguments to get a gradient. (`jax.closure_convert` does it too, but
    keeps the last 4096 operations in memory, and the weights that they hold.)

    Args:
      op: any function of two trees of arrays.
      x, w: trees like those that `run` will be given.
    """
    closed, shapes = jax.make_jaxpr(op, return_shape=True)(x, w)
    # Not `closed` itself, whose constants are tracers: `run` outlives them.
    jaxpr, outputs = closed.jaxpr, jax.tree.structure(shapes)

    def run(x, w, extras):
        flat = eval_jaxpr(jaxpr, extras, *jax.tree.leaves((x, w)))
        return jax.tree.unflatten(outputs, flat)

    return run, closed.consts


def recomputed(forward: Callable) -> Callable:
    """Makes `forward` keep its arguments and tau for the backward pass, nothing else.

    `jax.checkpoint` says the same, but its barrier does not outlast XLA's optimisation:
    XLA merges the second update with the first, or makes it long before it is needed.

    Args:
      forward: `(x, w0, factors, extras, budget, key, tau)` to an output and tau; trees
        of arrays all. It searches for tau where it is None.
    """

    @jax.custom_vjp
    def run(x, w0, factors, extras, budget, key):
        return forward(x, w0, factors, extras, budget, key, None)[0]

    def keep(x, w0, factors, extras, budget, key):
        y, tau = forward(x, w0, factors, extras, budget, key, None)
        return y, ((x, w0, factors, budget, key, tau), extras)

    def pull(kept, cotangent):
        kept, extras = kept
        # The extras stay outside: a barrier would make them vary over a mesh's axes
        # inside `jax.shard_map`, where `op` was opened with ones that do not.
        kept, cotangent = _made_anew(kept, cotangent)
        x, w0, factors, budget, key, tau = kept
        _, back = jax.vjp(
            lambda *operands: forward(*operands, budget, key, tau)[0],
            *(x, w0, factors, extras),
        )
        return *back(cotangent), None, None

    run.defvjp(keep, pull)
    return run


def recomputed_from_rows(
    weight: Callable,
    op: Callable,
    small_op: Callable,
    sketch: Sketch,
    like: Array,
    axis: int,
) -> Callable:
    """Makes a product with a recomputed weight keep a sketch of `x` instead of `x`.

    The gradients of `x` and of the extras are those of `recomputed`, that of the weight
    is made of the sketches of `x` and of the cotangent.

    Args:
      weight: `(w0, factors, budget, tau)` to the weight and tau; as in `recomputed`.
      op: `(x, weight, extras)` to the output; but for its extras linear in `x`.
      small_op: `op` for the rows that a sketch leaves.
      sketch: rows that are kept.
      like: an array as `x`.
      axis: axis of the rows.

    Returns:
      A function of `x, rows, w0, factors, extras, more, budget, key`: `rows` are
      `sketch.kept(key, x, axis)`, `more` the extras of `small_op`.
    """
    zeros = functools.partial(_zeros, jax.typeof(like))

    @jax.custom_vjp
    def run(x, rows, w0, factors, extras, more, budget, key):
        return op(x, weight(w0, factors, budget, None)[0], extras)

    def keep(x, rows, w0, factors, extras, more, budget, key):
        merged, tau = weight(w0, factors, budget, None)
        kept = (rows, w0, factors, budget, key, tau)
        return op(x, merged, extras), (kept, extras, more)

    def pull(kept, cotangent):
        kept, extras, more = kept
        kept, cotangent = _made_anew(kept, cotangent)
        rows, w0, factors, budget, key, tau = kept
        merged, of_weight = jax.vjp(
            lambda w0, factors: weight(w0, factors, budget, tau)[0], w0, factors
        )
        # Linear in x, whose value is not needed: XLA drops the product with zeros.
        _, back = jax.vjp(lambda x, extras: op(x, merged, extras), zeros(), extras)
        dx, dextras = back(cotangent)
        x, g = sketch.of_both(key, rows, cotangent, axis)
        _, back = jax.vjp(lambda w: small_op(x, w, more), merged)
        dw0, dfactors = of_weight(*back(g))
        return dx, None, dw0, dfactors, dextras, None, None, None

    run.defvjp(keep, pull)
    return run


def _zeros(kind: Any) -> Array:
    """Makes zeros of the type of an array, its place on a mesh included."""
    sharding = None if kind.sharding.mesh.are_all_axes_auto else kind.sharding
    zeros = jax.lax.full(kind.shape, 0, kind.dtype, sharding=sharding)
    axes = tuple(kind.mat.varying)
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


def _made_anew(kept: tuple[Any, ...], cotangent: Any) -> tuple[tuple[Any, ...], Any]:
    """Returns both so that XLA makes the update anew, and not before the cotangent.

    Args:
      kept: x or its rows, w0, factors, budget, key and tau.
      cotangent: gradient of the output.
    """
    x, w0, factors, budget, key, tau = kept
    leaves, structure = jax.tree.flatten_with_path(factors)
    values = [value for _, value in leaves]
    # Every array of the weight's size is made of both factors, so one of them suffices.
    # More operations would be compiled for every matrix of a model.
    places = [i for i, (path, _) in enumerate(leaves) if path[-1].key == "a"]
    first = [values[i] for i in places]
    (x, w0, first, key, tau), cotangent = behind_one_barrier(
        (x, w0, first, key, tau), cotangent
    )
    # Never true, but XLA cannot know: the update made here needs tau, so it is not the
    # update that tau was found in.
    one = min(jax.tree.leaves(tau), key=jnp.size)
    never = jnp.any(jnp.isnan(one) & (one > 0))
    for i, value in zip(places, first, strict=True):
        values[i] = jnp.where(never, 0, value)
    factors = jax.tree.unflatten(structure, values)
    return (x, w0, factors, budget, key, tau), cotangent


def behind_one_barrier(kept: Any, cotangent: Any) -> tuple[Any, Any]:
    """Puts both behind one barrier, so that recomputing waits for the cotangent."""
    leaves, structure = jax.tree.flatten((kept, cotangent))
    # Cotangents of integers are of a dtype that XLA does not know.
    real = [i for i, x in enumerate(leaves) if x.dtype != jax.dtypes.float0]
    behind = jax.lax.optimization_barrier([leaves[i] for i in real])
    for i, value in zip(real, behind, strict=True):
        leaves[i] = value
    return jax.tree.unflatten(structure, leaves)
