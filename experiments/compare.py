"""Compares every method on several tasks: a search on validation, then several seeds.

    python -m experiments.compare --out runs/comparison

For each task and method, learning rates (and densities, for sparse methods) are tried
on the training images for `--search_epochs` and judged on validation. The best setting
is trained on training and validation images, once for each seed, and tested once.
`results.json` in `--out` keeps every finished search and seed: the same command goes on
with the others, also on another machine with only that file (an unfinished search or
seed is resumed from the folder `runs`). Several processes may work in one folder:
`--cluster local --workers 4` starts four, `--cluster slurm` an array of jobs.
Writes the table of all finished seeds into `report.md` and `report.json`, and
`accuracy.png` with `--memory`.

    python -m experiments.compare --config real_tasks --data DATA --out runs/real_tasks

takes its tasks from the folders in DATA, and one rate for a method on all of them: of
three, that with the lowest mean validation loss on the tasks of `--pool`. With
`--tasks` and no names the search is all: methods compared without a look at any test.
`--pool --run.grid.lr_factors` without numbers takes the methods' own rates, untried.
`experiments.studies.real_tasks` makes the table of it.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import files, paths, terminal
from experiments.config import command_line
from experiments.config.images import ImageConfig
from experiments.methods.registry import LINEAR
from experiments.names import unknown
from experiments.pretrained import base_models
from experiments.reports import finished, table
from experiments.runs import cluster, images, search, setup
from experiments.runs.cells import Cell
from experiments.runs.run import complete
from experiments.studies import comparison_figure, pooled, table_store
from experiments.studies.comparison import PRESETS, Comparison, Row, Table
from experiments.studies.pooled import Tried
from experiments.studies.recorded import Recorded, Trial, drawn
from experiments.studies.table_store import Part
from snella_jax.nnx.targets import select

PROGRAM = "python -m experiments.compare"
SUMMARY = """\
Compares methods on several tasks: rates chosen on validation, then several seeds.
--config small (the default) or real_tasks: the values without any other words.
--run.X: settings that all runs share. The same command goes on where it was."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is left, and writes the table."""
    workers, given = command_line.spread(PROGRAM, argv)
    first = command_line.parser(PROGRAM)
    first.add_argument("--config", default="small")
    known, words = first.parse_known_args(given)
    if known.config not in PRESETS:
        text = unknown("config", known.config, PRESETS, f"{PROGRAM} --help")
        raise SystemExit(f"{PROGRAM}: {text}")
    config = command_line.parse_study(PROGRAM, PRESETS[known.config], words, SUMMARY)
    console = terminal.console()
    with terminal.exit_on_error(PROGRAM):
        cluster.prepare(workers)
        config.check()
        memory = _memory(config.memory)
        rows = [Row(method) for method in config.methods]
        rows += [Row(method, random=True) for method in config.controls]
        paths.check_out(config.out)
        if not config.table_only:
            _check_inputs(config)
        whole = Table(config)
    store = whole.store
    left = {} if config.table_only else _cells(rows, config, store, console)
    failed = cluster.done(
        workers, table_store.work(PROGRAM, given, store, left), console
    )
    with store.locked():
        if tried := _trials(rows, config, store):
            console.print(pooled.shown(tried))
        if made := whole.made():
            table.write(made, config.out, console)
            if memory:
                _draw(whole.points(made, memory), made, memory, config, console)
    if failed:
        raise SystemExit("\n".join(failed))


def _draw(
    points: list[dict[str, Any]],
    made: dict[str, Any],
    memory: dict[str, dict[str, Any]],
    config: Comparison,
    console: Console,
) -> None:
    """Draws accuracy against memory, for the methods that have both."""
    if not points:
        console.print(f"No method of the table is in {config.memory}: no accuracy.png.")
        return
    measured, setup = next(iter(memory.values())), "; ".join(made["setups"])
    if any(point["method"].endswith("*") for point in points):
        setup += f"; *: {finished.UNDECAYED_NOTE}"
    comparison_figure.accuracy_memory(
        config.out / "accuracy.png", points, measured, setup
    )


def _cells(
    rows: Sequence[Row],
    config: Comparison,
    store: table_store.Store,
    console: Console,
) -> dict[Cell, Part]:
    """Returns all cells, trials first: a row waits for its own, which others make."""
    shared = config, store, console
    found = {}
    for row in rows:
        for trial in config.tried(row):
            name = config.named(trial.task), trial.cell[1]
            do = functools.partial(_trial, trial, row, *shared)
            found[store.cell(*name)] = Part(name, (config.run.seed,), do)
    for task, row in itertools.product(config.tasks, rows):
        name = config.named(task), row.name
        do = functools.partial(_tried, task, row, *shared)
        found[store.cell(*name)] = Part(name, config.seeds_of(row), do)
    return found


def _tried(
    task: str, row: Row, config: Comparison, store: table_store.Store, console: Console
) -> str | None:
    """Completes a cell; returns what failed."""
    name = config.named(task)

    def search(place: Path) -> table_store.Done:
        if row.method == LINEAR:  # whose fit chooses its strength itself
            return {"chosen": {}}
        if config.rates:
            return {"chosen": _taken(name, row, config.rates)}
        if config.pool:
            return _pooled(row, config, store, console)
        if config.run.grid.is_single:
            return {"chosen": config.run.settings[row.method].searched}
        return _searched(task, row, config, store, place, console)

    def train(out: Path, seed: int, chosen: table_store.Done) -> table_store.Done:
        own = _with(config.config(task, row, seed), row, chosen)
        own = dataclasses.replace(own, out=out)
        prepared = images.prepared(task, own, console, Recorded)
        prepared = dataclasses.replace(prepared, keep=config.keep_models)
        store.begin(drawn(name, own), prepared.inputs, console)
        summary = complete(prepared, resume=(out / "config.json").exists())
        where = {name: summary[name] for name in ("device", "versions")}
        return summary["methods"][row.method] | where

    cell, seeds = (name, row.name), config.seeds_of(row)
    return table_store.attempt(PROGRAM, store, cell, seeds, search, train, console)


