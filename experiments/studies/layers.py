"""Compares what runs allotted to their layers: the paper's Figures 10 and 16.

    python -m experiments.studies.layers --runs runs/caltech101 runs/idrid runs/dsprites
    python -m experiments.studies.layers --runs runs/sensitivity runs/magnitude

takes run folders of `python -m experiments.vtab` (or `fgvc`) in which SNELLA was
trained, on several tasks or by several scores, and writes into `--out`

- `depth.png`: for each run the share of every block's weights that may not move in the
  last epoch, and a line fitted to it (Figure 10);
- `evolution.png`: for each run importance (the mean of a block's matrices) and that
  share over the epochs, a line for each block (Figure 16);
- `layers.json`: the numbers of both.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from experiments import files, plotting, terminal
from experiments.methods import registry
from experiments.paths import Given, check_out, stem
from experiments.plotting import plt
from experiments.reports import figures, result_files
from experiments.training import metric_log

PROGRAM = "python -m experiments.studies.layers"
COLUMNS = 3  # of a picture's panels


@dataclasses.dataclass(frozen=True)
class LayersConfig:
    """Options of `python -m experiments.studies.layers`."""

    runs: tuple[Given, ...]
    """Run folders."""
    titles: tuple[str, ...] = ()
    """A title for each run. Default: its task and score."""
    method: str = "snella"
    """Method of the runs whose budgets are compared."""
    out: Given = Path("runs/layers")
    """Folder to write layers.json, depth.png and evolution.png into."""


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Draws, and returns the content of `layers.json`."""
    config = tyro.cli(LayersConfig, prog=PROGRAM, args=argv, description=__doc__)
    console = terminal.console()
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        if config.titles and len(config.titles) != len(config.runs):
            raise ValueError(
                f"{len(config.titles)} titles and {len(config.runs)} runs: expected a "
                "title for each."
            )
        found = [_run(folder, config.method) for folder in config.runs]
    titles = config.titles or [f"{run['task']}, {run['score']}" for run in found]
    rows = [{"title": t} | run for t, run in zip(titles, found, strict=True)]
    depth(config.out / "depth.png", rows)
    evolution(config.out / "evolution.png", rows)
    result_files.write(config.out, "layers", rows, console, table=_table(rows))
    return rows


def _run(folder: Path, method: str) -> dict[str, Any]:
    """Returns the row of a run; raises a `ValueError` if no budget of it moved."""
    config = files.read(folder / "config.json")
    summary = files.read(folder / "summary.json")
    moves = [row for row in metric_log.of(folder, method) if "budget" in row]
    if config is None or summary is None or not moves:
        raise ValueError(
            f"{folder} has no finished run in which budgets of {method} moved: "
            f"expected a folder of experiments.vtab with {method} among its methods."
        )
    own = dataclasses.asdict(registry.METHODS[method]) | config[method]
    result = summary["methods"][method]
    steps = config.get("steps")  # older runs have none
    length = f"{steps} updates" if steps else f"{config['epochs']} epochs"
    return {
        "task": Path(config["task"]).name,
        "score": own["metric"],
        "model": stem(config["model"]),
        "image_size": config["image_size"],
        "batch": config["batch"],
        "length": length,
        "test_accuracy": result["test_accuracy"],
        "seed": config["seed"],
        "lr": own["lr"],
        "target_density": own["target_density"],
        **by_block(moves),
    }


