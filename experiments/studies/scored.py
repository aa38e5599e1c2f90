"""Scores of test examples: of a comparison's images, and of runs on masks."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import files
from experiments.config.polyp import PolypConfig
from experiments.reports import finished
from experiments.reports.masks_figures import DICE
from experiments.reports.masks_report import TEST
from experiments.studies.cells import Cell, density


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """How well a method did on each test example of a task, with one seed.

    Attributes:
      task: name of the task.
      method: name of the method.
      label: its title with rank and density.
      title: the same without the density, as the paper's tables have it; None for a
        method on random weights.
      scores: of every test example, in [0, 1]; 0 or 1 where it is wrong or right.
      trainable: numbers that trained.
      alike: True if other seeds would give the same.
    """

    task: str
    method: str
    label: str
    title: str | None
    seed: int
    scores: Float[np.ndarray, " examples"]
    trainable: int
    alike: bool = False


def of_cells(cells: Iterable[Cell]) -> list[Scored]:
    """Returns which test images are right.

    Raises:
      ValueError: a cell is older than these.
    """
    return [
        Scored(
            task=cell.task,
            method=cell.row.method,
            label=cell.label,
            title=None if cell.row.random else cell.title,
            seed=cell.seed,
            scores=cell.right.astype(float),
            trainable=cell.result["trainable"],
            alike=cell.row.fixed and cell.per_class is None,
        )
        for cell in cells
    ]


def of_masks(folders: Sequence[Path], tested: str = TEST) -> list[Scored]:
    """Returns the Dice of every image of a set, of runs of `experiments.polyp`.

    Args:
      folders: of finished runs.
      tested: a run's own test images, or the name of another set of its `--tests`. One
        alone: all are tested with the same models, so they are no more tasks.

    Raises:
      ValueError: a folder is no finished run on masks, or was not tested on the set, or
        two have the same seed of a method.
    """
    found: dict[Any, tuple[Path, Scored]] = {}
    for folder in folders:
        config, summary, dice = (
            files.read(folder / name) for name in ("config.json", "summary.json", DICE)
        )
        if not (config and summary and dice):
            raise ValueError(
                f"{folder}: expected config.json, summary.json and {DICE}, the folder "
                f"of a finished run of {PolypConfig.program}."
            )
        if tested not in dice:
            raise ValueError(f"{folder} was tested on {', '.join(dice)}, not {tested}.")
        for method, scores in dice[tested].items():
            result = summary["methods"][method]
            settings = {**config[method], **result.get("settings", {})}
            title = finished.label(method, settings)
            own = Scored(
                task=summary["task"] if tested == TEST else tested,
                method=method,
                label=title + density(settings),
                title=title,
                seed=config["seed"],
                scores=np.array(scores),
                trainable=result["trainable"],
            )
            name = own.task, own.label, own.seed
            other, _ = found.setdefault(name, (folder, own))
            if other is not folder:
                raise ValueError(
                    f"{other} and {folder} both have {own.label} on {own.task}, seed "
                    f"{own.seed}: expected one."
                )
    return [own for _, own in found.values()]
