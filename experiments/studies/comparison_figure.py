"""The figure of the comparison: accuracy against memory."""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from adjustText import adjust_text
from matplotlib import patheffects

from experiments import plotting
from experiments.plotting import plt
from experiments.reports.text import memory_setup


def accuracy_memory(
    path: Path, points: Sequence[dict[str, Any]], memory: dict[str, Any], setup: str
) -> None:
    """Draws accuracy against memory (the paper's Figure 7(a)).

    There is a panel for each task that has more than one method, or for each task if
    none has. A method that did not learn in every seed (its mean less its deviation is
    under half of the linear probe's accuracy) would squeeze all others together: it is
    an arrow at the lower edge, with its accuracy.

    Args:
      path: the PNG to write.
      points: `task`, `method`, `accuracy` (percent), `deviation` (or None) and `bytes`
        of each point.
      memory: a row of `memory.json`, for the title.
      setup: model and protocol of the accuracies, for the title.
    """
    counts = collections.Counter(point["task"] for point in points)
    tasks = [task for task in counts if counts[task] > 1] or list(counts)
    figure, panels = plt.subplots(
        len(tasks),
        1,
        figsize=(11, 1 + 5 * len(tasks)),
        sharex=True,
        layout="constrained",
    )
    labels = {}
    for axes, task in zip(np.atleast_1d(panels), tasks, strict=True):
        own = [point for point in points if point["task"] == task]
        learnt, not_learnt = _divided(own)
        labels[axes] = [_point(axes, point) for point in learnt]
        for point in not_learnt:
            _arrow(axes, point)
        axes.set(title=plotting.label(task), ylabel="test accuracy (%)")
        axes.margins(x=0.15, y=0.1)
    figure.supxlabel("peak memory of a step or first stage (GiB)", fontsize="medium")
    accuracy_of = f"accuracy: {plotting.label(setup)}"
    memory_of = f"memory: {memory['model']}, {memory_setup(memory)}"
    figure.suptitle(f"{accuracy_of}\n{memory_of}", fontsize="medium")
    figure.canvas.draw()  # now the panels are where they will be
    figure.set_layout_engine("none")
    for axes, texts in labels.items():
        arrows = {"arrowstyle": "-", "color": "grey", "linewidth": 0.6}
        adjust_text(texts, ax=axes, expand=(1.2, 1.8), arrowprops=arrows, iter_lim=900)
    plotting.save(figure, path)


def _divided(points: Sequence[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Divides points into those that learnt in every seed, and the others."""
    learnt, not_learnt = [], []
    accuracies = {point["method"]: point["accuracy"] for point in points}
    for point in points:
        lowest = point["accuracy"] - (point["deviation"] or 0)
        low = lowest < accuracies.get("linear probe", 0) / 2
        (not_learnt if low else learnt).append(point)
    return learnt, not_learnt


def _point(axes: Any, point: dict[str, Any]) -> Any:
    """Draws a method's mean and deviation; returns its label, to be moved."""
    x, y = point["bytes"] / 2**30, point["accuracy"]
    colour = "tab:red" if "SNELLA" in point["method"] else "tab:blue"
    axes.errorbar(x, y, point["deviation"], color=colour, elinewidth=0.7)
    axes.plot(x, y, "o", color=colour, zorder=4)
    # Over a deviation's line it stays readable, and no point is lost under it.
    halo = [patheffects.withStroke(linewidth=2, foreground="white")]
    text = {"fontsize": 8, "color": colour, "path_effects": halo, "zorder": 3}
    return axes.text(x, y, point["method"], **text)


def _arrow(axes: Any, point: dict[str, Any]) -> None:
    """Draws a method whose accuracy is far below the axis."""
    spread = f" ± {point['deviation']:.1f}" if point["deviation"] else ""
    axes.annotate(
        f"{point['method']}: {point['accuracy']:.1f}{spread}",
        (point["bytes"] / 2**30, 0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 18),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        arrowprops={"arrowstyle": "->"},
    )
