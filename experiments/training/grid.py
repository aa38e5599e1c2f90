"""Grid of a search, and its extension."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Grid:
    """Values that `--search` tries for every method that is trained by steps, besides
    the method's own."""

    lr_factors: tuple[float, ...] = (0.3, 3.0)
    """Factors on the method's rate, tried first."""
    lr_extensions: int = 2
    """Rates (strengths) beyond the lowest or highest while best."""
    weight_decays: tuple[float, ...] = (1e-3, 0.05)
    """Weight decays, tried with the best rate."""
    densities: tuple[float, ...] = (0.1, 0.6)
    """Target densities, where there is sparsity, tried last."""

    @property
    def is_single(self) -> bool:
        """True if a method's own settings are all that is tried."""
        return not (self.lr_factors or self.weight_decays or self.densities)


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
