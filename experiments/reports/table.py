"""Tables of a benchmark's runs: means over seeds, beside the paper's numbers."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from experiments import files
from experiments.reports import paper, text
from experiments.reports.figures import ACCURACY
from experiments.reports.finished import LOOKS, Run
from experiments.tasks import catalogue
from experiments.training.objective import Metric

Accuracy = Literal["last", "best", "ema"]
KINDS = {"last": "test", "best": "best_test", "ema": "ema_test"}


def write(made: dict[str, Any], out: Path | None, console: Console) -> None:
    """Prints a table, and writes it into a folder if there is one."""
    console.print(text.printed(made))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        files.replace(out / "report.md", text.markdown(made))
        files.write(out / "report.json", made, indent=1)
        console.print(f"report.md and report.json are in {out}", soft_wrap=True)


def table(
    runs: list[Run],
    accuracy: Accuracy = "last",
    methods: Sequence[str] = (),
    tasks: Sequence[str] = (),
    failed: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the metric of every column and task, and its means.

    Args:
      runs: finished runs.
      accuracy: which of a run's values: that of the last round, of the best one or of
        the mean weights.
      methods: labels of the first columns, which are there even without a run.
      tasks: names of tasks that have a row even without a run.
      failed: texts on what else was tried, and why it gave no number.

    Returns:
      `columns`, each with `method`, `setup`, `paper` (True for the paper's numbers),
      `tasks` (each with `mean`, `deviation`, `seeds`), `groups`, `mean_of_groups`,
      `mean_of_tasks` and `trainable`, the fewest and the most parameters (heads and
      masks differ); `tasks`, the group of each; `failed`; and `metric`, its name and
      whether its values are in percent. Deviations are those of a sample, None for one
      seed. A mean is None if one of its tasks is missing.

    Raises:
      ValueError: runs have different metrics, a method lacks that value, or two runs
        of a method on a task differ in more than the seed, or not even in that.
    """
    metric = _metric(runs)
    setups = sorted({run.setup for run in runs})
    groups = _groups({run.task for run in runs} | set(tasks))
    found: dict[tuple[str, str], dict[str, list[Run]]] = {
        (method, setups[0]): {} for method in methods
    }
    for run in runs:
        own = found.setdefault((run.method, run.setup), {})
        own.setdefault(run.task, []).append(run)
    columns = []
    for (method, setup), by_task in found.items():
        column = {"method": method, "setup": setup if len(setups) > 1 else ""}
        column |= _column(by_task, groups, KINDS[accuracy], metric)
        columns.append(column)
    if metric.name == ACCURACY.name:
        columns += _of_the_paper(columns, groups)
    return {
        "accuracy": accuracy,
        "metric": {"name": metric.name, "percent": metric.percent},
        "setups": setups,
        "tasks": groups,
        "columns": columns,
        "failed": list(failed),
    }


def _groups(names: set[str]) -> dict[str, str]:
    """Returns the group of each task, in the catalogue's order and then your own."""
    order = [name for name in catalogue.ENTRIES if name in names]
    groups = {name: catalogue.ENTRIES[name].group for name in order}
    return groups | dict.fromkeys(sorted(names - set(order)), "own")


def _column(
    by_task: dict[str, list[Run]], groups: dict[str, str], kind: str, metric: Metric
) -> dict[str, Any]:
    """Returns a method's values and means, and its range of trainable parameters."""
    cells = {n: _cell(by_task[n], kind, metric) for n in groups if n in by_task}
    sizes = {run.result["trainable"] for done in by_task.values() for run in done}
    trainable = [min(sizes), max(sizes)] if sizes else None
    return {"paper": False, **_means(cells, groups), "trainable": trainable}


def _of_the_paper(
    columns: list[dict[str, Any]], groups: dict[str, str]
) -> list[dict[str, Any]]:
    """Returns the paper's columns for our methods, over the same tasks as ours."""
    theirs = {}
    for column in columns:
        method = column["method"]
        known = paper.TABLE_XIII.get(method, {})
        own = {n: {"mean": known[n]} for n in column["tasks"] if n in known}
        if own:
            named = {"method": method, "setup": "", "paper": True}
            theirs[method, *own] = {**named, **_means(own, groups)}
    return list(theirs.values())


def _metric(runs: list[Run]) -> Metric:
    """Returns the metric of all runs, accuracy where there are none."""
    found = {run.metric: run for run in runs}
    if len(found) > 1:
        named = (f"{run.folder} has {metric.name}" for metric, run in found.items())
        raise ValueError(f"{', '.join(named)}: report them separately.")
    return next(iter(found), ACCURACY)


def _cell(runs: list[Run], kind: str, metric: Metric) -> dict[str, Any]:
    """Returns mean and deviation of a method's seeds on a task."""
    first, values, key = runs[0], {}, f"{kind}_{metric.name}"
    for run in runs:
        differing = sorted(
            name
            for name in first.settings.keys() | run.settings.keys()
            if first.settings.get(name) != run.settings.get(name)
            and (name not in LOOKS or kind == KINDS["best"])
        )
        if differing:
            raise ValueError(
                f"{first.folder} and {run.folder} are both {run.method} on {run.task}, "
                f"but differ in {', '.join(differing)}: report them separately."
            )
        if run.seed in values:
            raise ValueError(
                f"There are two runs of {run.method} on {run.task} with seed "
                f"{run.seed}, one in {run.folder}: expected one."
            )
        values[run.seed] = run.result.get(key)
        if values[run.seed] is None:
            if run.method == "linear probe":  # it has no rounds
                values[run.seed] = run.result[f"test_{metric.name}"]
            else:
                raise ValueError(f"{run.folder} has no {key} of {run.method}.")
    shown = [100 * value if metric.percent else value for value in values.values()]
    return {
        "mean": statistics.mean(shown),
        "deviation": statistics.stdev(shown) if len(shown) > 1 else None,
        "seeds": {str(seed): value for seed, value in sorted(values.items())},
    }


def _means(
    tasks: dict[str, dict[str, Any]], group_of: dict[str, str]
) -> dict[str, Any]:
    """Returns the tasks' values, and means of each group, the groups and the tasks."""
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
