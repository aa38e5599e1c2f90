"""Compares methods over tasks: paired differences, sign tests and mean ranks.

    python -m experiments.compare --config real_tasks --data DATA --out runs/real_tasks
    python -m experiments.studies.real_tasks --runs runs/real_tasks --out runs/report

The first command trains and tests, and can be stopped and started again; the second
reads what is finished, also in several folders of the same settings. `--masks` adds
runs of `experiments.polyp`, whose images count by their Dice. A difference of two
methods is paired by test image and seed, and its 95% interval counts both as samples
(`experiments.studies.paired`). Writes `report.md`, `report.json` and
`differences.png` into `--out`.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments import files, terminal
from experiments.paths import Given, check_out, stem
from experiments.reports import paper
from experiments.reports.text import markdown_tables, printed_tables
from experiments.studies import cells, paired, real_tasks_report, scored, table_store
from experiments.studies.cells import Cell
from experiments.studies.scored import Scored

PROGRAM = "python -m experiments.studies.real_tasks"
CONFIG = "config.json"  # of a run
DENSITY = 0.3  # the paper's
SEARCHED = ("pool", "search_epochs")  # settings of the search alone
Scores = dict[int, np.ndarray]  # of every test image, by seed
Table = Mapping[str, Mapping[str, Scores]]  # by label and task


@dataclasses.dataclass(frozen=True)
class RealTasksConfig:
    """Options of `python -m experiments.studies.real_tasks`."""

    runs: tuple[Given, ...] = ()
    """Folders of `experiments.compare`, of the same settings."""
    masks: tuple[Given, ...] = ()
    """Folders of finished runs of experiments.polyp, one task more."""
    masks_set: str = scored.TEST
    """Images of masks: test, or another set that these runs were tested on."""
    against: tuple[str, ...] = ("lora", "bias")
    """Methods that the others are compared with in the tables; the JSON has all pairs.
    """
    tasks: tuple[str, ...] = ()
    """Tasks, in this order. Default: all that have a finished seed."""
    out: Given = Path("runs/real_tasks_report")
    """Folder to write report.md, report.json and differences.png into."""


def main(argv: Sequence[str] | None = None) -> None:
    """Compares, prints, and writes the report."""
    config = tyro.cli(RealTasksConfig, prog=PROGRAM, args=argv, description=__doc__)
    console = terminal.console()
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        if not config.runs and not config.masks:
            raise ValueError("expected --runs, --masks or both.")
        found = cells.read(config.runs)
        _check_shared(found)
        masks = scored.of_masks(config.masks, config.masks_set)
        shared = found[0].shared if found else files.read(config.masks[0] / CONFIG)
        every = [*scored.of_cells(found), *masks]
        against = _labels(every, config.against)
        report = compared(every, config.tasks) | {
            "setup": _setup(shared),
            "dice": sorted({own.task for own in masks}),
            **({} if found else {"orders": []}),  # they are of accuracies
            "searches": _searches(config.runs),
            "failed": cells.failures(config.runs),
        }
    tables = real_tasks_report.tables(report, against)
    caption = real_tasks_report.caption(report)
    console.print(printed_tables(tables, caption))
    config.out.mkdir(parents=True, exist_ok=True)
    files.write(config.out / "report.json", report, indent=1)
    files.replace(config.out / "report.md", markdown_tables(tables, caption))
    if against:
        path = config.out / "differences.png"
        real_tasks_report.differences(path, report, against[0])
    console.print(f"report.md and report.json are in {config.out}", soft_wrap=True)


def _labels(found: Sequence[Scored], methods: Sequence[str]) -> list[str]:
    """Returns the labels of methods that are there, without those on random weights.

    Raises:
      ValueError: a method is there with several settings.
    """
    labels: dict[str, dict[str, None]] = {}
    for own in found:
        if own.title is not None:
            labels.setdefault(own.method, {})[own.label] = None
    for name in methods:
        if len(labels.get(name, {})) > 1:
            raise ValueError(
                f"--against {name}: there are {', '.join(labels[name])}; expected a "
                "method with one setting, or fewer --runs."
            )
    return [label for name in methods for label in labels.get(name, {})]


def _check_shared(found: Sequence[Cell]) -> None:
    """Raises a `ValueError` where folders differ in a setting that changes numbers."""
    first: dict[str, Cell] = {}
    for cell in found:
        same = first.setdefault(cell.label, cell)
        method = cell.row.method
        shared = {
            name
            for name, value in found[0].shared.items()
            if name not in SEARCHED and not isinstance(value, dict)
            if cell.shared.get(name) != value
        }
        own = {method} if same.shared[method] != cell.shared[method] else set()
        if other := sorted(shared | own):
            raise ValueError(
                f"{found[0].folder} and {cell.folder} differ in {', '.join(other)}: "
                "report them separately."
            )


def _searches(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Returns trials and choice of every row that was searched, by row and task."""
    rows: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for task, own in files.read(folder / table_store.FILE)["rows"].items():
            for name, done in own.items():
                trials = done.get("pooled") or done.get("trials")
                if trials and "chosen" in done and name in cells.BY_NAME:
                    kept = {"trials": trials, "chosen": done["chosen"]}
                    rows.setdefault(name, {})[task] = kept
    return rows


