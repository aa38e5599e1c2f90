"""The sparse update of one weight: kernel, threshold and gate (Eq. 5, 6 and 13).

>>> import jax
>>> from snella_jax import kernels
>>> kernel = kernels.mix_k()
>>> factors = kernel.init(jax.random.key(0), (6, 4), rank=8)
>>> int((sparse_delta(factors, 5, kernel=kernel) != 0).sum())
5
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from snella_jax.core import gates
from snella_jax.core.layout import Layout
from snella_jax.kernels import Factors, Kernel, is_measured
from snella_jax.ops.names import kept
from snella_jax.ops.threshold import check_budget, threshold

Found = dict[str, Any]  # "tau" [*slices] and "statistics" of the kernel


def sparse_delta(
    factors: Factors,
    budget: int | Int[Array, " *slices"],
    *,
    kernel: Kernel,
    gate: str = "product",
    layout: Layout | None = None,
) -> Float[Array, " *weight"]:
    """Returns the sparse update of one weight, in its shape and at least float32.

    Args:
      factors: factors with the leading axes `layout.slices`.
      budget: weights that survive, one number for each slice.
      kernel: makes the dense update.
      gate: value of a survivor, see `sparsify`.
      layout: the weight's axes; None for an `[n, m]` matrix.

    Raises:
      ValueError: `gate` is not in the table, or as in `threshold`.

    Source: Eq. 5, 6 and 13.
    """
    return delta_and_found(factors, budget, None, kernel, gate, layout)[0]


def delta_and_found(
    factors: Factors,
    budget: int | Int[Array, " *slices"],
    found: Found | None,
    kernel: Kernel,
    gate: str,
    layout: Layout | None,
) -> tuple[Float[Array, " *weight"], Found]:
    """Returns the update, and what it is made again with in fewer passes.

    Args:
      found: what the first call returned; None for that call.
      factors, budget, kernel, gate, layout: as in `sparse_delta`.
    """

    check_budget(budget)
    if not isinstance(budget, Array):  # a number may be larger than int32 holds
        budget = jnp.asarray(np.minimum(budget, np.iinfo(np.int32).max), jnp.int32)
    one = functools.partial(_measured if is_measured(kernel) else _plain, kernel, gate)
    if layout is None:
        return one(factors, budget, found)

    def unfolded(factors, budget, found):
        return one(layout.unfold(factors), budget, found)

    for _ in layout.slices:
        unfolded = jax.vmap(unfolded)
    delta, found = unfolded(factors, budget, found)
    return layout.place(delta), found


Search = Callable[[list[int], list[Array], list[Array]], list[Array]]


def found_together(
    parts: Sequence[tuple[Kernel, str, Layout | None]],
    factors: Sequence[Factors],
    budgets: Sequence[Array],
    search: Search,
) -> list[Found]:
    """Returns what each of several updates is made with, as `delta_and_found` takes it.

    No gradient passes.

    Args:
      parts: kernel, gate and layout of each.
      factors, budgets: as in `sparse_delta`, of each.
      search: finds the thresholds of those of some positions, given their dense updates
        and budgets, as `thresholds` does.
    """
    dense, found = [], []
    for (kernel, _, layout), own in zip(
        parts, jax.lax.stop_gradient(factors), strict=True
    ):
        made, statistics = _made_first(kernel, layout)(own)
        dense.append(made)
        found.append({} if statistics is None else {"statistics": statistics})
    with jax.named_scope("snella_threshold"):
        # As in `_searched`.
        dense = jax.lax.optimization_barrier(dense)
        searched = [i for i, (_, gate, _) in enumerate(parts) if gate != "none"]
        operands = ([own[i] for i in searched] for own in (dense, budgets))
        taus = iter(search(searched, *operands) if searched else ())
        for i, own in enumerate(found):
            axes = tuple(range(budgets[i].ndim, dense[i].ndim))
            own["tau"] = next(taus) if i in searched else jnp.max(dense[i], axes)
    return jax.tree.map(kept, found)


def _made_first(kernel: Kernel, layout: Layout | None) -> Callable[..., Any]:
    """Returns what makes the dense updates of all slices, and their statistics."""

    def one(factors):
        factors = factors if layout is None else layout.unfold(factors)
        if is_measured(kernel):
            return _first(kernel, factors)
        with jax.named_scope("snella_delta"):
            return kernel.apply(factors), None

    for _ in () if layout is None else layout.slices:
        one = jax.vmap(one)
    return one


def _plain(kernel, gate, factors, budget, found):
    """Returns the update and what was found; its gradient is JAX's."""
    with jax.named_scope("snella_delta"):  # as profilers show it
        dense = kernel.apply(factors)
    if found is None:
        dense, tau = _searched(dense, budget, gate)
        found = {"tau": kept(tau)}
    return _gated(dense, budget, gate, found), found


