"""Grid of a search, and its extension."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Grid:
    """Values that `--search` tries for every method that is trained by steps, besides
    the method's own."""

    lr_factors: tuple[float, ...] = (0.3, 3.0)
    """Times the method's learning rate; first, with the method's other settings."""
    lr_extensions: int = 2
    """Further rates, beyond the lowest or the highest as long as that one is best; the
    linear probe's strengths go on as far."""
    weight_decays: tuple[float, ...] = (1e-3, 0.05)
    """Then, with the best rate."""
    densities: tuple[float, ...] = (0.1, 0.6)
    """Target densities, where there is sparsity; last, with the best rate and decay."""


def beyond(values: Sequence[float], best: float) -> list[float]:
    """Returns the next value where the best of several is the lowest or the highest.

    >>> beyond([0.02, 0.01, 0.04], 0.04), beyond([0.02, 0.01, 0.04], 0.02)
    ([0.08], [])
    """
    ordered = sorted(set(values))
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return []
    inner = ordered[1] if best == ordered[0] else ordered[-2]
    return [best * (best / inner)]
