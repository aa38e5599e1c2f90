"""Tables of what tuned models keep and withstand, a row for each method."""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from experiments.reports.text import MISSING, Titled
from experiments.studies import paired
from experiments.studies.cells import Cell
from experiments.studies.corruptions import KINDS, SEVERITIES
from experiments.studies.recorded import unpacked
from experiments.studies.tuned import Tuned

Values = dict[str, dict[str, Any]]
Rights = dict[int, Bool[np.ndarray, " images"]]  # by seed
Shares = dict[int, Float[np.ndarray, " images"]]
Report = dict[str, dict[str, dict[str, Any]]]  # by table, row and column
MEGABYTE = 1e6
CAPTION = (
    "Means over tasks, in points with the 95% interval: of forgetting and adding, "
    "whose pairs of a tuned task are averaged first, by the spread of the tasks; else "
    "by image and seed. Less LoRA's: the change less LoRA's, paired likewise. "
    "Forgetting: accuracy of 3 nearest neighbours on other tasks' training images "
    "after tuning, less that of the model before. Adding: test accuracy of one model "
    "with the changes of two tasks, less that of each task's own model. Corrupted: "
    "test accuracy, %, of the clean images and with each corruption, mean over three "
    "severities, and what is lost on average. Sizes: MB of the delta file and of the "
    "adapter's file, and millions of the targeted weights that moved."
)


def made(models: Sequence[Tuned], values: Values, few: Sequence[Cell]) -> Report:
    """Returns the cells of every table, by row and column, of what was measured."""
    rows: dict[str, list[Tuned]] = {}
    for one in models:
        rows.setdefault(one.cell.label, []).append(one)
    found = {
        "forgetting": _by_row(rows, values, _forgetting),
        "adding": _by_row(rows, values, _adding),
        "corrupted": _by_row(rows, values, _robustness),
        "sizes": _by_row(rows, values, _sizes),
        "images a class": _few(few),
    }
    _against(found["forgetting"])
    _against(found["adding"])
    _against_lost(found["corrupted"], rows, values)
    return {name: table for name, table in found.items() if table}


def tables(report: Report) -> list[Titled]:
    """Returns the tables of a report."""
    found = []
    for name, rows in report.items():
        columns = list(dict.fromkeys(c for own in rows.values() for c in own))
        lines = [
            [label, *(_text(own.get(column)) for column in columns)]
            for label, own in rows.items()
        ]
        found.append((name[0].upper() + name[1:], ["", *columns], lines))
    return found


def _by_row(
    rows: Mapping[str, Sequence[Tuned]], values: Values, make: Any
) -> dict[str, Any]:
    made = {label: make(own, values) for label, own in rows.items()}
    return {label: own for label, own in made.items() if own}


def _forgetting(models: Sequence[Tuned], values: Values) -> dict[str, Any]:
    """Returns accuracy before and after, and its mean change over pairs of tasks."""
    after: dict[tuple[str, str], Rights] = {}
    before: dict[tuple[str, str], Rights] = {}
    found = values.get("forgetting", {})
    for one, (key, own) in itertools.product(models, found.items()):
        if key.startswith(one.beside("")):
            other = key.removeprefix(one.beside(""))
            pair, seed = (one.cell.task, other), one.cell.seed
            after.setdefault(pair, {})[seed] = _bits(own)
            before.setdefault(pair, {})[seed] = unpacked(own["before"], own["tested"])
    return _changes(before, after, "before", "after")


def _adding(models: Sequence[Tuned], values: Values) -> dict[str, Any]:
    """Returns accuracy alone and added, and its mean change over pairs of tasks."""
    added: dict[tuple[str, str], Rights] = {}
    alone: dict[tuple[str, str], Rights] = {}
    own = {(one.cell.task, one.cell.seed): one for one in models}
    for one in models:
        for other in models:
            pair = values.get("adding", {}).get(one.beside(other.cell.task), {})
            for task, found in pair.items():
                partner = other.cell.task if task == one.cell.task else one.cell.task
                seed = one.cell.seed
                added.setdefault((task, partner), {})[seed] = _bits(found)
                right = own[task, seed].cell.right
                alone.setdefault((task, partner), {})[seed] = right
    return _changes(alone, added, "alone", "added")


def _changes(
    before: dict[tuple[str, str], Rights],
    after: dict[tuple[str, str], Rights],
    *names: str,
) -> dict[str, Any]:
    if not after:
        return {}
    gaps: dict[str, dict[str, float]] = {}
    levels: dict[str, list[list[float]]] = {}
    for (task, partner), own in after.items():
        other = before[task, partner]
        if gap := paired.difference(own, other):
            gaps.setdefault(task, {})[partner] = gap.value
            same = own.keys() & other.keys()
            both = [_mean(rights[s].mean() for s in same) for rights in (other, own)]
            levels.setdefault(task, []).append(both)
    by_task = [np.mean(own, 0) for own in levels.values()]  # as the change is
    first, second = np.mean(by_task, 0).tolist()
    count = sum(len(own) for own in gaps.values())
    return {names[0]: first, names[1]: second, "change": _over(gaps), "pairs": count}


