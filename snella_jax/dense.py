"""Kernel, sparsifier and recompute at one matmul: `y = x @ (W0 + delta)`.

`delta` is made from the factors on the way forward, forgotten, and made again on the
way back: what stays for the backward pass is what the matmul keeps anyway (`x`, `W0`),
the factors, and one threshold per matrix.

    >>> import jax, jax.numpy as jnp
    >>> from snella_jax import kernels
    >>> kernel = kernels.mix_k()
    >>> factors = kernel.init(jax.random.key(0), (6, 4), rank=8)
    >>> x, w0 = jnp.ones((2, 6)), jnp.zeros((6, 4))
    >>> y = adapted_dense(x, w0, factors, 0, kernel=kernel)  # a budget of 0: the base
    >>> float(abs(y - x @ w0).max())
    0.0
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import eval_jaxpr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from snella_jax import stochastic
from snella_jax.contraction import matmul
from snella_jax.kernels import Factors, Kernel
from snella_jax.layout import Layout
from snella_jax.sparsify import TAU, check_budget, check_gate, sparsify, threshold
from snella_jax.varying import varying_alike

Path = Literal["merged", "parallel"]
Op = Callable[[Array, Array], Array]
Sharding = jax.sharding.Sharding | jax.sharding.PartitionSpec


def sparse_delta(
    factors: Factors,
    budget: int | Int[Array, " *slices"],
    *,
    kernel: Kernel,
    gate: str = "product",
    layout: Layout | None = None,
) -> Float[Array, " *weight"]:
    """The sparse update of one weight, in the weight's shape and at least float32.

    Args:
      factors: with the leading axes `layout.slices`.
      budget: weights that survive, one number for each slice.
      kernel: makes the dense update.
      gate: what a survivor's value becomes, see `sparsify`.
      layout: the weight's axes; None for an `[n, m]` matrix.

    Source: Eq. 5, 6 and 13.
    """
    return _delta_and_tau(factors, budget, None, kernel, gate, layout)[0]


def _delta_and_tau(factors, budget, tau, kernel, gate, layout):
    """The update and its thresholds `[*slices]`, searched for where `tau` is None."""

    def one(factors, budget, tau):
        with jax.named_scope("snella_delta"):  # as profilers show it
            dense = kernel.apply(layout.unfold(factors) if layout else factors)
        with jax.named_scope("snella_threshold"):
            if tau is None and gate == "none":  # nothing to search for: _recomputed
                tau = jax.lax.stop_gradient(jnp.max(dense))
            if tau is None:
                tau = checkpoint_name(threshold(dense, budget), TAU)
        with jax.named_scope("snella_delta"):
            return sparsify(dense, budget, gate, tau), tau

    if layout is None:
        return one(factors, budget, tau)
    for _ in layout.slices:
        one = jax.vmap(one)
    delta, tau = one(factors, budget, tau)
    return layout.place(delta), tau


def adapted(
    op: Op, layout: Layout | None = None, update_op: Op | None = None
) -> Callable[..., Array]:
    """Makes `op(x, w)` an operation whose weight is `w0 + delta(factors, budget)`.

    Args:
      op: linear in its weight: a matmul, an einsum, a convolution, with or without a
        bias it closes over.
      layout: the weight's axes; None for an `[n, m]` matrix.
      update_op: `op` without its bias, for the parallel path; None where `op` has none.

    Returns:
      A function with the arguments and the errors of `adapted_dense`.
    """
    update_op = update_op or op

    def apply(
        x: Array,
        w0: Array,
        factors: Factors,
        budget: int | Array,
        *,
        kernel: Kernel,
        gate: str = "product",
        path: Path = "merged",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        key: PRNGKeyArray | None = None,
        sharding: Sharding | None = None,
    ) -> Array:
        check_gate(gate)
        check_path(path, dropout, drop_path)
        check_budget(budget)
        _check_shapes(w0, factors, layout)

        if not isinstance(budget, Array):
            budget = jnp.asarray(np.minimum(budget, w0.size), jnp.int32)
        # Outside `_recomputed`, for the transpose to add up the gradients.
        x, w0, factors, budget, key = varying_alike(x, w0, factors, budget, key)
        parallel = path == "parallel"
        base, extras = _opened(op, x, w0)
        branch, more = _opened(update_op, x, w0) if parallel else (base, ())

        def forward(x, w0, factors, extras, budget, key, tau):
            delta, tau = _delta_and_tau(factors, budget, tau, kernel, gate, layout)
            if sharding is not None:
                delta = jax.lax.with_sharding_constraint(delta, sharding)
            if not parallel:
                with jax.named_scope("snella_delta"):
                    merged = (w0 + delta).astype(x.dtype)
                return base(x, merged, extras[0]), tau
            with jax.named_scope("snella_delta"):
                update = delta.astype(x.dtype)
            y = base(x, w0.astype(x.dtype), extras[0])
            if key is None:
                return y + branch(x, update, extras[1]), tau
            key_x, key_y = jax.random.split(key)
            dropped = stochastic.dropout(key_x, x, dropout)
            moved = branch(dropped, update, extras[1])
            return y + stochastic.drop_path(key_y, moved, drop_path), tau

        extras = varying_alike(x, (extras, more))[1]
        return _recomputed(forward)(x, w0, factors, extras, budget, key)

    return apply


def _opened(op: Op, x: Array, w0: Array) -> tuple[Callable[..., Array], Any]:
    """`op(x, w, extras)` and the extras: what `op` closes over, such as a bias.

    They have to be arguments to get a gradient. (`jax.closure_convert` does it too, but
    keeps the last 4096 operations in memory, and the weights that they hold.)
    """
    closed = jax.make_jaxpr(op)(x, w0.astype(x.dtype))

    def run(x, w, extras):
        return eval_jaxpr(closed.jaxpr, extras, x, w)[0]

    return run, closed.consts


def _recomputed(forward: Callable) -> Callable[..., Array]:
    """`forward`, which keeps its arguments and tau for the backward pass, nothing else.

    `jax.checkpoint` says the same, but its barrier does not outlast XLA's optimisation:
    XLA merges the second update with the first, or makes it long before it is needed.
    """

    @jax.custom_vjp
    def run(x, w0, factors, extras, budget, key):
        return forward(x, w0, factors, extras, budget, key, None)[0]

    def keep(x, w0, factors, extras, budget, key):
        y, tau = forward(x, w0, factors, extras, budget, key, None)
        return y, (x, w0, factors, extras, budget, key, tau)

    def pull(kept, cotangent):
        kept, cotangent = jax.lax.optimization_barrier((kept, cotangent))
        x, w0, factors, extras, budget, key, tau = kept
        # Never true, but XLA cannot know: the update made here needs tau, so it is not
        # the update that tau was found in.
        never = jnp.any(jnp.isnan(tau) & (tau > 0))
        factors = {k: jnp.where(never, 0, v) for k, v in factors.items()}
        operands = (x, w0, factors, extras)
        _, back = jax.vjp(
            lambda *operands: forward(*operands, budget, key, tau)[0], *operands
        )
        return *back(cotangent), None, None

    run.defvjp(keep, pull)
    return run


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
) -> Float[Array, "... m"]:
    """`x @ (w0 + delta)`, `delta` made from the factors, sparsified and never stored.

    Args:
      x: activations; the matmul runs in their dtype. Axis 0 is the example where
        `drop_path` is used.
      w0: the frozen kernel. Its gradient, where one asks for it, is that of a dense
        layer.
      factors: what `kernel.init` gives for `(n, m)`.
      budget: how many weights of `w0` move; may be traced, a change does not recompile.
      kernel: makes the update; static.
      gate: what a survivor's value becomes, see `sparsify`.
      path: "merged" adds `delta` to `w0` in at least float32, casts once and needs one
        matmul. "parallel" computes `x @ w0 + drop_path(dropout(x) @ delta)`: it takes
        the two regularisers of the released recipe, and in bfloat16 it keeps updates
        that merging would round away.
      dropout: rate on the input of the update. Needs `path="parallel"`.
      drop_path: rate at which an example loses its whole update. Needs
        `path="parallel"`.
      key: switches the two regularisers on (training); None for evaluation. A mask is
        drawn again on the way back, not stored. Inside `jax.shard_map` each shard needs
        a key of its own, or their masks are the same.
      sharding: constrains `delta`, which otherwise follows `w0`.

    Raises:
      ValueError: a gate or path that does not exist, a rate outside [0, 1) or without
        `path="parallel"`, or factors whose shapes do not fit `w0`.

    Source: Eq. 14; the parallel path is the released code's.
    """
    return adapted(matmul)(
        x,
        w0,
        factors,
        budget,
        kernel=kernel,
        gate=gate,
        path=path,
        dropout=dropout,
        drop_path=drop_path,
        key=key,
        sharding=sharding,
    )


def check_path(path: str, dropout: float, drop_path: float) -> None:
    """Raises a `ValueError` on an unknown path or rates that it cannot take."""
    if path not in ("merged", "parallel"):
        raise ValueError(f"No path is called {path!r}: expected merged, parallel.")
    for name, rate in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0 <= rate < 1:
            raise ValueError(f"{name}={rate}: expected 0 <= rate < 1.")
        if rate and path == "merged":
            raise ValueError(
                f'{name}={rate} needs path="parallel": after merging there is no '
                "separate update to drop."
            )


def _check_shapes(w0: Array, factors: Factors, layout: Layout | None) -> None:
    if layout is None and w0.ndim != 2:
        raise ValueError(
            f"w0 has shape {w0.shape}: expected [n, m]. adapted() takes a Layout."
        )
    layout = layout or Layout(w0.shape[:1], w0.shape[1:])
    given = {name: factors[name].shape for name in ("a", "b")}
    lead = len(layout.slices)
    pieces, columns = given["a"][lead : lead + 1], given["a"][-1:]
    expected = {
        "a": (*layout.slices, *pieces, layout.n, *columns),
        "b": (*layout.slices, *pieces, layout.m, *columns),
    }
    if w0.shape != layout.shape or given != expected:
        raise ValueError(
            f"w0 has shape {w0.shape} and the factors {given}: expected {layout.shape} "
            f"and {expected}."
        )
