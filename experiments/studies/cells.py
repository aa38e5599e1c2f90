"""Finished seeds of one or several comparisons, as `experiments.compare` keeps them."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from numpy import ndarray

from experiments import files
from experiments.reports import finished
from experiments.studies import table_store
from experiments.studies.comparison import ROWS, Row
from experiments.studies.recorded import unpacked

BY_NAME = {row.name: row for row in ROWS}


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """A seed of a row on a task.

    Attributes:
      folder: folder of the comparison.
      task: name of the task.
      row: the method.
      title: name of the method with its rank.
      label: the same with its density and what else tells it from others.
      chosen: settings that a search chose.
      result: the seed's entry of `results.json`.
      shared: settings that all cells of the folder share.
    """

    folder: Path
    task: str
    row: Row
    title: str
    label: str
    seed: int
    chosen: dict[str, Any]
    result: dict[str, Any]
    shared: dict[str, Any]

    @property
    def run(self) -> Path:
        """Folder of the run."""
        place = table_store.place(self.folder, self.task, self.row.name)
        return place / f"seed{self.seed}"

    @property
    def per_class(self) -> int | None:
        """Most training images of a class; None for all."""
        return self.shared.get("per_class")

    @property
    def right(self) -> Bool[ndarray, " images"]:
        """For every test image if it is right.

        Raises:
          ValueError: the seed is older than these.
        """
        if "right" not in self.result:
            raise ValueError(
                f"{self.folder}: {self.label} on {self.task}, seed {self.seed}, does "
                "not say which images are right: expected a newer comparison."
            )
        return unpacked(self.result["right"], self.result["tested"])


def read(folders: Iterable[Path]) -> list[Cell]:
    """Reads the finished seeds of comparisons.

    Raises:
      ValueError: a folder has none, or two have the same seed of a row on a task,
        trained on as many images a class.
    """
    found: dict[Any, Cell] = {}
    for folder in folders:
        values = files.read(folder / table_store.FILE) or {}
        own = list(_cells(folder, values))
        if not own:
            raise ValueError(
                f"{folder} has no finished seed: expected the --out of "
                "python -m experiments.compare."
            )
        for cell in own:
            name = cell.task, cell.label, cell.seed, cell.per_class
            other = found.setdefault(name, cell)
            if other is not cell:
                raise ValueError(
                    f"{other.folder} and {folder} both have {cell.label} on "
                    f"{cell.task}, seed {cell.seed}: expected one."
                )
    return list(found.values())


def _cells(folder: Path, values: dict[str, Any]) -> Iterable[Cell]:
    shared = values.get("shared", {})
    for task, rows in values.get("rows", {}).items():
        for name, done in rows.items():
            row = BY_NAME.get(name)
            if row is None:  # a trial
                continue
            title, label = _names(row, shared, done)
            for seed, result in done.get("seeds", {}).items():
                how = done["chosen"], result, shared
                yield Cell(folder, task, row, title, label, int(seed), *how)


def failures(folders: Iterable[Path]) -> list[dict[str, str]]:
    """Returns seeds and searches that failed when they were last tried, and why.

    Returns:
      Each with `label` (of a trial, its name), `task`, `step` and `error`.
    """
    found = []
    for folder in folders:
        values = files.read(folder / table_store.FILE) or {}
        for task, rows in values.get("rows", {}).items():
            for name, done in rows.items():
                row = BY_NAME.get(name)
                label = _names(row, values["shared"], done)[1] if row else name
                found += [
                    {"label": label, "task": task, "step": step, "error": error}
                    for step, error in done.get("failed", {}).items()
                ]
    return found


def _names(row: Row, shared: dict[str, Any], done: dict[str, Any]) -> tuple[str, str]:
    """Returns title and label of a row."""
    settings = {**shared[row.method], **done.get("chosen", {})}
    title = finished.label(row.method, settings)
    return title, title + density(settings) + row.note


def density(settings: dict[str, Any]) -> str:
    """Returns what a label says of the density; nothing of methods without one."""
    known = settings.get("target_density")
    sparse = known is not None and settings.get("gate") != "none"
    return f", density {known:g}" if sparse else ""
