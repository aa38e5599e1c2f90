"""Figures of a run."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from experiments import plotting
from experiments.data.source import Source
from experiments.plotting import plt
from experiments.training.objective import Metric, Objective

ACCURACY = Metric("accuracy", percent=True)
Block = Callable[[str], tuple[int, ...] | None]


def allocation(path: Path, rows: Sequence[dict[str, Any]], unit: str = "epoch") -> None:
    """Draws budget and importance of every matrix over the rounds.

    Args:
      path: the PNG to write.
      rows: those of `metrics.jsonl` whose rounds began with a reallocation; each
        stands until the next of them.
      unit: name of a round.
    """
    epochs = [row["epoch"] for row in rows]
    paths = list(rows[0]["importance"])
    names = [path.removeprefix("blocks/") for path in paths]
    scores, budgets, capacities = (  # [L, rows]
        np.array([[row[kind][path] for row in rows] for path in paths], float)
        for kind in ("importance", "budget", "capacity")
    )
    shares = scores / np.maximum(scores.sum(0), np.finfo(float).tiny)
    density, total = budgets / capacities, budgets.sum(0) / capacities.sum(0)

    height = max(3.6, 1.6 + 0.17 * len(names))  # inches: the bars have long labels
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, height), sharey=True, layout="constrained"
    )
    edges = np.array([*epochs, epochs[-1] + 1]) - 0.5, np.arange(len(names) + 1) - 0.5
    norm = LogNorm(vmin=1e-4, vmax=1, clip=True)
    mesh = left.pcolormesh(*edges, np.maximum(shares, 1e-4), norm=norm, cmap="magma")
    figure.colorbar(mesh, ax=left, label="share of the importance of all matrices")
    left.set(title=f"Importance before the {unit}", xlabel=unit)
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.invert_yaxis()
    mesh = right.pcolormesh(*edges, density, vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(mesh, ax=right, label="fraction of the matrix that may move")
    totals = f"{total[0]:.2f} to {total[-1]:.2f} of all weights"
    right.set(title=f"Budget in the {unit} ({totals})", xlabel=unit)
    for axes in (left, right):
        axes.xaxis.set_major_locator(_rounds())
    plotting.save(figure, path)


def curves(
    path: Path,
    methods: dict[str, list[dict[str, Any]]],
    task: str,
    metric: Metric = ACCURACY,
    unit: str = "epoch",
) -> None:
    """Draws training loss and a followed metric over the rounds, a line a method.

    Args:
      path: the PNG to write.
      methods: rows of `metrics.jsonl` by the method's title.
      task: its name.
      metric: the one to draw.
      unit: name of a round.
    """
    scale = 100 if metric.percent else 1
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.6), sharex=True, layout="constrained"
    )
    for title, rows in methods.items():
        known = [(r["epoch"], r["train_loss"]) for r in rows if "train_loss" in r]
        left.plot(*zip(*known, strict=True), marker=".", label=title)
        for split, style in (("val", "-"), ("test", "--")):
            key = f"{split}_{metric.name}"
            known = [(r["epoch"], scale * r[key]) for r in rows if key in r]
            if known:
                line = right.plot(*zip(*known, strict=True), style, marker=".")
                line[0].set_label(f"{title}, {split}")
    left.set(title="training loss", yscale="log")
    right.set(title=metric.name + ", %" * metric.percent)
    if not right.lines:
        right.annotate("nothing was followed", (0.5, 0.5), ha="center",
                       xycoords="axes fraction")  # fmt: skip
        right.set_yticks([])
    for axes in (left, right):
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(_rounds())
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.suptitle(plotting.label(task))
    plotting.save(figure, path)


def _rounds() -> MaxNLocator:
    """Returns a locator of ticks at whole rounds, of which there may be one."""
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def sparsity(
    path: Path,
    row: dict[str, Any],
    task: str,
    unit: str = "epoch",
    block: Block | None = None,
) -> None:
    """Draws final sparsity by depth with its linear fit, as the paper's Figure 10.

    A bar is a block, a dot one of its matrices: the share that may not move.

    Args:
      path: the PNG to write.
      row: that of `metrics.jsonl` whose round was the last to begin with a
        reallocation.
      task: its name.
      unit: name of a round.
      block: of a matrix's name; None for `block_of`.
    """
    budget, capacity = row["budget"], row["capacity"]
    groups = blocks_of(budget, block)
    depth = {n: place for place, own in enumerate(groups.values()) for n in own}
    named, blocks = list(depth), range(len(groups))
    shares = [kept_still(row, own) for own in groups.values()]
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    axes.bar(blocks, shares, color="tab:blue", alpha=0.4, label="block")
    kinds = list(dict.fromkeys(kind_of(name) for name in named))
    for index, kind in enumerate(kinds):
        aside = 0.6 * ((index + 0.5) / len(kinds) - 0.5)  # beside one another
        own = [name for name in named if kind_of(name) == kind]
        places = [depth[name] + aside for name in own]
        values = [1 - budget[name] / capacity[name] for name in own]
        axes.plot(places, values, "o", markersize=4, label=kind)
    if len(blocks) > 1:
        slope, start = np.polyfit(blocks, shares, 1)
        line = [start + slope * b for b in blocks]
        axes.plot(blocks, line, color="black", label=f"fit, {slope:+.3f} a block")
    axes.set(xlabel="block", ylabel="share that may not move", ylim=(-0.03, 1.03))
    axes.set_title(f"{plotting.label(task)}: sparsity in {unit} {row['epoch']}")
    labels = [".".join(map(str, block)) for block in groups]
    axes.set_xticks(blocks, labels, rotation=90 * any("." in text for text in labels))
    figure.legend(loc="outside right upper", fontsize=8)
    plotting.save(figure, path)


def predictions(
    path: Path, objective: Objective, source: Source, outputs: Sequence[tuple[int, Any]]
) -> None:
    """Draws a model's outputs for some examples, side by side.

    Args:
      path: the PNG to write.
      objective: draws each of them.
      source: has the examples.
      outputs: indices of examples, and what the model makes of them.
    """
    figure, row = plt.subplots(
        1,
        len(outputs),
        figsize=(1.6 * len(outputs), 2),
        squeeze=False,
        layout="constrained",
    )
    for axes, (index, output) in zip(row[0], outputs, strict=True):
        axes.axis("off")
        objective.draw(axes, source[index], output)
    plotting.save(figure, path)


def block_of(name: str) -> tuple[int, ...] | None:
    """Returns the block of a matrix, after its stage if it has one; None for no block.

    >>> block_of("blocks/attn/query[3]"), block_of("blocks/11/mlp/fc1")
    ((3,), (11,))
    >>> block_of("blocks/2/mlp/fc1[5]"), block_of("blocks/2/shifted/attn/query[3]")
    ((2, 5), (2, 7))
    """
    numbers = [int(number) for number in re.findall(r"(?<![a-zA-Z])\d+", name)]
    if not numbers:
        return None
    pair = re.search(r"/(plain|shifted)/", name)
    if pair:  # the number is that of two blocks
        numbers[-1] = 2 * numbers[-1] + (pair[1] == "shifted")
    return tuple(numbers)


def blocks_of(
    names: Iterable[str], block: Block | None = None
) -> dict[tuple[int, ...], list[str]]:
    """Returns the matrices of every block, by depth; those of no block are left out.

    >>> blocks_of(["blocks/10/mlp/fc1", "blocks/9/mlp/fc1", "head", "blocks/9/out"])
    {(9,): ['blocks/9/mlp/fc1', 'blocks/9/out'], (10,): ['blocks/10/mlp/fc1']}
    """
    found = {name: (block or block_of)(name) for name in names}
    every = sorted({block for block in found.values() if block is not None})
    return {block: [n for n, own in found.items() if own == block] for block in every}


def kept_still(row: dict[str, Any], names: Sequence[str]) -> float:
    """Returns the share of some matrices' weights that may not move.

    Args:
      row: one of `metrics.jsonl` that has budgets.
    """
    budget, capacity = (sum(row[k][n] for n in names) for k in ("budget", "capacity"))
    return 1 - budget / capacity


def kind_of(name: str) -> str:
    """Returns the kind of a matrix: its name within the block.

    >>> kind_of("blocks/attn/query[3]"), kind_of("blocks/11/mlp/fc1")
    ('query', 'fc1')
    """
    return re.sub(r"\[\d+\]", "", name).rsplit("/", 1)[-1]
