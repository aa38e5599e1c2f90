"""Matplotlib without a display: `plt`, labels and PNG files."""

import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.paths import printable

__all__ = ["label", "plt", "save"]


def label(name: str) -> str:
    r"""Returns a name as matplotlib draws it: `$` does not begin a formula.

    >>> print(label("$5 to $9"))
    \$5 to \$9
    """
    return printable(name).replace("$", r"\$")


def save(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Writes a figure as a PNG and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # letters that the font draws as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(path, dpi=dpi)
    plt.close(figure)
