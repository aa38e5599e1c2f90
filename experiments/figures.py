"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure


def allocation(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws budget and importance of every matrix over the epochs.

    Args:
      path: the PNG to write.
      rows: of `metrics.jsonl`, of the epochs that began with a reallocation.
    """
    epochs = [row["epoch"] for row in rows]
    names = [name.removeprefix("blocks/") for name in rows[0]["importance"]]
    scores, budgets, capacities = (  # [L, rows]
        np.array([list(row[kind].values()) for row in rows], float).T
        for kind in ("importance", "budget", "capacity")
    )
    shares = scores / np.maximum(scores.sum(0), np.finfo(float).tiny)
    density, total = budgets / capacities, budgets.sum(0) / capacities.sum(0)

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
    totals = f"{total[0]:.2f} to {total[-1]:.2f} of all weights"
    right.set(title=f"Budget in the epoch ({totals})", xlabel="epoch")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def memory(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws a step's memory against the size of the model, a line for each method.

    Args:
      path: the PNG to write.
      rows: of `experiments.memory`.
    """
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
        title=f"{first['target']}, batch {first['batch']}, {first['dtype']}, frozen "
        f"weights {first['frozen_dtype']}",
    )
    figure.legend(fontsize=8, loc="outside right upper")
    _save(figure, path)


def throughput(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the seconds of a step, a bar for each method with its fastest and slowest.

    Args:
      path: the PNG to write.
      rows: of `experiments.throughput`.
    """
    names = [r["method"] + " + regularisers" * r["regularise"] for r in rows]
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
    _save(figure, path)


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
    _save(figure, path)


def frozen_features(path: Path, result: dict[str, Any]) -> None:
    """Draws accuracy by block, a panel for each kind of label, a line for each model.

    Args:
      path: the PNG to write.
      result: what `experiments.frozen_features` writes.
    """
    rows = result["rows"]
    labels = list(dict.fromkeys(row["labels"] for row in rows))
    figure, panels = plt.subplots(
        1, len(labels), figsize=(4 * len(labels), 4), layout="constrained"
    )
    for axes, label in zip(panels, labels, strict=True):
        for weights in dict.fromkeys(row["weights"] for row in rows):
            own = [r for r in rows if (r["labels"], r["weights"]) == (label, weights)]
            blocks = [row["block"] for row in own]
            accuracies = np.array([row["accuracies"] for row in own])
            mean, spread = accuracies.mean(1), accuracies.std(1)
            axes.plot(blocks, mean, marker="o", markersize=3, label=weights)
            axes.fill_between(blocks, mean - spread, mean + spread, alpha=0.2)
        axes.set(title=label, xlabel="block")
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("accuracy")
    panels[0].legend(title="weights")
    figure.suptitle(
        f"{result['model']}, frozen, on {result['data']}: ridge, {result['train']} "
        f"cells to train, mean and deviation of {result['splits']} splits"
    )
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
