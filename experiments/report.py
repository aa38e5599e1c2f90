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
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from experiments import folder, paper
from experiments.config import RunConfig
from experiments.data import catalogue
from experiments.methods.trained import METHODS

Accuracy = Literal["last", "best", "ema"]
KEYS = {
    "last": "test_accuracy",
    "best": "best_test_accuracy",
    "ema": "ema_test_accuracy",
}
MISSING = "–"  # noqa: RUF001
IRRELEVANT = ("seed", "methods", "data_dir", "mesh", "distributed", "wandb", "source")


@dataclasses.dataclass(frozen=True)
class Run:
    """A method of a finished run.

    Attributes:
      task: its name in the catalogue, or that of the folder or file.
      method: as tables call it, with its rank.
      setup: model and protocol, which columns of one table may differ in.
      settings: all that has to agree for two runs to be seeds of one another.
      result: the method's entry of `summary.json`.
    """

    folder: Path
    task: str
    method: str
    setup: str
    seed: int
    settings: dict[str, Any]
    result: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `python -m experiments.report`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders that hold some."""
    accuracy: Accuracy = "last"
    """last: of the last epoch. best: of the best epoch on what was followed. ema: of
    the running mean of the weights."""
    out: Path | None = None
    """Folder for report.md and report.json. Default: print only."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parses the command line, prints the table, returns what `report.json` holds."""
    program = "python -m experiments.report"
    options = tyro.cli(Options, prog=program, args=argv, description=__doc__)
    console = Console()
    try:
        if not options.runs:
            raise ValueError("name at least one run folder.")
        runs = collect(options.runs)
        made = table(runs, options.accuracy)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{program}: {error}") from error
    console.print(_printed(made))
    if options.out is not None:
        _write(made, options.out, console)
    return made


def write(made: dict[str, Any], out: Path, console: Console) -> None:
    """Prints a table and writes it into a folder."""
    console.print(_printed(made))
    _write(made, out, console)


def collect(paths: Iterable[Path]) -> list[Run]:
    """The finished runs in some folders and below them, a `Run` for each method.

    Raises:
      ValueError: there are none in one of them.
    """
    found: dict[Path, list[Run]] = {}
    for path in paths:
        summaries = sorted(path.rglob("summary.json"))
        if not summaries:
            raise ValueError(f"There is no finished run (summary.json) in {path}.")
        for summary in summaries:
            found.setdefault(summary.parent.resolve(), _runs(summary.parent))
    return [run for runs in found.values() for run in runs]


def table(
    runs: list[Run],
    accuracy: Accuracy = "last",
    methods: Sequence[str] = (),
    tasks: Sequence[str] = (),
) -> dict[str, Any]:
    """The accuracies by column and task, and their means.

    Args:
      runs: finished ones.
      accuracy: which of a run's.
      methods: labels that have a column in any case, the first ones.
      tasks: names that have a row in any case.

    Returns:
      `columns`, each with `method`, `setup`, `paper` (whether these are the paper's
      numbers), `tasks` (each with `mean`, `deviation`, `seeds`), `groups`,
      `mean_of_groups`, `mean_of_tasks`, `trainable`, from the fewest parameters to the
      most (heads and masks differ); and `tasks`, the group of each. Accuracies are in
      percent, deviations those of a sample, None for one seed. There is no mean where
      one of its tasks is missing.

    Raises:
      ValueError: a method lacks that accuracy, or two runs of a method on a task differ
        in more than the seed, or not even in that.
    """
    cells: dict[tuple[str, str], dict[str, list[Run]]] = {}
    setups = sorted({run.setup for run in runs})
    for method in methods:
        cells[method, setups[0]] = {}
    for run in runs:
        own = cells.setdefault((run.method, run.setup), {})
        own.setdefault(run.task, []).append(run)
    names = {run.task for run in runs} | set(tasks)
    order = [name for name in catalogue.ENTRIES if name in names]
    groups = {name: catalogue.ENTRIES[name].group for name in order}
    groups |= dict.fromkeys(sorted(names - set(order)), "own")
    several = len(setups) > 1
    columns = []
    for (method, setup), by_task in cells.items():
        own = {
            name: _cell(by_task[name], KEYS[accuracy])
            for name in groups
            if name in by_task
        }
        column = {"method": method, "setup": setup if several else "", "paper": False}
        sizes = {run.result["trainable"] for done in by_task.values() for run in done}
        trainable = [min(sizes), max(sizes)] if sizes else None
        columns.append({**column, **_means(own, groups), "trainable": trainable})
    theirs = {}
    for column in columns:  # over the same tasks as ours
        known = paper.TABLE_XIII.get(column["method"], {})
        own = {n: {"mean": known[n]} for n in column["tasks"] if n in known}
        if own:
            same = {"method": column["method"], "setup": "", "paper": True}
            theirs[same["method"], *own] = {**same, **_means(own, groups)}
    columns += theirs.values()
    return {
        "accuracy": accuracy,
        "setups": setups,
        "tasks": groups,
        "columns": columns,
    }


