"""Recomputes in the backward pass what a plain call would keep.

An adapted call keeps its arguments and its thresholds for the backward pass, and no
update, no sum of weights and nothing that the call made on its way. A block of a model
that is rematerialised keeps its arguments and what its layers mark with `kept`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import eval_jaxpr
from jaxtyping import Array

KEPT = "snella_jax.kept"  # the name that `kept` gives, for checkpoint policies


def kept(value: Array) -> Array:
    """Marks an array that `rematerialised` keeps: small, and costly to make again."""
    return checkpoint_name(value, KEPT)


def named(value: Array, name: str) -> Array:
    """Names an array that `rematerialised` keeps if it is told so."""
    return checkpoint_name(value, f"snella_jax.{name}")


def rematerialised(
    function: Callable, *, keep: Iterable[str] = (), prevent_cse: bool = True
) -> Callable:
    """Recomputes a function in its backward pass, but for what is marked with `kept`.

    Args:
      function: function of trees of arrays.
      keep: names that `named` gave; their arrays are kept, too.
      prevent_cse: as in `jax.checkpoint`; False inside a scan.

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
        kept, cotangent = _together(kept, cotangent)
        x, w0, factors, budget, key, tau = kept
        # Never true, but XLA cannot know: the update made here needs tau, so it is not
        # the update that tau was found in.
        never = jnp.zeros((), bool)
        for one in jax.tree.leaves(tau):
            never |= jnp.any(jnp.isnan(one) & (one > 0))
        factors = jax.tree.map(lambda v: jnp.where(never, 0, v), factors)
        operands = (x, w0, factors, extras)
        _, back = jax.vjp(
            lambda *operands: forward(*operands, budget, key, tau)[0], *operands
        )
        return *back(cotangent), None, None

    run.defvjp(keep, pull)
    return run


def _together(kept: Any, cotangent: Any) -> tuple[Any, Any]:
    """Puts both behind one barrier, so that recomputing waits for the cotangent."""
    leaves, structure = jax.tree.flatten((kept, cotangent))
    # Cotangents of integers are of a dtype that XLA does not know.
    real = [i for i, x in enumerate(leaves) if x.dtype != jax.dtypes.float0]
    behind = jax.lax.optimization_barrier([leaves[i] for i in real])
    for i, value in zip(real, behind, strict=True):
        leaves[i] = value
    return jax.tree.unflatten(structure, leaves)