def _over(gaps: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Returns the mean of tuned tasks' means over their partners, with its interval.

    Pairs of one tuned task share its model, so tasks are the sample. One has no
    interval.
    """
    means = [statistics.fmean(own.values()) for own in gaps.values()]
    value, low, high = statistics.fmean(means), None, None
    if len(means) > 1:
        error = statistics.stdev(means) / len(means) ** 0.5
        half = float(stats.t.ppf((1 + paired.LEVEL) / 2, len(means) - 1)) * error
        low, high = value - half, value + half
    return {"value": value, "low": low, "high": high, "gaps": gaps}


def _against(rows: dict[str, Any]) -> None:
    """Adds to each row its change less LoRA's, over the pairs of tasks of both."""
    lora = next((own for label, own in rows.items() if label.startswith("LoRA")), None)
    for row in rows.values():
        if lora is None or row is lora:
            continue
        theirs = lora["change"]["gaps"]
        gaps = {
            task: {p: own[p] - theirs[task][p] for p in own.keys() & theirs[task]}
            for task, own in row["change"]["gaps"].items()
            if own.keys() & theirs.get(task, {})
        }
        if gaps:
            row["less LoRA's"] = _over(gaps)


def _robustness(models: Sequence[Tuned], values: Values) -> dict[str, Any]:
    """Returns accuracies of clean and of corrupted images, means over tasks."""
    found = values.get("robustness", {})
    known = [one for one in models if one.key in found]
    if not known:
        return {}
    shares: dict[str, dict[str, list[float]]] = {}  # by column and task
    for one in known:
        own = {"clean": [one.cell.right.mean()]}
        for kind in KINDS:
            results = (found[one.key][f"{kind} {s}"] for s in SEVERITIES)
            own[kind] = [_bits(result).mean() for result in results]
        for name, values_of in own.items():
            by_task = shares.setdefault(name, {})
            by_task.setdefault(one.cell.task, []).extend(values_of)
    row: dict[str, Any] = {
        name: statistics.fmean(_mean(own) for own in by_task.values())
        for name, by_task in shares.items()
    }
    changes = _lost(known, values).values()
    means = [paired.mean(np.stack(list(by_seed.values()))) for by_seed in changes]
    return row | {"change": paired.over_tasks(means).as_dict()}


def _lost(models: Sequence[Tuned], values: Values) -> dict[str, Shares]:
    """Returns, by task, the share of corruptions of an image that is right, less clean.

    Of what was measured: 0 for an image that stays right, or wrong, in all of them.
    """
    found = values.get("robustness", {})
    changes: dict[str, Shares] = {}
    for one in (one for one in models if one.key in found):
        every = np.stack([_bits(result) for result in found[one.key].values()])
        own = every.mean(0) - one.cell.right
        changes.setdefault(one.cell.task, {})[one.cell.seed] = own
    return changes


def _against_lost(
    rows: dict[str, Any], models: Mapping[str, Sequence[Tuned]], values: Values
) -> None:
    """Adds to each row what it loses less what LoRA does, paired by image and seed."""
    lora = next((label for label in rows if label.startswith("LoRA")), None)
    if lora is None:
        return
    for label in rows.keys() - {lora}:
        ours, theirs = (_lost(models[name], values) for name in (label, lora))
        gaps = [paired.difference(ours[t], theirs[t]) for t in ours if t in theirs]
        if known := [gap for gap in gaps if gap is not None]:
            rows[label]["less LoRA's"] = paired.over_tasks(known).as_dict()


def _sizes(models: Sequence[Tuned], values: Values) -> dict[str, Any]:
    own = [values["sizes"][m.key] for m in models if m.key in values.get("sizes", {})]
    if not own:
        return {}
    adapters = [one["adapter"] for one in own if one["adapter"] is not None]
    return {
        "delta file": statistics.fmean(one["delta"] for one in own) / MEGABYTE,
        "adapter": statistics.fmean(adapters) / MEGABYTE if adapters else None,
        "weights moved": statistics.fmean(one["moved"] for one in own) / 1e6,
    }


def _few(cells: Sequence[Cell]) -> dict[str, Any]:
    """Returns accuracies by the number of training images of each class."""
    rows: dict[str, dict[str, dict[str, Rights]]] = {}
    order = sorted(cells, key=lambda cell: cell.per_class or np.inf)
    for cell in order:
        column = str(cell.per_class or "all")
        own = rows.setdefault(cell.label, {}).setdefault(column, {})
        own.setdefault(cell.task, {})[cell.seed] = cell.right
    return {
        label: {
            column: paired.over_tasks([
                paired.mean(np.stack(list(rights.values()))) for rights in own.values()
            ]).as_dict() | {"tasks": len(own)}
            for column, own in columns.items()
        }
        for label, columns in rows.items()
    }  # fmt: skip


def _mean(shares: Iterable[Any]) -> float:
    return 100 * statistics.fmean(float(share) for share in shares)


def _bits(own: dict[str, Any]) -> Bool[np.ndarray, " images"]:
    return unpacked(own["right"], own["tested"])


def _text(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, dict):
        sign = "+" if "tasks" not in value else ""
        tasks = f", {value['tasks']} tasks" if "tasks" in value else ""
        if value["low"] is None:
            return f"{value['value']:{sign}.1f}"
        ends = f"{value['low']:{sign}.1f} to {value['high']:{sign}.1f}"
        return f"{value['value']:{sign}.1f} ({ends}{tasks})"
    return str(value) if isinstance(value, int) else f"{value:.1f}"
