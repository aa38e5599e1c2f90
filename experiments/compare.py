"""Compares every method on several tasks: a search on validation, then several seeds.

    python -m experiments.compare --out runs/comparison

For each task and method, learning rates (and densities, for sparse methods) are tried
on the training images for `--search_epochs` and judged on validation. The best setting
is trained on training and validation images, once for each seed, and tested once.
`results.json` in `--out` keeps every finished search and seed: the same command goes on
with the others, also on another machine with only that file (an unfinished search or
seed is resumed from the folder `runs`). Several processes may work in one folder.
Writes the table of all finished seeds into `report.md` and `report.json`, and
`accuracy.png` with `--memory`.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import files, paths, terminal
from experiments.config import command_line
from experiments.config.images import ImageConfig
from experiments.methods.registry import LINEAR
from experiments.pretrained import base_models
from experiments.reports import finished, table
from experiments.runs import images, search, setup
from experiments.runs.run import complete
from experiments.studies import comparison_figure, table_store
from experiments.studies.comparison import Comparison, Row, Table
from snella_jax.nnx.targets import select

PROGRAM = "python -m experiments.compare"
SUMMARY = """\
Compares methods on several tasks: rates chosen on validation, then several seeds.
--run.X: settings that all runs share. The same command goes on where it was."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is left, and writes the table."""
    config = command_line.parse_study(PROGRAM, Comparison(), argv, SUMMARY)
    console = terminal.console()
    with terminal.exit_on_error(PROGRAM):
        config.check()
        memory = _memory(config.memory)
        rows = [Row(method) for method in config.methods]
        rows += [Row(method, random=True) for method in config.controls]
        paths.check_out(config.out)
        if not config.table_only:
            _check_inputs(config)
        cells = Table(config)
    store = cells.store
    left = [] if config.table_only else list(itertools.product(config.tasks, rows))
    failed = [text for cell in left if (text := _tried(*cell, config, store, console))]
    with store.locked():
        if made := cells.made():
            table.write(made, config.out, console)
            if memory:
                _draw(cells.points(made, memory), made, memory, config, console)
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


def _tried(
    task: str, row: Row, config: Comparison, store: table_store.Store, console: Console
) -> str | None:
    """Completes a cell; returns what failed."""

    def search(place: Path) -> table_store.Done:
        return _searched(task, row, config, store, place, console)

    def train(out: Path, seed: int, chosen: table_store.Done) -> table_store.Done:
        own = dataclasses.replace(_config(task, row, config, seed), out=out)
        if row.method != LINEAR:
            settings = dataclasses.replace(own.settings[row.method], **chosen)
            own = own.with_settings(**{row.method: settings})
        prepared = images.prepared(task, own, console)
        store.begin(task, prepared.inputs, console)
        summary = complete(prepared, resume=(out / "config.json").exists())
        where = {name: summary[name] for name in ("device", "versions")}
        return summary["methods"][row.method] | where

    cell = task, row.name
    seeds = config.seeds[:1] if row.fixed else config.seeds
    return table_store.attempt(PROGRAM, store, cell, seeds, search, train, console)


def _check_inputs(config: Comparison) -> None:
    """Raises an error if a task or the weights are missing or a method does not fit."""
    run = dataclasses.replace(config.run, methods=config.adapted())
    tasks = [dataclasses.replace(run, task=task) for task in config.tasks]
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
    if row.method == LINEAR:  # whose fit chooses its strength itself
        return {"chosen": {}}
    console.rule(f"{task}, {row.name}, search")
    own = _config(task, row, config, config.run.seed)
    own = dataclasses.replace(own, epochs=config.search_epochs, steps=None, out=place)
    prepared = images.prepared(task, own, console)
    store.begin(task, prepared.inputs, console)
    best = search.chosen(row.method, prepared).settings[row.method]
    return {
        "trials": files.read(place / search.FILE)[row.method],
        "chosen": best.searched,
    }


def _config(task: str, row: Row, config: Comparison, seed: int) -> ImageConfig:
    own = {"task": task, "methods": (row.method,), "seed": seed}
    return dataclasses.replace(config.run, random_weights=row.random, **own)


if __name__ == "__main__":
    main(sys.argv[1:])
