"""Importance of a matrix: smoothed sensitivity times uncertainty (Eq. 7-11).

`track_importance` is an optax transformation that changes no update: it only watches
the factors `a` and `b` of every adapted matrix, wherever in the parameter tree a
mapping has both. Put it first in the chain, before clipping and the optimizer, so that
it sees the raw gradient.

    >>> import jax.numpy as jnp, optax
    >>> params = {"fc1": {"a": jnp.ones((2, 6, 4)), "b": jnp.ones((2, 3, 4))}}
    >>> tx = optax.chain(track_importance(), optax.sgd(0.1))
    >>> state = tx.init(params)
    >>> for scale in (1.0, 3.0):
    ...     grads = jax.tree.map(lambda p: scale * p, params)
    ...     _, state = tx.update(grads, state, params)
    >>> {path: round(float(score), 3) for path, score in importance(state).items()}
    {'fc1': 0.663}
"""

from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from snella_jax.core.factors import Pairs, factors
from snella_jax.core.placement import everywhere


class ImportanceState(NamedTuple):
    """State of `track_importance`.

    Attributes:
      step: int32 scalar, updates observed so far; skipped ones do not count.
      sensitivity: `I_bar`, float32, shaped like each matrix's `a` and `b`.
      uncertainty: `U_bar`, of the same shape.
    """

    step: Int[Array, ""]
    sensitivity: Pairs
    uncertainty: Pairs


# For `jax.export`; Flax's and optax's states are not registered by their libraries.
jax.export.register_namedtuple_serialization(
    ImportanceState, serialized_name="snella_jax.ImportanceState"
)


def track_importance(
    beta1: float = 0.85, beta2: float = 0.85, metric: str = "sensitivity"
) -> optax.GradientTransformation:
    """Smooths how much the loss depends on each factor; passes updates through.

    With `I = |theta * grad|` for each element of `a` and `b` (Eq. 7):
    `I_bar <- beta1 * I_bar + (1 - beta1) * I` (Eq. 9) and
    `U_bar <- beta2 * U_bar + (1 - beta2) * |I_bar - I|` (Eq. 10, with the new `I_bar`),
    starting from `I_bar = I`, `U_bar = 0` at the first update (Eq. 8).

    An update with a number that is not finite, anywhere in its tree, is skipped for all
    matrices: smoothed, one NaN would stay for good, and scores are only fit to compare
    if they saw the same steps. That is also what `optax.apply_if_finite` does with the
    parameters, so it may stand around this transformation or behind it. Factors that
    are not finite themselves are observed: no later step would mend them, so
    `reallocate` has to see it.

    Args:
      beta1: smoothing of the sensitivity, in [0, 1].
      beta2: smoothing of the uncertainty, in [0, 1].
      metric: "sensitivity", or "magnitude" for `I = |theta|` (the ablation of Table X).

    Raises:
      ValueError: a beta outside [0, 1] or an unknown metric; in `init`, a tree without
        factors; in `update`, no `params`.

    Source: Eq. 7-10; AdaLoRA (Zhang et al., arXiv 2303.10512).
    """
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if isinstance(beta, float | int) and not 0 <= beta <= 1:
            raise ValueError(f"{name}={beta}: expected 0 <= {name} <= 1.")
    if metric not in ("sensitivity", "magnitude"):
        raise ValueError(f'metric={metric!r}: expected "sensitivity" or "magnitude".')

    def init(params: optax.Params) -> ImportanceState:
        found = factors(params)
        if not found:
            raise ValueError(
                "track_importance found no factors: no mapping in the parameters has "
                "both `a` and `b`. Give it the trainable tree of an adapted model."
            )

        def zeros():  # arrays of its own for each tree: a step may donate them
            return jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), found)

        step = everywhere(jnp.zeros((), jnp.int32), jax.tree.leaves(found)[0])
        return ImportanceState(step, zeros(), zeros())

    def update(updates: Any, state: Any, params: Any = None):
        if params is None:
            raise ValueError(
                "track_importance needs params: tx.update(g, state, params)."
            )
        thetas, grads = factors(params), factors(updates)

        def observe(theta, grad):
            theta, grad = theta.astype(jnp.float32), grad.astype(jnp.float32)
            return jnp.abs(theta * grad if metric == "sensitivity" else theta)

        def smooth(old, new, beta):
            return beta * old + (1 - beta) * new

        one, two = map(_in_float32, (beta1, beta2))
        first = state.step == 0
        now = jax.tree.map(observe, thetas, grads)
        sensitivity = jax.tree.map(
            lambda old, new: jnp.where(first, new, smooth(old, new, one)),
            state.sensitivity,
            now,
        )
        uncertainty = jax.tree.map(
            lambda old, mean, new: smooth(old, jnp.abs(mean - new), two),
            state.uncertainty,
            sensitivity,
            now,
        )
        seen = ImportanceState(state.step + 1, sensitivity, uncertainty)
        use = _finite((updates, now)) | ~_finite(thetas)
        return updates, jax.tree.map(
            lambda new, old: jnp.where(use, new, old), seen, state
        )

    return optax.GradientTransformation(init, update)


def _in_float32(beta: Any) -> Any:
    """Returns a number as it is; an array (a hyperparameter) in the state's dtype."""
    return (
        jnp.asarray(beta, jnp.float32) if isinstance(beta, jax.Array) else float(beta)
    )


def _finite(tree: Any) -> Bool[Array, ""]:
    """Returns True if all floating-point numbers of a tree are finite."""
    floats = (
        x
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(x), jnp.floating)
    )
    finite = [jnp.isfinite(x).all() for x in floats]
    return jnp.stack(finite).all() if finite else jnp.array(True)


def importance(opt_state: Any) -> dict[str, Float[Array, " *lead"]]:
    """Scores every matrix by its sensitivity times its uncertainty (Eq. 11).

    `p = mean(I_bar_a * U_bar_a) + mean(I_bar_b * U_bar_b)`.

    Args:
      opt_state: any optax state that holds one `ImportanceState`.

    Returns:
      For the path of each adapted weight, one number per matrix: shape `[]`, or the
      leading axes of stacked blocks and slices.

    Raises:
      ValueError: there is no `ImportanceState` in `opt_state`, or more than one.
    """
    state = importance_state(opt_state)
    return _scores(state.sensitivity, state.uncertainty)


def importance_state(opt_state: Any) -> ImportanceState:
    """Returns the `ImportanceState` in an optax state; errors as in `importance`."""
    found = tracked(opt_state)
    if len(found) != 1:
        raise ValueError(
            f"The optimizer state holds {len(found)} importance states: expected one. "
            "Build the optimizer as optax.chain(snella.track_importance(), ...)."
        )
    return found[0]


def tracked(opt_state: Any) -> list[ImportanceState]:
    """Lists every `ImportanceState` in an optax state."""

    def is_importance(node: Any) -> bool:
        return isinstance(node, ImportanceState)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_importance)
    return [node for node in nodes if is_importance(node)]


@jax.jit
def _scores(sensitivity: Pairs, uncertainty: Pairs) -> dict[str, Array]:
    def mean(matrix: str, name: str) -> Array:
        product = sensitivity[matrix][name] * uncertainty[matrix][name]
        return product.mean((-3, -2, -1))  # pieces, rows, columns

    return {path: mean(path, "a") + mean(path, "b") for path in sensitivity}
