"""Scores of test examples: of a comparison's images, and of runs on masks."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import files
from experiments.config.polyp import PolypConfig
from experiments.methods.registry import BOX
from experiments.reports import finished
from experiments.reports.masks_figures import DICE
from experiments.reports.masks_report import TEST
from experiments.studies.cells import Cell, density

# Settings of all methods that change numbers; paths of data and weights may differ.
SHARED = (
    *("task", "limit", "fit", "flip", "image_size", "epochs", "steps", "round_steps"),
    *("warmup_epochs", "schedule", "batch", "accumulate", "pooling", "trainable_lr"),
    *("targets", "trainable", "no_decay", "dtype", "random_prompts"),
)


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
    first: dict[Any, tuple[Path, Any]] = {}
    for folder in folders:
        for own, how in _of_run(folder, tested):
            other, known = first.setdefault((own.task, own.label), (folder, how))
            if known != how:
                raise ValueError(
                    f"{other} and {folder} differ in the settings of {own.label}, or "
                    "in the number of images: expected seeds of one setting."
                )
            name = own.task, own.label, own.seed
            other, _ = found.setdefault(name, (folder, own))
            if other is not folder:
                raise ValueError(
                    f"{other} and {folder} both have {own.label} on {own.task}, seed "
                    f"{own.seed}: expected one."
                )
    return [own for _, own in found.values()]


def _of_run(folder: Path, tested: str) -> Iterator[tuple[Scored, Any]]:
    """Yields the Dice of a run's methods, each with what its seeds share."""
    config, summary, dice = (
        files.read(folder / name) for name in ("config.json", "summary.json", DICE)
    )
    if not (config and summary):
        raise ValueError(
            f"{folder}: expected the folder of a finished run of {PolypConfig.program}."
        )
    if not dice:
        raise ValueError(
            f"{folder} has no {DICE}: {PolypConfig.program} --resume {folder} "
            "writes it."
        )
    if tested not in dice:
        raise ValueError(f"{folder} was tested on {', '.join(dice)}, not {tested}.")
    if missing := sorted(summary["methods"].keys() - dice[tested].keys()):
        raise ValueError(f"{folder}/{DICE} lacks {', '.join(missing)}.")
    for method, scores in dice[tested].items():
        if method == BOX:  # told the truth: no prediction
            continue
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
            alike=method in PolypConfig.stepless,
        )
        yield own, ([config.get(field) for field in SHARED], settings, len(scores))
