r"""Draws methods on models and benchmarks, a panel each: the paper's Figure 2.

    python -m experiments.studies.overview --reports experiments/results/quickstart \
        experiments/results/comparison --out runs/overview

reads `report.json` of folders that `experiments.compare`, `experiments.report` or the
suites wrote. Every task on which at least two of `--methods` were run is a panel with
the mean of each method and the deviation over its seeds. Writes `overview.json` and
`overview.png` into `--out`.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from matplotlib.axes import Axes
from rich.table import Table

from experiments import files, plotting, terminal
from experiments.paths import Given, check_out
from experiments.plotting import plt
from experiments.reports import result_files
from experiments.reports.text import number

PROGRAM = "python -m experiments.studies.overview"
REPORT = "report.json"
COLUMNS = 4  # panels beside each other
Panel = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class OverviewConfig:
    """Options of `python -m experiments.studies.overview`."""

    reports: tuple[Given, ...]
    """Folders with report.json."""
    methods: tuple[str, ...] = ("LoRA", "SSF", "SNELL", "SNELLA")
    """Labels of methods, as the reports have them, with or without the rank."""
    out: Given = Path("runs/overview")
    """Folder to write overview.json and overview.png into."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Draws, and returns the content of `overview.json`."""
    config = tyro.cli(OverviewConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        panels = [
            panel for at in config.reports for panel in panels_of(at, config.methods)
        ]
        if not panels:
            raise ValueError(
                f"No task has two of {', '.join(config.methods)}: expected reports of "
                "them, or other --methods."
            )
    result = {"methods": list(config.methods), "panels": panels}
    console = terminal.console()
    result_files.write(
        config.out, "overview", result, console, draw, _table(config.methods, panels)
    )
    return result


def panels_of(folder: Path, methods: Sequence[str]) -> list[Panel]:
    """Returns the tasks of a report on which at least two of the methods were run.

    Args:
      folder: has `report.json`, as `experiments.reports.table.table` makes it.
      methods: labels, with or without the rank.

    Returns:
      Panels with `report` (the folder's name), `setup`, `task`, `metric` and `rows`,
      which have `method`, `label`, `mean`, `deviation` and `seeds` (their number).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is another program's, or a name fits two of its methods.
    """
    path = folder / REPORT
    report = files.read(path)
    if report is None:
        raise FileNotFoundError(f"There is no {path}: expected that of a comparison.")
    if not {"columns", "tasks", "setups", "metric"} <= {*report}:
        raise ValueError(
            f"{path} has no columns of methods: expected the report of "
            "experiments.compare or experiments.report."
        )
    columns = [column for column in report["columns"] if not column["paper"]]
    setups = {column["setup"] for column in columns}
    panels = []
    for task in report["tasks"]:
        for setup in sorted(setups):
            own = [column for column in columns if column["setup"] == setup]
            rows = [row for name in methods for row in _rows(own, name, task, path)]
            if len(rows) > 1:
                panels.append(
                    {
                        "report": folder.resolve().name,
                        "setup": setup or ", ".join(report["setups"]),
                        "task": task,
                        "metric": report["metric"],
                        "rows": rows,
                    }
                )
    return panels


def _rows(
    columns: Sequence[dict[str, Any]], name: str, task: str, path: Path
) -> list[dict[str, Any]]:
    """Returns the row of a method on a task, or none."""
    fitting = re.compile(rf"{re.escape(name)}(-\d+)?")
    found = [
        {
            "method": name,
            "label": column["method"],
            "mean": cell["mean"],
            "deviation": cell["deviation"],
            "seeds": len(cell["seeds"]),
        }
        for column in columns
        if fitting.fullmatch(column["method"])
        and (cell := column["tasks"].get(task)) is not None
    ]
    if len(found) > 1:
        labels = ", ".join(row["label"] for row in found)
        raise ValueError(f"{path}: {name} may be {labels} on {task}: name one of them.")
    return found


def draw(path: Path, result: dict[str, Any]) -> None:
    """Draws the panels."""
    methods, panels = result["methods"], result["panels"]
    wide = min(COLUMNS, len(panels))
    high = math.ceil(len(panels) / wide)
    figure, axes = plt.subplots(
        high,
        wide,
        figsize=(3.2 * wide, 0.9 + (1.4 + 0.28 * len(methods)) * high),
        squeeze=False,
        layout="constrained",
    )
    for one in axes.flat[len(panels) :]:
        one.remove()
    for one, panel in zip(axes.flat, panels, strict=False):
        _panel(one, panel, methods)
    figure.suptitle(
        "test split: mean and deviation over seeds; every panel has its own range",
        fontsize="medium",
    )
    plotting.save(figure, path)


def _panel(axes: Axes, panel: Panel, methods: Sequence[str]) -> None:
    """Draws a dot for each method, the first at the top."""
    for name in {*methods} - {row["method"] for row in panel["rows"]}:
        middle, lane = 0.5, axes.get_yaxis_transform()
        text = {"transform": lane, "ha": "center", "va": "center", "color": "grey"}
        axes.text(middle, methods.index(name), "not run", fontsize="x-small", **text)
    for row in panel["rows"]:
        place = methods.index(row["method"])
        colour = f"C{place}"
        axes.errorbar(row["mean"], place, xerr=row["deviation"], fmt="o", color=colour)
        axes.annotate(
            f"{row['mean']:{_form(panel)}} ({row['seeds']})",
            (row["mean"], place),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize="x-small",
        )
    unit = ", %" if panel["metric"]["percent"] else ""
    axes.set_title(
        f"{plotting.label(panel['task'])}\n{plotting.label(panel['setup'])}",
        fontsize="small",
    )
    axes.set_xlabel(f"{panel['metric']['name']}{unit} (seeds)", fontsize="small")
    axes.set_yticks(range(len(methods)), [plotting.label(m) for m in methods])
    axes.set_ylim(len(methods) - 0.4, -0.8)
    axes.tick_params(labelsize="small")
    axes.margins(x=0.25)
    axes.grid(axis="x", alpha=0.3)


def _table(methods: Sequence[str], panels: Sequence[Panel]) -> Table:
    """Returns the means, a row for each panel."""
    table = Table("task", "setup", *methods)
    for panel in panels:
        means = {row["method"]: row["mean"] for row in panel["rows"]}
        cells = (number(means.get(name), _form(panel)) for name in methods)
        table.add_row(panel["task"], panel["setup"], *cells)
    return table


def _form(panel: Panel) -> str:
    """Returns the format of a panel's numbers."""
    return ".1f" if panel["metric"]["percent"] else ".3f"


if __name__ == "__main__":
    main()
