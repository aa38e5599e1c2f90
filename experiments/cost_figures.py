"""Figures of what methods cost: memory, seconds, and accuracy for memory."""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from adjustText import adjust_text
from matplotlib import patheffects

from experiments import figures
from experiments.figures import plt
from experiments.showing import drawn


def memory(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws a step's memory: against the size of several models, or bars for one.

    Args:
      path: the PNG to write.
      rows: of `experiments.memory`.
    """
    if len({row["model"] for row in rows}) > 1:
        _memory_by_size(path, rows)
    else:
        _memory_by_method(path, rows)


def _memory_by_method(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: row["total_bytes"])
    names = [row["method"] for row in rows]
    height = 1.2 + 0.25 * len(rows)
    figure, axes = plt.subplots(figsize=(7, height), layout="constrained")
    totals = [row["total_bytes"] / 2**30 for row in rows]
    firsts = [row["locating_bytes"] / 2**30 for row in rows]
    steps = [
        sum(row[f"{part}_bytes"] for part in ("argument", "temporary", "result"))
        / 2**30
        for row in rows
    ]
    if any(firsts):
        axes.barh(names, firsts, color="tab:orange", height=0.7, label="first stage")
    axes.barh(names, steps, color="tab:blue", height=0.7, label="training step")
    for index, total in enumerate(totals):
        axes.annotate(
            f"{total:.2f}",
            (total, index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    first = rows[0]
    axes.set(
        xlabel="peak memory (GiB)",
        xlim=(0, 1.1 * max(totals)),
        title=f"{first['model']}, {_setting(first)}",
    )
    axes.legend(loc="lower right", fontsize=8)
    figures.save(figure, path)


def _setting(row: dict[str, Any]) -> str:
    return (
        f"{row['target']}, batch {row['batch']}, {row['dtype']}, frozen weights "
        f"{row['frozen_dtype']}"
    )


def _memory_by_size(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = sorted(
            (row["parameters"] / 1e6, row["total_bytes"] / 2**30)
            for row in rows
            if row["method"] == method
        )
        axes.plot(*zip(*own, strict=True), marker="o", label=method)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for capacity in (16, 24, 80):  # what vendors call GB is GiB on their cards
        axes.axhline(capacity, color="grey", linestyle=":", linewidth=1)
        axes.annotate(
            f"{capacity} GB",
            (0.005, capacity),
            color="grey",
            va="bottom",
            xycoords=("axes fraction", "data"),
        )
    ticks = {row["model"]: row["parameters"] / 1e6 for row in rows}
    labels = [f"{name}\n{size:.0f} M" for name, size in ticks.items()]
    axes.set_xticks(list(ticks.values()), labels)
    first = rows[0]
    axes.set(
        ylabel="peak memory of a step (GiB)",
        ylim=(None, max(110, 1.2 * max(row["total_bytes"] for row in rows) / 2**30)),
        title=_setting(first),
    )
    figure.legend(fontsize=8, loc="outside right upper")
    figures.save(figure, path)


def accuracy_memory(
    path: Path, points: Sequence[dict[str, Any]], memory: dict[str, Any], setup: str
) -> None:
    """Draws accuracy against memory (the paper's Figure 7(a)).

    A panel for each task that has more than one method; for each, if none has. A method
    that did not learn in every seed (its mean less its deviation is under half of the
    linear probe's accuracy) would squeeze all others together: it is an arrow at the
    lower edge, with its accuracy.

    Args:
      path: the PNG to write.
      points: with `task`, `method`, `accuracy` (percent), `deviation` (or None) and
        `bytes`.
      memory: a row of `experiments.memory`, for what the bytes are of.
      setup: what the accuracies are of.
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
        axes.set(title=drawn(task), ylabel="test accuracy (%)")
        axes.margins(x=0.15, y=0.1)
    figure.supxlabel("peak memory of a step or first stage (GiB)", fontsize="medium")
    what = f"accuracy: {drawn(setup)}\nmemory: {memory['model']}, {_setting(memory)}"
    figure.suptitle(what, fontsize="medium")
    figure.canvas.draw()  # now the panels are where they will be
    figure.set_layout_engine("none")
    for axes, texts in labels.items():
        arrows = {"arrowstyle": "-", "color": "grey", "linewidth": 0.6}
        adjust_text(texts, ax=axes, expand=(1.2, 1.8), arrowprops=arrows, iter_lim=900)
    figures.save(figure, path)


def _divided(points: Sequence[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """What has learnt, and what has not (or not in every seed)."""
    learnt, not_learnt = [], []
    accuracies = {point["method"]: point["accuracy"] for point in points}
    for point in points:
        lowest = point["accuracy"] - (point["deviation"] or 0)
        low = lowest < accuracies.get("linear probe", 0) / 2
        (not_learnt if low else learnt).append(point)
    return learnt, not_learnt


def _point(axes: Any, point: dict[str, Any]) -> Any:
    """A method's mean and deviation; gives its label, to be moved."""
    x, y = point["bytes"] / 2**30, point["accuracy"]
    colour = "tab:red" if "SNELLA" in point["method"] else "tab:blue"
    axes.errorbar(x, y, point["deviation"], color=colour, elinewidth=0.7)
    axes.plot(x, y, "o", color=colour, zorder=4)
    # Over a deviation's line it stays readable, and no point is lost under it.
    halo = [patheffects.withStroke(linewidth=2, foreground="white")]
    text = {"fontsize": 8, "color": colour, "path_effects": halo, "zorder": 3}
    return axes.text(x, y, point["method"], **text)


def _arrow(axes: Any, point: dict[str, Any]) -> None:
    """A method whose accuracy is far below the axis."""
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


def throughput(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the seconds of a step, a bar for each method with its fastest and slowest.

    Args:
      path: the PNG to write.
      rows: of `experiments.throughput`.
    """
    names = [row["method"] for row in rows]
    medians = np.array([row["median_seconds"] for row in rows])
    ends = np.array([(min(row["seconds"]), max(row["seconds"])) for row in rows]).T
    height = 1.2 + 0.35 * len(rows)
    figure, axes = plt.subplots(figsize=(7, height), layout="constrained")
    axes.barh(names, medians, xerr=np.abs(ends - medians), color="tab:blue", height=0.6)
    for index, row in enumerate(rows):
        if "of_lora" in row:
            axes.annotate(
                f"{row['of_lora']:.2f} of LoRA",
                (0, index),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color="white",
                fontsize=8,
            )
    first = rows[0]
    axes.invert_yaxis()
    axes.set(
        xlabel="seconds per step (median; fastest to slowest)",
        title=f"{first['model']}, batch {first['batch']}, {first['dtype']}: "
        f"{first['device']}",
    )
    figures.save(figure, path)


def profile(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the parts of a step's time, a bar for each method.

    Args:
      path: the PNG to write.
      rows: of `experiments.profile`.
    """
    names = [row["method"] for row in rows]
    height = 1.6 + 0.5 * len(rows)
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    left = np.zeros(len(rows))
    for part in rows[0]["parts"]:
        seconds = np.array([row["parts"][part] for row in rows])
        axes.barh(names, seconds, left=left, label=part, height=0.6)
        left += seconds
    first = rows[0]
    axes.invert_yaxis()
    axes.set(
        xlabel="seconds of a step",
        title=f"{first['model']}, batch {first['batch']}, {first['dtype']}: "
        f"{first['device']}",
    )
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figures.save(figure, path)
