"""Tables and the figure of the comparison over tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import plotting
from experiments.plotting import plt
from experiments.reports.text import MISSING, Titled, number
from experiments.studies import paired

FAILED = "†"
Report = dict[str, Any]


def tables(report: Report, against: Sequence[str]) -> list[Titled]:
    """Returns the tables of a report, those of differences against some methods."""
    found = [_accuracies(report)]
    found += [_differences(report, other) for other in against]
    found += [_rates(report)] * bool(report["searches"])
    found += [_orders(report)] * bool(report["orders"])
    return found


def caption(report: Report) -> str:
    """Returns what the numbers are."""
    methods = report["methods"]
    seeds = _seeds(report)
    fewer = " Seeds in parentheses where fewer." * (len(seeds) > 1)
    fewer += " The error of one seed is that of the images alone." * (1 in seeds)
    lacking = any(own["tasks"].keys() != report["tasks"].keys() for own in methods)
    missing = f" {MISSING}: not finished; no mean and no rank without all tasks."
    critical = report["critical"]
    if critical is None:
        said = f"no interval below {paired.FEWEST} tasks"
    else:
        said = f"ranks that differ by less than {critical:.2f} cannot be told apart"
    masks = " and ".join(report["dice"])
    dice = f" (of {masks}: Dice of a run of its own)" * bool(masks)
    what = "Dice, %" if _masks_alone(report) else f"Test accuracy, %{dice}"
    return (
        f"{report['setup']}. {what}, with its standard error; differences in points "
        "with their 95% interval, paired by image and seed, both of which count as "
        "samples; over tasks: the mean over these tasks. Signs: tasks won and lost, "
        "and p of a two-sided sign test. What the choice of rates adds is in no "
        f"error. Mean rank: 1 is best; {said}."
        + fewer
        + missing * lacking
        + _failed(report)
    )  # fmt: skip


def _masks_alone(report: Report) -> bool:
    return [*report["tasks"]] == report["dice"]


def _failed(report: Report) -> str:
    texts = [
        f"{own['label']} on {own['task']}, {own['step']}: {own['error'].rstrip('.')}"
        for own in report["failed"]
    ]
    return f" {FAILED}: failed, and in no mean: {'; '.join(texts)}." * bool(texts)


def _accuracies(report: Report) -> Titled:
    most = max(_seeds(report))
    failed = {(own["label"], own["task"]) for own in report["failed"]}
    header = ["", *(f"{t} ({n})" for t, n in report["tasks"].items())]
    rows = []
    for own in report["methods"]:
        cells = [
            _accuracy(own["tasks"].get(task), most)
            + f" {FAILED}" * ((own["label"], task) in failed)
            for task in report["tasks"]
        ]
        whole = own["over_tasks"]
        mean = MISSING if whole is None else _with_error(whole)
        sizes = " to ".join(f"{size:,}" for size in dict.fromkeys(own["trainable"]))
        rows.append([own["label"], *cells, mean, number(own["rank"], ".1f"), sizes])
    title = "Dice" if _masks_alone(report) else "Accuracy"
    return title, [*header, "over tasks", "mean rank", "trainable"], rows


def _differences(report: Report, other: str) -> Titled:
    header = ["", *report["tasks"], "over tasks", "signs"]
    rows = []
    for label, pair in _against(report, other).items():
        cells = [_interval(pair["tasks"].get(task)) for task in report["tasks"]]
        signs = pair["signs"]
        p = f", p {signs['p']:.2f}" if signs["p"] is not None else ""
        count = f"{signs['wins']} to {signs['losses']}{p}" if pair["tasks"] else MISSING
        rows.append([label, *cells, _interval(pair["over_tasks"]), count])
    return f"Difference from {other}", header, rows


def _rates(report: Report) -> Titled:
    rows = []
    for name, by_task in report["searches"].items():
        for chosen, trials, tasks in _distinct(by_task):
            key = "val_loss" if "val_loss" in trials[0] else "val_accuracy"
            tried = sorted(trials, key=lambda trial: trial["lr"])
            texts = [f"{t['lr']:.2g}: {number(t[key], '.3f')}" for t in tried]
            ends = {tried[0]["lr"], tried[-1]["lr"]}
            end = " (at an end)" if chosen["lr"] in ends and len(tried) > 1 else ""
            where = (
                "all" if len(by_task) > 1 and tasks == [*by_task] else ", ".join(tasks)
            )
            rows.append([name, where, "; ".join(texts), f"{chosen['lr']:.2g}{end}"])
    header = ["", "tasks", "rates tried: validation loss or accuracy", "chosen"]
    return "Rates", header, rows


def _distinct(by_task: dict[str, Any]) -> list[tuple[Any, Any, list[str]]]:
    """Groups tasks whose search is the same, as a pooled one is on all tasks."""
    groups: list[tuple[Any, Any, list[str]]] = []
    for task, own in by_task.items():
        for chosen, trials, tasks in groups:
            if (chosen, trials) == (own["chosen"], own["trials"]):
                tasks.append(task)
                break
        else:
            groups.append((own["chosen"], own["trials"], [task]))
    return groups


def _orders(report: Report) -> Titled:
    said = {True: "holds", False: "does not hold", None: "cannot be told"}
    rows = [
        [
            f"{own['better']} > {own['worse']}",
            f"{own['paper']:+.1f}",
            f"{_interval({**own, 'value': own['ours']})} ({own['tasks']})",
            said[own["holds"]],
        ]
        for own in report["orders"]
    ]
    title = "Order of the paper (Table XIII, mean of VTAB-1k, another model)"
    return title, ["", "paper", "here (tasks)", "here it"], rows


def _against(report: Report, other: str) -> dict[str, Any]:
    """Returns every method's pair with another, the method first."""
    found = {}
    for own in report["methods"]:
        label = own["label"]
        for pair in report["pairs"]:
            if (pair["method"], pair["other"]) == (label, other):
                found[label] = pair
            elif (pair["method"], pair["other"]) == (other, label):
                found[label] = _turned(pair)
    return found


