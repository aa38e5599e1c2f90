"""The paper's tables from run folders.

    python -m experiments.report runs/quickstart/* --out runs/report

Looks for finished runs (`summary.json`) in the folders and below them. A row for each
task, a column for each method (or the other way round, where that is narrower): the
mean over seeds of the test accuracy in percent, with the deviation where there are
several seeds; then the mean of each group of tasks, the mean of the groups and the mean
of the tasks, which papers confuse. A mean of which a task is missing is left out.
Beside a method that the paper has stand its numbers, for VTAB-1k's own tasks alone and
those that are ours. Prints the table, and writes `report.md` and `report.json` into
`--out`.
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
    """Run folders, or folders that hold some."""
    accuracy: Accuracy = "last"
    """last: of the last epoch. best: of the best epoch on what was followed. ema: of
    the running mean of the weights."""
    out: Given | None = None
    """Folder for report.md and report.json. Default: print only."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parses the command line, prints the table, returns what `report.json` holds."""
    program = "python -m experiments.report"
    options = tyro.cli(Options, prog=program, args=argv, description=__doc__)
    console = terminal.console()
    with terminal.exit_on_error(program):
        if not options.runs:
            raise ValueError("name at least one run folder.")
        if options.out is not None:
            check_out(options.out)
        runs = finished.collect(options.runs)
        made = table(runs, options.accuracy)
    write(made, options.out, console)
    return made


if __name__ == "__main__":
    main()
