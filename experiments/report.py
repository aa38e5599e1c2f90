"""Makes the paper's tables from finished runs.

    python -m experiments.report runs/quickstart/* --out runs/report

Reads every finished run (`summary.json`) in the given folders and below them. The table
has a row for each task and a column for each method, or the other way round where that
is narrower: the mean test accuracy over seeds in percent, with the standard deviation
if there are several seeds. Below are the mean of each group of tasks, the mean of the
groups and the mean of the tasks (papers confuse these two); a mean is left out if one
of its tasks is missing. The paper's numbers for VTAB-1k stand beside those of the same
method, over the same tasks. Prints the table, and writes `report.md` and `report.json`
into `--out`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from experiments import terminal
from experiments.paths import Given, check_out
from experiments.reports import finished
from experiments.reports.table import Accuracy, table, write


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `python -m experiments.report`."""

    runs: Annotated[tuple[Given, ...], tyro.conf.Positional]
    """Run folders, or folders that contain run folders."""
    accuracy: Accuracy = "last"
    """Which test accuracy of a run. last: that of the last epoch. best: that of the
    epoch that was best on the split that was followed. ema: that of the running mean of
    the weights."""
    metric: str | None = None
    """Name of the metric, such as vendi_prompt. Default: the runs' first one."""
    out: Given | None = None
    """Folder to write report.md and report.json into. Default: print only."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the table and returns the content of `report.json`."""
    program = "python -m experiments.report"
    options = tyro.cli(Options, prog=program, args=argv, description=__doc__)
    console = terminal.console()
    with terminal.exit_on_error(program):
        if not options.runs:
            raise ValueError("name at least one run folder.")
        if options.out is not None:
            check_out(options.out)
        runs = finished.collect(options.runs, console, options.metric)
        made = table(runs, options.accuracy)
    write(made, options.out, console)
    return made


if __name__ == "__main__":
    main()