def by_block(moves: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what each block had, over the epochs that began with a reallocation.

    Args:
      moves: rows of `metrics.jsonl` with importance, budgets and capacities.

    Returns:
      `blocks`; `epochs`; `importance` and `sparsity`, a list for each block; `slope`
      of the last sparsity, a block; `drift`, how far the blocks' shares of importance
      moved between the first epoch and the last, and `unevenness`, how far they are
      from equal ones at the end (both half the sum of differences: 0 to 1); `frozen`,
      the share of matrices without a weight that may move at the end.
    """
    groups = figures.blocks_of(moves[0]["budget"])
    importance = np.array([
        [np.mean([row["importance"][name] for name in own]) for row in moves]
        for own in groups.values()
    ])  # fmt: skip
    sparsity = np.array([
        [figures.kept_still(row, own) for row in moves] for own in groups.values()
    ])  # fmt: skip
    shares = importance / importance.sum(0)
    first, last = shares[:, 0], shares[:, -1]
    slope = np.polyfit(range(len(groups)), sparsity[:, -1], 1)[0]
    return {
        "blocks": [".".join(map(str, block)) for block in groups],
        "epochs": [row["epoch"] for row in moves],
        "importance": [[float(f"{x:.4g}") for x in own] for own in importance],
        "sparsity": sparsity.round(4).tolist(),
        "slope": round(float(slope), 4),
        "drift": round(float(abs(last - first).sum() / 2), 4),
        "unevenness": round(float(abs(last - 1 / len(last)).sum() / 2), 4),
        "frozen": float(np.mean([b == 0 for b in moves[-1]["budget"].values()])),
    }


def depth(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the last sparsity of every block, a panel a run, as the paper's Figure 10.

    Args:
      path: the PNG to write.
      rows: rows of `layers.json`.
    """
    columns = 2 if len(rows) == 4 else min(COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    shape = (3.3 * columns, 2.5 * lines)
    figure, grid = plt.subplots(
        lines, columns, figsize=shape, sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(rows) :]:
        axes.set_axis_off()
    for axes, row in zip(grid.flat, rows, strict=False):
        shares = [own[-1] for own in row["sparsity"]]
        places = np.arange(len(shares))
        axes.bar(places, shares, color="tab:blue", alpha=0.5)
        line = np.polyval(np.polyfit(places, shares, 1), places)
        axes.plot(places, line, color="tab:red", label=f"{row['slope']:+.3f} a block")
        axes.set_xticks(places, row["blocks"], fontsize=7)
        axes.set(ylim=(0, 1.02), xlabel="block")
        axes.set_title(plotting.label(row["title"]), fontsize=9)
        axes.legend(fontsize=7, loc="lower left")
    for axes in grid[:, 0]:
        axes.set_ylabel("share that may not move", fontsize=8)
    plotting.save(figure, path)


def evolution(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws importance and sparsity over the epochs, a column a run, as in Figure 16.

    Args:
      path: the PNG to write.
      rows: rows of `layers.json`.
    """
    figure, (above, below) = plt.subplots(
        2,
        len(rows),
        figsize=(1.2 + 3.1 * len(rows), 5.2),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    depths = max(len(row["blocks"]) for row in rows)
    colors = plt.colormaps["viridis"]
    for top, bottom, row in zip(above, below, rows, strict=True):
        for place, block in enumerate(row["blocks"]):
            how = {"color": colors(place / max(depths - 1, 1)), "label": block}
            top.plot(row["epochs"], row["importance"][place], **how)
            bottom.plot(row["epochs"], row["sparsity"][place], **how)
        top.set_yscale("log")
        top.set_title(plotting.label(row["title"]), fontsize=9)
        bottom.set(xlabel="epoch", ylim=(-0.02, 1.02))
        bottom.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for axes in (top, bottom):
            axes.grid(alpha=0.3)
    above[0].set_ylabel("importance, mean of a block")
    below[0].set_ylabel("share that may not move")
    figure.legend(
        *below[-1].get_legend_handles_labels(),
        title="block",
        loc="outside right center",
        fontsize=8,
    )
    plotting.save(figure, path)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="What layers got in the last epoch")
    names = ("run", "accuracy", "least", "most", "slope", "frozen", "drift", "uneven")
    for name in names:
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in rows:
        shares = [own[-1] for own in row["sparsity"]]
        numbers = [min(shares), max(shares), row["slope"]]
        numbers += [row["frozen"], row["drift"], row["unevenness"]]
        accuracy = f"{row['test_accuracy']:.1%}"
        table.add_row(row["title"], accuracy, *(f"{x:.3f}" for x in numbers))
    table.caption = (
        "least, most: share of a block's weights that may not move; frozen: matrices "
        "without any that may; drift, uneven: of the blocks' shares of importance"
    )
    return table


if __name__ == "__main__":
    main()
