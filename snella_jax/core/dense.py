"""Kernel, sparsifier and recompute at one matmul: `y = x @ (W0 + delta)`.

`delta` is made from the factors in the forward pass, dropped, and made again in the
backward pass, for which only what the matmul keeps anyway (`x`, `W0`), the factors and
one threshold per matrix stay in memory.

    >>> import jax, jax.numpy as jnp
    >>> from snella_jax import kernels
    >>> kernel = kernels.mix_k()
    >>> factors = kernel.init(jax.random.key(0), (6, 4), rank=8)
    >>> x, w0 = jnp.ones((2, 6)), jnp.zeros((6, 4))
    >>> y = adapted_dense(x, w0, factors, 0, kernel=kernel)  # a budget of 0: the base
    >>> float(abs(y - x @ w0).max())
    0.0
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from snella_jax.core.fused import Implementation, fall_back
from snella_jax.core.layout import Layout
from snella_jax.core.update import Path, Update
from snella_jax.kernels import Factors, Kernel
from snella_jax.ops.dropout import drop_path, dropout
from snella_jax.ops.dtypes import at_least_float32
from snella_jax.ops.explicit import lying_as
from snella_jax.ops.matmul import matmul
from snella_jax.ops.recompute import opened, recomputed, recomputed_from_rows
from snella_jax.ops.sketch import Kind, Sketch
from snella_jax.ops.varying import varying_alike

Op = Callable[[Array, Array], Array]
Sharding = jax.sharding.Sharding | jax.sharding.PartitionSpec


def summed(w0: Array, delta: Array) -> Array:
    """Returns `w0 + delta` in at least float32, whatever JAX promotes by itself."""
    wide = at_least_float32(w0.dtype, delta.dtype)
    return w0.astype(wide) + delta.astype(wide)


def adapted(
    op: Op, layout: Layout | None = None, update_op: Op | None = None
) -> Callable[..., Array]:
    """Makes `op(x, w)` an operation whose weight is `w0 + delta(factors, budget)`.

    Args:
      op: linear in its weight: a matmul, an einsum, a convolution, with or without a
        bias it closes over. On the merged path any function of its weight, and one that
        returns a tree of arrays. With a sketch linear in `x`, too, whose last axis it
        multiplies row by row.
      layout: the weight's axes; None for an `[n, m]` matrix.
      update_op: `op` without its bias, for the parallel path; None where `op` has none.

    Returns:
      A function with the arguments and the errors of `adapted_dense`.
    """

    def apply(
        x: Array,
        w0: Array,
        factors: Factors,
        budget: int | Array,
        *,
        key: PRNGKeyArray | None = None,
        sharding: Sharding | None = None,
        sketch: int = 1,
        sketch_kind: Kind = "sample",
        keep_rows: tuple[int, ...] = (),
        **how: Any,
    ) -> Array:
        rows = Sketch(sketch, sketch_kind, keep_rows)
        update = Update(layout=layout, sketch=rows, **how)
        run = updated(op, update, update_op)
        return run(x, w0, factors, budget, key=key, sharding=sharding)

    return apply


def updated(
    op: Op, update: Update, update_op: Op | None = None
) -> Callable[..., Array]:
    """Makes `op(x, w)` an operation whose weight has an update.

    Args:
      op, update_op: as in `adapted`.
      update: way in which the update is made and added.

    Returns:
      `apply(x, w0, factors, budget, key=None, sharding=None, rows=None)`, with the
      errors of `adapted_dense`; `rows` are `update.sketch.kept(key, x)` where another
      layer has made them.
    """
    update_op = update_op or op
    parallel = update.path == "parallel"

    def apply(
        x: Array,
        w0: Array,
        factors: Factors,
        budget: int | Array,
        key: PRNGKeyArray | None = None,
        sharding: Sharding | None = None,
        rows: Array | None = None,
    ) -> Array:
        update.check(w0, factors, budget)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(f"x is {x.dtype}: expected floats, as x.astype(w0.dtype).")
        budget = _counted(budget, w0)
        # Outside `recomputed`, for the transpose to add up the gradients. (Not the
        # extras: as traced, `op` itself makes of them what it needs.)
        operands = varying_alike(x, w0, factors, budget, key, rows)
        x, w0, factors, budget, key, rows = operands
        cast = w0.astype(x.dtype)
        base, extras = opened(op, x, cast)

        changed, merged = _making(update, sharding, x.dtype)
        sketch, axis = update.sketch, update.row_axis(x)
        sketching = key is not None and update.sketches(x)
        if key is not None and sketching and rows is None:
            rows = sketch.kept(key, jax.lax.stop_gradient(x), axis)
        fused = update.fused(op, x, w0, factors, sharding, sketching)
        if fused is not None:
            y = fused(x, rows if sketching else None, w0, factors, budget, key)
            return _with_rows(y, x, axis) if sketching else y
        if sketching:
            run, more = _from_rows(op, base, merged, sketch, axis, (x, rows, cast, key))
            y = run(x, rows, w0, factors, extras, more, budget, key)
            return _with_rows(y, x, axis)
        branch, more = opened(update_op, x, cast) if parallel else (base, ())

        def forward(x, w0, factors, extras, budget, key, tau):
            if not parallel:
                weight, tau = merged(w0, factors, budget, tau)
                return base(x, weight, extras[0]), tau
            delta, tau = changed(w0, factors, budget, tau)
            with jax.named_scope("snella_delta"):
                change = delta.astype(x.dtype)
            y = base(x, w0.astype(x.dtype), extras[0])
            if key is None:
                return y + branch(x, change, extras[1]), tau
            key_x, key_y = jax.random.split(key)
            moved = branch(dropout(key_x, x, update.dropout), change, extras[1])
            return y + drop_path(key_y, moved, update.drop_path), tau

        return recomputed(forward)(x, w0, factors, (extras, more), budget, key)

    return apply


def _making(
    update: Update, sharding: Sharding | None, dtype: DTypeLike
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns what makes an update, and what makes a merged weight in a dtype.

    Each is a function of `w0`, factors, budget and what was found (None at first), and
    also returns what it found.
    """

    def changed(w0, factors, budget, found):
        make = lying_as(w0, update.delta)
        delta, found = make(factors, budget, found)
        if sharding is not None:
            delta = jax.lax.with_sharding_constraint(delta, sharding)
        return delta, found

    def merged(w0, factors, budget, found):
        delta, found = changed(w0, factors, budget, found)
        with jax.named_scope("snella_delta"):
            return summed(w0, delta).astype(dtype), found

    return changed, merged


