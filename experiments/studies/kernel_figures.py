"""Figures of the kernels, as the paper's Figure 4."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments import plotting
from experiments.plotting import plt


def curves(path: Path, result: dict[str, Any]) -> None:
    """Draws every kernel in one dimension, and its slope (Figure 4(a)).

    Args:
      path: the PNG to write.
      result: content of `kernel_curves.json`: `x`, where the kernels were evaluated,
        and `rows`, each with `kernel`, `values` and `slopes`.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = {
        "values": "kernel of 0 and x (a product: of 1 and x)",
        "slopes": "its slope",
    }
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        for row in result["rows"]:
            axes.plot(result["x"], row[name], label=row["kernel"])
        axes.set(title=title, xlabel="x")
        axes.axhline(0, color="lightgrey", linewidth=0.8, zorder=0)
    panels[0].legend(fontsize=8)
    plotting.save(figure, path)


def fitting(path: Path, result: dict[str, Any]) -> None:
    """Draws how well kernels fit sparse matrices (Figure 4(b)).

    Args:
      path: the PNG to write.
      result: content of `matrix_fitting.json`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, own in result["kernels"].items():
        errors = np.array(own["errors"])
        deviation = errors.std(1, ddof=min(1, errors.shape[1] - 1))
        mean = errors.mean(1)
        left.errorbar(result["ranks"], mean, deviation, marker="o", capsize=3)
        right.plot(own["steps"], np.mean(own["curves"], 0), label=name)
    left.set(title="after the last step", xlabel="rank of the matrix")
    left.set_xscale("log", base=2)
    left.set_xticks(result["ranks"], result["ranks"])
    right.set(title="mean over all matrices", xlabel="steps", xscale="log")
    for axes in (left, right):
        axes.set_ylabel("MSE (fitting nothing: 1)")
        axes.set_ylim(bottom=0)
    right.legend(fontsize=8)
    sign = "non-negative " * result["positive"]
    figure.suptitle(
        f"{result['matrices']} sparse {sign}matrices of each rank, {result['size']} x "
        f"{result['size']}, by factors of rank {result['rank']}"
    )
    plotting.save(figure, path)