def _runs(where: Path) -> list[Run]:
    summary, config = (folder.read(where / f"{n}.json") for n in ("summary", "config"))
    if config is None:
        raise ValueError(f"{where} has a summary.json without its config.json.")
    weights = Path(config["model"]).stem + ", random" * config.get(
        "random_weights", False
    )
    protocol = config["protocol"] + ", searched" * config["search"]
    runs = []
    for method, result in summary["methods"].items():
        known = dataclasses.asdict(getattr(RunConfig(), method))
        own = {**known, **config[method]}  # which may be older than some settings
        shared = {k: v for k, v in config.items() if not isinstance(v, dict)}
        settings = {k: v for k, v in shared.items() if k not in IRRELEVANT}
        settings |= {f"{method}.{name}": value for name, value in own.items()}
        if config["search"] or method == "linear":  # whose strengths go on, too
            settings["grid"] = config.get("grid")
        runs.append(
            Run(
                folder=where,
                task=_task(config["task"]),
                method=label(method, own),
                setup=f"{weights}, {protocol}",
                seed=config["seed"],
                settings=settings,
                result=result,
            )
        )
    return runs


def label(method: str, settings: dict[str, Any]) -> str:
    """How tables call a method with its settings."""
    title = METHODS[method].title if method in METHODS else "linear probe"
    return title + (f"-{settings['rank']}" if "rank" in settings else "")


def _task(name: str) -> str:
    """A task of the catalogue by its name; one's own by that of its folder or file."""
    if name in catalogue.ENTRIES:
        return name
    stem = Path(name).stem
    return f"{stem} (own)" if stem in catalogue.ENTRIES else stem


def _cell(runs: list[Run], key: str) -> dict[str, Any]:
    """Mean and deviation of a method's seeds on a task."""
    first, accuracies = runs[0], {}
    for run in runs:
        differing = sorted(
            name
            for name in first.settings.keys() | run.settings.keys()
            if first.settings.get(name) != run.settings.get(name)
        )
        if differing:
            raise ValueError(
                f"{first.folder} and {run.folder} are both {run.method} on {run.task}, "
                f"but differ in {', '.join(differing)}: report them separately."
            )
        if run.seed in accuracies:
            raise ValueError(
                f"There are two runs of {run.method} on {run.task} with seed "
                f"{run.seed}, one in {run.folder}: expected one."
            )
        accuracies[run.seed] = run.result.get(key)
        if accuracies[run.seed] is None:
            if run.method == "linear probe":  # it has no epochs
                accuracies[run.seed] = run.result[KEYS["last"]]
            else:
                raise ValueError(f"{run.folder} has no {key} of {run.method}.")
    percent = [100 * accuracy for accuracy in accuracies.values()]
    return {
        "mean": statistics.mean(percent),
        "deviation": statistics.stdev(percent) if len(percent) > 1 else None,
        "seeds": {str(seed): value for seed, value in sorted(accuracies.items())},
    }


