"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

import snella_jax as snella


def allocation(
    path: Path, moves: Sequence[snella.Reallocation], epochs: Sequence[int]
) -> None:
    """Draws budget and importance of every matrix over the epochs.

    Args:
      path: the PNG to write.
      moves: every reallocation of a run, in order.
      epochs: the epoch (from 1) that each of them began.
    """
    names = [name.removeprefix("blocks/") for name in moves[0].names]
    scores = np.stack([move.scores for move in moves], axis=1)  # [L, moves]
    shares = scores / np.maximum(scores.sum(0), np.finfo(float).tiny)
    density = np.stack([move.budgets / move.capacities for move in moves], axis=1)

    height = 1.6 + 0.17 * len(names)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, height), sharey=True, layout="constrained"
    )
    extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(names) - 0.5, -0.5)
    settings = {"aspect": "auto", "extent": extent, "interpolation": "nearest"}
    norm = LogNorm(vmin=1e-4, vmax=1, clip=True)
    drawn = left.imshow(np.maximum(shares, 1e-4), norm=norm, cmap="magma", **settings)
    figure.colorbar(drawn, ax=left, label="share of the importance of all matrices")
    left.set(title="Importance before the epoch", xlabel="epoch")
    left.set_yticks(range(len(names)), names, fontsize=7)
    drawn = right.imshow(density, vmin=0, vmax=1, cmap="viridis", **settings)
    figure.colorbar(drawn, ax=right, label="fraction of the matrix that may move")
    totals = f"{moves[0].density:.2f} to {moves[-1].density:.2f} of all weights"
    right.set(title=f"Budget in the epoch ({totals})", xlabel="epoch")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
