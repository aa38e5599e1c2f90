"""Moves budgets between matrices by what the optimizer's state says of them."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from snella_jax.core.budgets import FIXED, allocate, whole
from snella_jax.core.importance import ImportanceState, importance, importance_state
from snella_jax.core.paths import path_of
from snella_jax.core.weight import indexed
from snella_jax.files.hosts import to_host

log = logging.getLogger("snella_jax")


@dataclasses.dataclass(frozen=True)
class Reallocation:
    """Result of `reallocate`, with an entry for each of `L` matrices.

    Attributes:
      step: optimizer steps when it was called, but those that `track_importance`
        skipped because a gradient was not finite.
      steps_since: steps since the reallocation before it (or since the start).
      names: path of the weight, with the index of the matrix where it has several.
      scores: float64 `[L]`, importance.
      budgets: int64 `[L]`, weights that may move now.
      capacities: int64 `[L]`, weights there are.
      died: names whose budget fell to 0 now. Such a matrix gets no gradient and a
        sensitivity that fades to 0, so it may never come back.
    """

    step: int
    steps_since: int
    names: tuple[str, ...]
    scores: Float[np.ndarray, " L"]
    budgets: Int[np.ndarray, " L"]
    capacities: Int[np.ndarray, " L"]
    died: tuple[str, ...]

    @property
    def density(self) -> float:
        """Fraction of all adapted weights that may move now."""
        return float(self.budgets.sum() / self.capacities.sum())


def reallocate(
    budgets: Any,
    opt_state: Any,
    total: int,
    *,
    scores: Mapping[str, Array | np.ndarray] | None = None,
    floor: float = 0.0,
) -> tuple[Any, Reallocation]:
    """Moves the budgets: `total` weights, divided by importance (Algorithm 1).

    Runs on the host, once an epoch in the paper. Shapes, dtypes and shardings stay, so
    the training step does not recompile.

    Args:
      budgets: the tree that `partition` gave, or any tree with a `budget` and an
        `allocated_at` beside every pair of factors.
      opt_state: the optimizer's state, with `track_importance` in it.
      total: weights that may move from now on, from a `budget_schedule`.
      scores: one array of scores per adapter path instead of `importance(opt_state)`.
      floor: share of `total` that is divided evenly, whatever the scores, see
        `allocate`; above 0 no matrix dies whose part of it is at least 1.

    Returns:
      The new budgets, and a `Reallocation` that says what went where.

    Raises:
      TypeError: `total` is no integer (a density, say).
      ValueError: no step was taken yet, no gradient reached the factors, the budgets
        are fixed, budgets and optimizer belong to different models, or scores or total
        are not fit to allocate by (see `allocate`).
    """
    total = whole(total)
    state = importance_state(opt_state)
    step = int(state.step)
    if step == 0:
        raise ValueError(
            "reallocate was called before any step whose gradients were finite: there "
            "is no importance to go by. Train a step with snella.track_importance() in "
            "the optimizer first."
        )
    measured = scores is None
    scores = importance(opt_state) if scores is None else scores
    old = _competing(budgets, state, scores)
    given = {path: to_host(scores[path]).astype(np.float64) for path in old}
    # The first step has no gradient where a factor starts at 0, nor has the second
    # where a warm-up began at a rate of 0.
    if measured and step > 2 and not any(score.any() for score in given.values()):
        raise ValueError(
            f"no gradient reached the factors in {step} steps: all scores are 0, and "
            "nothing but chance would divide the budget. Is the loss computed by the "
            "adapted model (its call or `adapters.apply`, not the plain module's apply "
            "nor code that reads a layer's kernel itself), and are the factors among "
            "the parameters that it is differentiated by?"
        )
    room = {path: np.full(old[path].shape, _capacity(state, path)) for path in old}
    counts = allocate(_flat(given), total, _flat(room), floor)

    names = matrix_names(old)
    died = tuple(
        name
        for name, before, now in zip(names, _flat(old), counts, strict=True)
        if before and not now
    )
    if died:
        log.warning("no budget left, so these may never come back: %s", ", ".join(died))
    report = Reallocation(
        step=step,
        steps_since=steps_since_reallocation(budgets, opt_state),
        names=names,
        scores=_flat(given),
        budgets=counts,
        capacities=_flat(room),
        died=died,
    )
    sizes = [value.size for value in old.values()]
    parts = np.split(counts, np.cumsum(sizes)[:-1])
    return _replaced(budgets, dict(zip(old, parts, strict=True)), step), report


def steps_since_reallocation(budgets: Any, opt_state: Any) -> int:
    """Counts optimizer steps since the budgets last moved, or since the start.

    Budgets that came from a file without their optimizer's state are as those that
    never moved, as long as they are ahead of this optimizer's steps.

    Args:
      budgets: second part of `snella.partition(model)`, or its like in Linen or a tree.
      opt_state: state of an optimizer with `track_importance`, which counts its steps.

    Raises:
      ValueError: there are no budgets, or no `track_importance` in the state.
    """
    now = int(importance_state(opt_state).step)
    last = [
        int(leaf.max())
        for (_, name), leaf in _leaves_by_path(budgets).items()
        if name == "allocated_at"
    ]
    if not last:
        raise ValueError(
            "There are no budgets: expected those of snella.partition(model)."
        )
    return now - max((step for step in last if 0 <= step <= now), default=0)


def _competing(
    budgets: Any, state: ImportanceState, scores: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns the budgets by adapter path, int64; raises if one of them is fixed."""
    leaves = _leaves_by_path(budgets)
    fixed = [path for (path, _), leaf in leaves.items() if (leaf == FIXED).any()]
    if fixed:
        raise ValueError(
            f"The budgets of {fixed} are fixed: they were adapted with "
            'SnellaConfig(allocation="fixed") and do not compete.'
        )
    current = {path: leaf for (path, name), leaf in leaves.items() if name == "budget"}
    if not current.keys() == scores.keys() == state.sensitivity.keys():
        raise ValueError(
            f"The budgets are those of {sorted(current)}, the optimizer follows "
            f"{sorted(state.sensitivity)} and there are scores for {sorted(scores)}: "
            "expected the same adapters."
        )
    return {path: leaf.astype(np.int64) for path, leaf in current.items()}


def _replaced(budgets: Any, counts: Mapping[str, np.ndarray], step: int) -> Any:
    """Puts other numbers into leaves, with their shape, dtype and sharding."""

    def replace(key_path, leaf):
        path, name = _split(key_path)
        value = counts[path].reshape(leaf.shape) if name == "budget" else step
        full = np.broadcast_to(np.asarray(value, leaf.dtype), leaf.shape)
        # Committing what was not committed would compile the training step again.
        committed = isinstance(leaf, jax.Array) and leaf.committed
        return jax.device_put(full, leaf.sharding if committed else None)

    return jax.tree_util.tree_map_with_path(replace, budgets)


def _capacity(state: ImportanceState, path: str) -> int:
    pair = state.sensitivity[path]
    return pair["a"].shape[-2] * pair["b"].shape[-2]


def _flat(values: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([value.ravel() for value in values.values()])


def matrix_names(values: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Names every matrix: `values` has an array of their numbers by adapter path."""
    return tuple(
        indexed(re.sub("[/_]adapter$", "", path), index)
        for path, value in values.items()
        for index in np.ndindex(value.shape)
    )


def _leaves_by_path(budgets: Any) -> dict[tuple[str, str], np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(budgets)
    return {_split(key_path): to_host(leaf) for key_path, leaf in leaves}


def _split(key_path: tuple) -> tuple[str, str]:
    *parent, name = path_of(key_path)
    return "/".join(parent), name