def _means(
    tasks: dict[str, dict[str, Any]], group_of: dict[str, str]
) -> dict[str, Any]:
    """The tasks' accuracies, and means over groups, of the groups and of the tasks."""
    means = {name: cell["mean"] for name, cell in tasks.items()}
    groups = {}
    for group in dict.fromkeys(group_of.values()):
        names = [name for name in group_of if group_of[name] == group]
        if means.keys() >= set(names):
            groups[group] = statistics.mean(means[name] for name in names)
    whole = means.keys() >= group_of.keys()
    return {
        "tasks": tasks,
        "groups": groups,
        "mean_of_groups": statistics.mean(groups.values()) if whole else None,
        "mean_of_tasks": statistics.mean(means.values()) if whole else None,
    }


def _lines(made: dict[str, Any]) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows, and after which rows a line is drawn; wide tables are turned."""
    columns, group_of = made["columns"], made["tasks"]
    header = ["", *map(_title, columns)]
    rows, rules = [], []
    groups = list(dict.fromkeys(group_of.values()))
    for group in groups:
        names = [name for name in group_of if group_of[name] == group]
        for name in names:
            cells = (column["tasks"].get(name) for column in columns)
            rows.append([name, *map(_cell_text, cells)])
        rules.append(len(rows) - 1)
    for group in groups if len(groups) > 1 else ():
        count = sum(own == group for own in group_of.values())
        means = (column["groups"].get(group) for column in columns)
        rows.append([f"mean, {group} ({count})", *map(_number, means)])
    if len(groups) > 1:
        rows.append(
            ["mean of groups", *(_number(c["mean_of_groups"]) for c in columns)]
        )
    if len(group_of) > 1:
        rows.append(["mean of tasks", *(_number(c["mean_of_tasks"]) for c in columns)])
        rules.append(len(rows) - 1)
    sizes = (column.get("trainable") for column in columns)
    rows.append(["trainable", *map(_range, sizes)])
    if len(columns) > len(rows):  # a row for each method then
        header, *rows = map(list, zip(header, *rows, strict=True))
        rules = []
    return header, rows, rules


def _title(column: dict[str, Any]) -> str:
    notes = [column["setup"]] * bool(column["setup"]) + ["paper"] * column["paper"]
    return column["method"] + (f" ({', '.join(notes)})" if notes else "")


def _cell_text(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return MISSING
    deviation = cell.get("deviation")
    return f"{cell['mean']:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def _range(ends: list[int] | None) -> str:
    return " to ".join(f"{end:,}" for end in dict.fromkeys(ends or ()))


def _number(mean: float | None) -> str:
    return MISSING if mean is None else f"{mean:.1f}"


def _caption(made: dict[str, Any]) -> str:
    which = {
        "last": "the last epoch",
        "best": "the best epoch on what was followed",
        "ema": "the running mean of the weights",
    }[made["accuracy"]]
    text = f"Test accuracy of {which}, %. {'; '.join(made['setups'])}."
    ours = [column for column in made["columns"] if not column["paper"]]
    counts = sorted({len(c["seeds"]) for o in ours for c in o["tasks"].values()})
    text += f" Seeds: {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}."
    if any(column["tasks"].keys() != made["tasks"].keys() for column in ours):
        text += f" {MISSING}: not run; no mean without all of its tasks."
    if len(ours) < len(made["columns"]):
        text += (
            " Paper: Table XIII, ViT-B/16, best accuracy of a run on the test split."
        )
    return text


def _printed(made: dict[str, Any]) -> Table:
    header, rows, rules = _lines(made)
    shown = Table(caption=_caption(made), caption_justify="left")
    for index, title in enumerate(header):
        shown.add_column(title, justify="right" if index else "left", no_wrap=not index)
    for index, row in enumerate(rows):
        shown.add_row(*row, end_section=index in rules)
    return shown


def _markdown(made: dict[str, Any]) -> str:
    header, rows, _ = _lines(made)
    ruler = ["---"] + ["--:"] * (len(header) - 1)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ruler, *rows)]
    return "\n".join([*lines, "", _caption(made), ""])


def _write(made: dict[str, Any], out: Path, console: Console) -> None:
    out.mkdir(parents=True, exist_ok=True)
    folder.replace(out / "report.md", _markdown(made))
    folder.replace(out / "report.json", json.dumps(made, indent=1) + "\n")
    console.print(f"report.md and report.json are in {out}", soft_wrap=True)


if __name__ == "__main__":
    main()