def _from_rows(
    op: Op, base: Callable, merged: Callable, sketch: Sketch, axis: int, like: Any
) -> tuple[Callable[..., Array], Any]:
    """Returns a product that keeps rows of its input, and what `op` closes over there.

    Args:
      op, base: the product, and the same as `opened` gave it.
      merged: makes the weight, see `_making`.
      sketch, axis: rows that are kept, and where they are.
      like: the input, its rows, the weight and the key, or arrays like them.
    """
    x, rows, weight, key = like
    if not sketch.saves:
        few_rows = functools.partial(sketch.of_input, axis=axis)
        rows = jax.eval_shape(few_rows, key, rows)
    few, more = opened(op, rows, weight)
    return recomputed_from_rows(merged, base, few, sketch, x, axis), more


def adapted_call(
    op: Callable[[Any, dict[str, Array]], Any], updates: Mapping[str, Update]
) -> Callable[..., Any]:
    """Makes `op(x, weights)` a function whose weights are `w0 + delta`.

    For calls that are not a single matmul, such as a layer with several weights. The
    whole call is recomputed in the backward pass.

    Args:
      op: any function of a tree of arrays and of arrays by name; returns a tree.
      updates: updates by name of the weight.

    Returns:
      `apply(x, w0, factors, budgets)`, the last three by name. Weights are summed in at
      least float32 and given to `op` in the dtype of `w0`.

    Raises:
      ValueError: by `apply`, as `adapted_dense`.

    >>> import jax.numpy as jnp
    >>> from snella_jax import kernels
    >>> update = Update(kernels.rbf())
    >>> factors = update.kernel.init(jax.random.key(0), (6, 4), rank=8)
    >>> both = adapted_call(lambda x, w: (x @ w["up"], x.sum()), {"up": update})
    >>> w0 = {"up": jnp.ones((6, 4))}
    >>> y, total = both(jnp.ones(6), w0, {"up": factors}, {"up": 0})
    >>> y.tolist(), float(total)
    ([6.0, 6.0, 6.0, 6.0], 6.0)
    """

    def apply(
        x: Any,
        w0: Mapping[str, Array],
        factors: Mapping[str, Factors],
        budgets: Mapping[str, int | Array],
    ) -> Any:
        for name, update in updates.items():
            update.check(w0[name], factors[name], budgets[name])
            if update.implementation == "pallas":
                fall_back("a layer with a call of its own")
        counts = {name: _counted(budgets[name], w0[name]) for name in updates}
        weights, own = dict(w0), {name: dict(factors[name]) for name in updates}
        x, weights, own, counts = varying_alike(x, weights, own, counts)
        run, extras = opened(op, x, weights)

        def forward(x, w0, factors, extras, budgets, key, taus):
            merged, found = {}, {}
            for name, update in updates.items():
                tau = None if taus is None else taus[name]
                make = lying_as(w0[name], update.delta)
                delta, found[name] = make(factors[name], budgets[name], tau)
                with jax.named_scope("snella_delta"):
                    merged[name] = summed(w0[name], delta).astype(w0[name].dtype)
            return run(x, merged, extras), found

        return recomputed(forward)(x, weights, own, extras, counts, None)

    return apply


