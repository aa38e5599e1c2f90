"""Figures of the cost of a training step: memory, seconds and their parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import plotting
from experiments.plotting import plt
from experiments.reports.text import memory_setup


def label(row: dict[str, Any]) -> str:
    """Returns how tables and figures call a row: method, sketch, layout.

    >>> label({"method": "lora"}), label({"method": "lora", "sketch": 4})
    ('lora', 'lora, sketch 4')
    >>> label({"method": "snella", "factors": "local"})
    'snella, local'
    """
    factor = row.get("sketch", 1)  # rows of before have none
    parts = [row["method"]] + [f"sketch {factor}"] * (factor != 1)
    return ", ".join(parts + ["local"] * (row.get("factors") == "local"))


def memory(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws a step's memory: against the size of several models, or bars for one.

    Args:
      path: the PNG to write.
      rows: rows of `memory.json`.
    """
    if len({row["model"] for row in rows}) > 1:
        _memory_by_size(path, rows)
    else:
        _memory_by_method(path, rows)


def _memory_by_method(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: row["total_bytes"])
    names = [label(row) for row in rows]
    height = 1.2 + 0.25 * len(rows)
    figure, axes = plt.subplots(figsize=(7, height), layout="constrained")
    totals = [row["total_bytes"] / 2**30 for row in rows]
    firsts = [row["locating_bytes"] / 2**30 for row in rows]
    fit = [row.get("fits", True) for row in rows]
    steps = [
        total
        if not fits
        else sum(row[f"{part}_bytes"] for part in ("argument", "temporary", "result"))
        / 2**30
        for row, fits, total in zip(rows, fit, totals, strict=True)
    ]
    if any(firsts):
        axes.barh(names, firsts, color="tab:orange", height=0.7, label="first stage")
    bars = axes.barh(names, steps, color="tab:blue", height=0.7, label="training step")
    for bar in (bar for bar, fits in zip(bars, fit, strict=True) if not fits):
        bar.set(color="lightgrey")
    for index, total in enumerate(totals):
        axes.annotate(
            f"{total:.2f}" + " does not fit" * (not fit[index]),
            (total, index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    first = rows[0]
    axes.set(
        xlabel="peak memory (GiB)",
        xlim=(0, (1.1 if all(fit) else 1.3) * max(totals)),
        title=f"{first['model']}, {memory_setup(first)}{_chips(first)}",
    )
    if any(firsts):
        axes.legend(loc="lower right", fontsize=8)
    plotting.save(figure, path)


def _chips(row: dict[str, Any]) -> str:
    return f"\na chip, {row['mesh']}, rank {row['rank']}" if "mesh" in row else ""


def _memory_by_size(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for method in dict.fromkeys(map(label, rows)):
        own = sorted(
            (row["parameters"] / 1e6, row["total_bytes"] / 2**30)
            for row in rows
            if label(row) == method
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
        title=memory_setup(first),
    )
    figure.legend(fontsize=8, loc="outside right upper")
    plotting.save(figure, path)


def memory_curve(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws memory through a step: a line a method, as the paper's Figure 7(b).

    Args:
      path: the PNG to write.
      rows: rows of `memory_curve.json`.
    """
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for index, row in enumerate(rows):
        curve = np.array(row["curve"]) / 2**30
        places = (np.arange(len(curve)) + 0.5) / len(curve)
        axes.plot(places, curve, color=f"C{index}", label=label(row))
        axes.plot(places[curve.argmax()], curve.max(), "o", color=f"C{index}")
    first = rows[0]
    axes.set(
        xlabel="place in the schedule (share of the instructions, not of the time)",
        ylabel="live bytes (GiB)",
        ylim=(0, None),
        title=f"{first['model']}, {memory_setup(first)}",
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    plotting.save(figure, path)


def throughput(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the seconds of a step: a bar for each method, from fastest to slowest.

    Args:
      path: the PNG to write.
      rows: rows of `throughput.json`.
    """
    names = [label(row) for row in rows]
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
    plotting.save(figure, path)


def profile(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the parts of a step's time: a bar for each method.

    Args:
      path: the PNG to write.
      rows: rows of `profile.json`.
    """
    names = [label(row) for row in rows]
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
    plotting.save(figure, path)