def _trial(
    trial: Tried,
    row: Row,
    config: Comparison,
    store: table_store.Store,
    console: Console,
) -> str | None:
    """Completes a trial of a pooled search, a cell of one seed; returns what failed."""
    name, rate = config.named(trial.task), {"lr": trial.lr}

    def train(out: Path, seed: int, chosen: table_store.Done) -> table_store.Done:
        own = _with(config.config(trial.task, row, seed), row, chosen)
        own = dataclasses.replace(
            own,
            protocol="choose",
            epochs=config.trial_epochs,
            eval_every=config.trial_epochs,
            out=out,
        )
        prepared = images.prepared(trial.task, own, console, Trial)
        store.begin(drawn(name, own), prepared.inputs, console)
        return pooled.measured(row.method, prepared)

    cell, seeds = (name, trial.cell[1]), (config.run.seed,)
    how = seeds, lambda _: {"chosen": rate}, train, console
    return table_store.attempt(PROGRAM, store, cell, *how)


def _pooled(
    row: Row, config: Comparison, store: table_store.Store, console: Console
) -> table_store.Done:
    """Returns the rate that a row's trials choose, and the loss at every rate.

    Waits for processes that are at work on them.
    """
    names, results = ("seeds", str(config.run.seed)), []
    for trial in config.tried(row):
        cell = config.named(trial.task), trial.cell[1]
        do = functools.partial(_trial, trial, row, config, store, console)
        results.append((trial.lr, table_store.awaited(store, cell, names, do)))
    losses = pooled.losses(results)
    trials = [
        {"lr": lr, "val_loss": loss if math.isfinite(loss) else None}
        for lr, loss in losses.items()
    ]
    return {"pooled": trials, "chosen": {"lr": pooled.best(losses)}}


def _trials(
    rows: Sequence[Row], config: Comparison, store: table_store.Store
) -> dict[Tried, table_store.Done]:
    """Returns the trials of a pooled search that have been made."""
    cells, seed = store.tasks(), str(config.run.seed)
    found = {}
    for trial in (trial for row in rows for trial in config.tried(row)):
        cell = cells.get(config.named(trial.task), {}).get(trial.cell[1], {})
        if result := cell.get("seeds", {}).get(seed):
            found[trial] = result
    return found


def _taken(task: str, row: Row, path: Path) -> dict[str, float]:
    """Returns what another comparison chose for a row, on that task or on any.

    Raises:
      RuntimeError: it chose nothing, or on other tasks different rates.
    """
    cells = (files.read(path) or {}).get("rows", {})
    found = {
        where: own[row.name]["chosen"]
        for where, own in cells.items()
        if "chosen" in own.get(row.name, {})
    }
    every = list(found.values())
    if task not in found and (not every or any(own != every[0] for own in every)):
        raise RuntimeError(
            f"{path} has no rate of {row.name} for {task}: expected a cell of that "
            "task, or one rate for all tasks."
        )
    return found.get(task, every[0])


def _with(run: ImageConfig, row: Row, chosen: table_store.Done) -> ImageConfig:
    """Returns a config with the settings that were chosen for its method."""
    if row.method == LINEAR:
        return run
    settings = dataclasses.replace(run.settings[row.method], **chosen)
    return run.with_settings(**{row.method: settings})


def _check_inputs(config: Comparison) -> None:
    """Raises an error if a task or the weights are missing or a method does not fit."""
    run = dataclasses.replace(config.run, methods=config.adapted())
    own = [config.config(task, Row(LINEAR), run.seed) for task in config.all_tasks]
    tasks = [dataclasses.replace(run, task=one.task) for one in own]
    if lacking := [text for task in tasks if (text := images.missing(task))]:
        raise ValueError("\n  ".join(["some tasks cannot be run:", *lacking]))
    base = base_models.load(run, classes=2)
    select(base, run.targets)
    setup.check_methods(run, base)


def _memory(path: Path | None) -> dict[str, dict[str, Any]]:
    """Returns the rows of a `memory.json` by method; none without a file."""
    rows = files.read(path) if path else []
    found = {row["method"]: row for row in rows or ()}
    if rows is None or len({row["model"] for row in rows}) > 1:
        raise ValueError(f"{path}: expected a memory.json of one model.")
    if len(found) < len(rows):
        raise ValueError(f"{path}: expected one row for each method, of one sketch.")
    return found


def _searched(
    task: str,
    row: Row,
    config: Comparison,
    store: table_store.Store,
    place: Path,
    console: Console,
) -> dict[str, Any]:
    """Searches; returns the trials of a method and the best settings."""
    console.rule(f"{task}, {row.name}, search")
    own = config.config(task, row, config.run.seed)
    own = dataclasses.replace(own, epochs=config.trial_epochs, out=place)
    prepared = images.prepared(task, own, console)
    store.begin(drawn(config.named(task), own), prepared.inputs, console)
    best = search.chosen(row.method, prepared).settings[row.method]
    return {
        "trials": files.read(place / search.FILE)[row.method],
        "chosen": best.searched,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