def adapted_dense(
    x: Float[Array, "... n"],
    w0: Float[Array, "n m"],
    factors: Factors,
    budget: int | Int[Array, ""],
    *,
    kernel: Kernel,
    gate: str = "product",
    path: Path = "merged",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    key: PRNGKeyArray | None = None,
    sharding: Sharding | None = None,
    sketch: int = 1,
    sketch_kind: Kind = "sample",
    keep_rows: tuple[int, ...] = (),
    implementation: Implementation = "auto",
) -> Float[Array, "... m"]:
    """Computes `x @ (w0 + delta)`; the sparse `delta` is made anew and never stored.

    Args:
      x: activations; the matmul runs in their dtype. Axis 0 is the example where
        `drop_path` is used.
      w0: the frozen kernel. Its gradient, if asked for, is that of a dense layer.
      factors: factors that `kernel.init` draws for `(n, m)`.
      budget: number of weights of `w0` that move; may be traced, a change does not
        recompile.
      kernel: makes the update; static.
      gate: value of a survivor, see `sparsify`.
      path: "merged" adds `delta` to `w0` in at least float32, casts once and needs one
        matmul. "parallel" computes `x @ w0 + drop_path(dropout(x) @ delta)`: it takes
        the two regularisers of the released recipe, and in bfloat16 it keeps updates
        that merging would round away.
      dropout: rate on the input of the update. Needs `path="parallel"`.
      drop_path: rate at which an example loses its whole update. Needs
        `path="parallel"`.
      key: switches the two regularisers and the sketch on (training); None for
        evaluation. A mask is drawn again in the backward pass, not stored. Inside
        `jax.shard_map` each shard needs a key of its own, or their masks are the same.
      sharding: constrains `delta`, which otherwise follows `w0`.
      sketch: rows of `x` to one that is kept for the way back, see `Sketch`; 1 for all.
        The gradients of the factors (and of `w0`) are then unbiased estimates, that of
        `x` stays exact. Needs `path="merged"`.
      sketch_kind: "sample", "strided" or "crs".
      keep_rows: positions on axis -2 of `x` that are always kept, such as `(0,)` for a
        class token.
      implementation: "xla", plain JAX; "pallas", fused kernels for a TPU or an NVIDIA
        GPU, which make `delta` tile by tile and store nothing of its size (on a GPU the
        merged weight alone): for `mix_k` and `piecewise_linear` over "out", all gates
        but "none", the merged path, one device or `jax.shard_map`, and at most float32.
        Elsewhere it falls back to "xla" and logs once why. "auto" is "xla": on an H200
        the kernels took longer, and on a TPU they were not timed.

    Raises:
      ValueError: a gate, path or implementation that does not exist, a rate outside
        [0, 1) or without `path="parallel"`, a sketch below 1, of an unknown kind or on
        that path, a budget that is negative, no integer or no scalar, or factors whose
        shapes do not fit `w0`.

    Source: Eq. 14; the parallel path is the released code's.

    >>> import jax.numpy as jnp
    >>> from snella_jax import kernels
    >>> kernel = kernels.mix_k()
    >>> factors = kernel.init(jax.random.key(0), (6, 4), rank=8)
    >>> x, w0 = jnp.ones((2, 9, 6)), jnp.zeros((6, 4))
    >>> layer = lambda key: adapted_dense(  # keeps 3 of 9 rows
    ...     x, w0, factors, 5, kernel=kernel, sketch=4, key=key
    ... )
    >>> bool((layer(jax.random.key(1)) == layer(None)).all())  # but for gradients
    True
    """
    rows = Sketch(sketch, sketch_kind, keep_rows)
    drops = dropout, drop_path
    update = Update(kernel, gate, None, path, *drops, rows, implementation)
    return updated(matmul, update)(x, w0, factors, budget, key, sharding)


def _with_rows(y: Array, x: Array, axis: int) -> Array:
    """Returns `y`; raises a `ValueError` unless its rows are those of `x`."""
    if jnp.shape(y)[: axis + 1] != x.shape[: axis + 1]:
        raise ValueError(
            f"An input of shape {x.shape} gave an output of shape {jnp.shape(y)}: a "
            "sketch needs one output for each row. Expected sketch=1."
        )
    return y


def _counted(budget: int | Array, w0: Array) -> Array:
    """Returns a budget as an array; a number may be larger than the weight."""
    if isinstance(budget, Array):
        return budget
    return jnp.asarray(np.minimum(budget, w0.size), jnp.int32)