def _turned(pair: dict[str, Any]) -> dict[str, Any]:
    """Returns a pair with its methods exchanged."""

    def turn(own: dict[str, Any] | None) -> dict[str, Any] | None:
        if own is None:
            return None
        return own | {
            "value": -own["value"],
            "low": -own["high"],
            "high": -own["low"],
        }

    signs = pair["signs"]
    return {
        "method": pair["other"],
        "other": pair["method"],
        "tasks": {task: turn(own) for task, own in pair["tasks"].items()},
        "over_tasks": turn(pair["over_tasks"]),
        "signs": signs | {"wins": signs["losses"], "losses": signs["wins"]},
    }


def _seeds(report: Report) -> set[int]:
    every = (cell for own in report["methods"] for cell in own["tasks"].values())
    return {cell["seeds"] for cell in every} or {0}


def _accuracy(cell: dict[str, Any] | None, most: int) -> str:
    if cell is None:
        return MISSING
    fewer = f" ({cell['seeds']})" * (cell["seeds"] < most)
    return _with_error(cell) + fewer


def _with_error(cell: dict[str, Any]) -> str:
    return f"{cell['value']:.1f} ± {cell['error']:.1f}"


def _interval(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return MISSING
    return f"{cell['value']:+.1f} ({cell['low']:+.1f} to {cell['high']:+.1f})"


def differences(path: Path, report: Report, other: str) -> None:
    """Draws the differences from a method with their intervals, a panel for each task.

    Args:
      path: the PNG to write.
      report: as `real_tasks.compared` returns it.
      other: label of the method.
    """
    pairs = _against(report, other)
    panels = [*report["tasks"], *["over tasks"] * (len(report["tasks"]) > 1)]
    figure, row = plt.subplots(
        1,
        len(panels),
        figsize=(2 + 2.2 * len(panels), 1.6 + 0.35 * len(pairs)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, task in zip(row[0], panels, strict=True):
        axes.axvline(0, color="grey", linewidth=0.8)
        for place, pair in enumerate(pairs.values()):
            cell = pair["tasks"].get(task) if task in report["tasks"] else None
            cell = pair["over_tasks"] if task == "over tasks" else cell
            if cell is not None:
                colour = "tab:red" if "SNELLA" in pair["method"] else "tab:blue"
                axes.plot([cell["low"], cell["high"]], [place] * 2, color=colour)
                axes.plot(cell["value"], place, "o", color=colour)
        axes.set_title(plotting.label(task), fontsize=10)
    row[0][0].set_yticks(range(len(pairs)), [plotting.label(name) for name in pairs])
    row[0][0].invert_yaxis()
    figure.supxlabel(f"points above {plotting.label(other)}, 95% interval")
    figure.suptitle(plotting.label(report["setup"]), fontsize=10)
    plotting.save(figure, path)