def table(found: Sequence[Scored]) -> dict[str, dict[str, Scores]]:
    """Returns the scores of all test examples, by label and task.

    A linear probe's one seed stands for all: on the same images they give the same.
    """
    seeds: dict[str, set[int]] = {}
    for own in found:
        seeds.setdefault(own.task, set()).add(own.seed)
    scores: dict[str, dict[str, Scores]] = {}
    for each in found:
        own = scores.setdefault(each.label, {}).setdefault(each.task, {})
        for seed in seeds[each.task] if each.alike else [each.seed]:
            own[seed] = each.scores
    return scores


def compared(found: Sequence[Scored], tasks: Sequence[str] = ()) -> dict[str, Any]:
    """Compares methods over tasks.

    Args:
      found: finished seeds.
      tasks: names in the order of the columns; none for all.

    Returns:
      `tasks`, the test images of each; `methods`, each with `label`,
      `trainable`, `tasks` (a `paired.Mean` each as a dict), `over_tasks` and `rank`
      (None if one of its tasks is missing); `pairs`, each with `method`, `other`,
      `tasks`, `over_tasks` (of the tasks that both have) and `signs`; `critical`, the
      difference of ranks that is significant; `orders` of the paper.

    Raises:
      ValueError: there is no finished seed of a task.
    """
    scores = table(found)
    sizes = {own.task: len(own.scores) for own in found}
    if missing := [task for task in tasks if task not in sizes]:
        raise ValueError(f"No finished seed of {', '.join(missing)}: {list(sizes)}.")
    sizes = {task: sizes[task] for task in tasks or sizes}
    means = {
        label: {task: _mean(own[task]) for task in sizes if task in own}
        for label, own in scores.items()
    }
    whole = [label for label, own in means.items() if own.keys() == sizes.keys()]
    rank = paired.ranks(
        {name: [m.value for m in means[name].values()] for name in whole}
    )
    compared_pairs = [
        _pair(scores, pair, list(sizes)) for pair in paired.pairs([*means])
    ]
    return {
        "tasks": sizes,
        "methods": [
            {
                "label": label,
                "trainable": _trainable(found, label),
                "tasks": {task: mean.as_dict() for task, mean in own.items()},
                "over_tasks": _over(own) if label in whole else None,
                "rank": rank.get(label),
            }
            for label, own in means.items()
        ],
        "pairs": compared_pairs,
        "critical": paired.critical(len(whole), len(sizes)),
        "orders": _orders(found, compared_pairs),
    }


def _pair(scores: Table, pair: tuple[str, str], tasks: Sequence[str]) -> dict[str, Any]:
    """Compares two methods on the tasks that both have."""
    ours, theirs = (scores[label] for label in pair)
    gaps = {
        task: gap
        for task in tasks
        if task in ours and task in theirs
        if (gap := paired.difference(ours[task], theirs[task])) is not None
    }
    return {
        "method": pair[0],
        "other": pair[1],
        "tasks": {task: gap.as_dict() for task, gap in gaps.items()},
        "over_tasks": _over(gaps) if gaps else None,
        "signs": paired.signs([gap.value for gap in gaps.values()]),
    }


def _mean(scores: Scores) -> paired.Mean:
    return paired.mean(np.stack(list(scores.values())))


def _over(means: Mapping[str, paired.Mean]) -> dict[str, Any]:
    return paired.over_tasks(list(means.values())).as_dict() | {"tasks": len(means)}


def _orders(found: Sequence[Scored], pairs: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns neighbours in the paper's order (Table XIII) with our difference."""
    known = _of_the_paper(found)
    order = sorted(known, key=lambda label: paper.MEANS[known[label]])
    rows = []
    for worse, better in itertools.pairwise(order):
        theirs = paper.MEANS[known[better]] - paper.MEANS[known[worse]]
        if not theirs:
            continue
        pair = next(p for p in pairs if {p["method"], p["other"]} == {better, worse})
        sign, whole = 1 if pair["method"] == better else -1, pair["over_tasks"]
        if whole is None:
            continue
        ends = sorted((sign * whole["low"], sign * whole["high"]))
        holds = None if ends[0] <= 0 <= ends[1] else ends[0] > 0
        rows.append({
            "better": better,
            "worse": worse,
            "paper": theirs,
            "ours": sign * whole["value"],
            "low": ends[0],
            "high": ends[1],
            "tasks": whole["tasks"],
            "holds": holds,
        })  # fmt: skip
    return rows


def _of_the_paper(found: Sequence[Scored]) -> dict[str, str]:
    """Returns a label for each title of the paper's, with its density if several do."""
    labels: dict[str, str] = {}
    for own in found:
        if own.title in paper.MEANS:
            labels.setdefault(own.title, own.label)
            if own.label == f"{own.title}, density {DENSITY}":
                labels[own.title] = own.label
    return {label: title for title, label in labels.items()}


def _trainable(found: Sequence[Scored], label: str) -> list[int]:
    sizes = {own.trainable for own in found if own.label == label}
    return [min(sizes), max(sizes)]


def _setup(shared: dict[str, Any]) -> str:
    size = f", {shared['image_size']} pixels" if shared["image_size"] else ""
    length = (
        f"{shared['steps']} steps" if shared["steps"] else f"{shared['epochs']} epochs"
    )
    few = f", {shared['per_class']} images a class" if shared.get("per_class") else ""
    return f"{stem(shared['model'])}{size}, {length}, batch {shared['batch']}{few}"


if __name__ == "__main__":
    main()
