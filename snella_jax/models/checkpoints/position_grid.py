"""Grids of position embeddings at another size."""

import numpy as np
from jaxtyping import Float


def resize(
    grid: Float[np.ndarray, "H W D"], size: tuple[int, int]
) -> Float[np.ndarray, "h w D"]:
    """Resizes a grid: bicubic, half-pixel centres, a = -0.75, float64; borders repeat.

    Equal to `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`,
    with which position embeddings were trained. (`jax.image.resize` has a = -0.5.)

    >>> resize(np.arange(4.0).reshape(2, 2, 1), (2, 2))[..., 0].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    rows, columns = (_weights(*pair) for pair in zip(grid.shape, size, strict=False))
    numbers = np.asarray(grid, np.float64)
    return np.einsum("hH,wW,HWd->hwd", rows, columns, numbers, optimize=True)


def _weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        source = np.floor(centres).astype(int) + tap
        share = _cubic(centres - source)
        np.add.at(weights, (np.arange(new), np.clip(source, 0, old - 1)), share)
    return weights


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Computes Keys' kernel (IEEE TASSP 1981)."""
    x = np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))