def _measured(kernel, gate, factors, budget, found):
    """Returns the update and what was found; its gradient is the kernel's."""
    dense = None
    if found is None:
        dense, statistics = _first(kernel, jax.lax.stop_gradient(factors))
        dense, tau = _searched(dense, budget, gate)
        # Outside the custom gradient, where rematerialised blocks do not see it.
        found = jax.tree.map(kept, {"tau": tau, "statistics": statistics})
    return _made(kernel, gate, factors, budget, found, dense), found


# Under jit, matrices of one shape are traced and lowered once; XLA inlines it.
@functools.partial(jax.jit, static_argnums=0)
def _first(kernel, factors):
    with jax.named_scope("snella_delta"):
        return kernel.measured(factors)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _made(kernel, gate, factors, budget, found, dense):
    return _traced_once(kernel, gate, factors, budget, found, dense)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _traced_once(kernel, gate, factors, budget, found, dense):
    if dense is None:
        with jax.named_scope("snella_delta"):
            dense = kernel.again(factors, found["statistics"])
    return _gated(dense, budget, gate, found)


def _forward(kernel, gate, factors, budget, found, dense):
    # Not `_traced_once`: where this is itself differentiated, the rules below hold.
    delta = _made(kernel, gate, factors, budget, found, dense)
    return delta, (factors, budget, found)


def _backward(kernel, gate, arguments, cotangent):
    return _pulled(kernel, gate, *arguments, cotangent), None, None, None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1))
def _pulled(kernel, gate, factors, budget, found, cotangent):
    def through_gate(dense):
        return gates.pull(dense, budget, gate, found["tau"], cotangent)

    with jax.named_scope("snella_delta"):
        return kernel.pull(factors, found["statistics"], through_gate)


@_pulled.defjvp
def _pulled_twice(kernel, gate, primals, tangents):
    """Second derivatives: through the kernel, as no gradient passes its statistics."""
    factors, budget, found, cotangent = primals

    def update(factors):
        dense = kernel.apply(factors)
        # To the last bit what tau was found among.
        exact = kernel.again(jax.lax.stop_gradient(factors), found["statistics"])
        dense += jax.lax.stop_gradient(exact - dense)
        return _gated(dense, budget, gate, found)

    def pulled(factors, cotangent):
        return jax.vjp(update, factors)[1](cotangent)[0]

    varied = (tangents[0], tangents[3])
    return jax.jvp(pulled, (factors, cotangent), varied)


_made.defvjp(_forward, _backward)


def _searched(dense, budget, gate):
    with jax.named_scope("snella_threshold"):
        if gate == "none":  # nothing to search for
            return dense, jax.lax.stop_gradient(jnp.max(dense))
        # Made again for the comparison, it could round across the threshold.
        dense = jax.lax.optimization_barrier(dense)
        return dense, threshold(dense, budget)


def _gated(dense, budget, gate, found):
    with jax.named_scope("snella_delta"):
        return gates.sparsify(dense, budget, gate, found["tau"])
