"""Numbers of the budgets, to log."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array

from snella_jax.core.reallocation import matrix_names
from snella_jax.core.weight import AdaptedWeight
from snella_jax.files.hosts import to_host


def density(weights: Sequence[AdaptedWeight]) -> float:
    """Returns the fraction of all adapted weights that may move."""
    now = sum(int(to_host(w.budget).astype(np.int64).sum()) for w in weights)
    return now / sum(weight.w0.size for weight in weights)


def densities(weights: Sequence[AdaptedWeight]) -> dict[str, float]:
    """Returns that fraction of all weights, and of each matrix as `density/NAME`."""
    found = {"density": density(weights)}
    for weight in weights:
        shares = to_host(weight.budget).ravel() / weight.site.capacity
        for name, share in zip(weight.names, shares, strict=True):
            found[f"density/{name}"] = float(share)
    return found


def importances(scores: dict[str, Array]) -> dict[str, float]:
    """Returns the score of each matrix as `importance/NAME`, of `importance`."""
    values = {path: to_host(score) for path, score in scores.items()}
    flat = np.concatenate([score.ravel() for score in values.values()])
    names = matrix_names(values)
    return {f"importance/{n}": float(x) for n, x in zip(names, flat, strict=True)}
