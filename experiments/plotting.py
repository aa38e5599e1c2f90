"""Matplotlib without a display: `plt`, labels, masks on images and PNG files."""

import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Bool, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

if "ipykernel" not in sys.modules:  # a notebook shows figures of its own
    matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from experiments.paths import printable

__all__ = ["label", "overlay", "plt", "save"]


def label(name: str) -> str:
    r"""Returns a name as matplotlib draws it: `$` does not begin a formula.

    >>> print(label("$5 to $9"))
    \$5 to \$9
    """
    return printable(name).replace("$", r"\$")


def overlay(
    axes: Axes,
    image: UInt8[np.ndarray, "H W 3"],
    mask: Bool[np.ndarray, "H W"],
    truth: Bool[np.ndarray, "H W"] | None = None,
) -> None:
    """Draws an image, a mask as a translucent layer on it, and the contour of another.

    Both contours have a dark edge, to be seen on any colour.

    Args:
      mask: the layer, blue with a white contour.
      truth: the mask whose contour is drawn, yellow; None for none.
    """
    axes.imshow(image)
    layer = np.zeros((*mask.shape, 4))
    layer[...] = (*to_rgb("tab:blue"), 0)
    layer[mask, 3] = 0.5
    axes.imshow(layer)
    for own, colour in ((mask, "white"), (truth, "yellow")):
        if own is not None and 0 < own.mean() < 1:
            lines = axes.contour(own, levels=[0.5], colors=colour, linewidths=1)
            lines.set(path_effects=[withStroke(linewidth=2, foreground="black")])


def save(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Writes a figure as a PNG and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # letters that the font draws as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(path, dpi=dpi)
    plt.close(figure)
