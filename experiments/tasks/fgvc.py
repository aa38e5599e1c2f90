"""FGVC, the five tasks of VPT (Jia et al., arXiv 2203.12119, Table 9).

The validation split is the official one if there is one, else a seeded tenth of the
training images; VPT's own lists are no longer served, so ours differ.
"""

import dataclasses
from pathlib import Path

from experiments.data import folders
from experiments.data.source import Source, split
from experiments.data.task import Task
from experiments.data.tfds import Builder
from experiments.tasks.vtab import label


@dataclasses.dataclass(frozen=True)
class Row:
    """One task.

    Attributes:
      builder: TFDS builder; None for an archive.
      archive: archive to download by hand if TFDS has no builder, and its address.
      official: True if the builder has a validation split.
    """

    classes: int
    licence: str
    builder: Builder | None = None
    archive: str = ""
    official: bool = False


TASKS = {
    "cub": Row(200, "non-commercial", Builder("caltech_birds2011", ("0.2.0",), label)),
    "nabirds": Row(
        555,
        "Cornell's terms of use",
        archive="nabirds.tar.gz from https://dl.allaboutbirds.org/nabirds",
    ),
    "flowers": Row(
        102,
        "not stated",
        Builder("oxford_flowers102", ("2.1.1",), label),
        official=True,
    ),
    "dogs": Row(120, "not stated", Builder("stanford_dogs", ("0.2.0",), label)),
    "cars": Row(
        196,
        "non-commercial",
        archive="cars_train, cars_test, devkit and cars_test_annos_withlabels.mat of "
        "Stanford Cars (the original address is dead; copies are on Kaggle)",
    ),
}


def load(name: str, data_dir: Path) -> Task:
    """Loads a task that TFDS prepared in `data_dir`.

    Raises:
      FileNotFoundError: the task is not prepared, or TFDS cannot get it; says what to
        do.
    """
    row = TASKS[name]
    if row.builder is None:
        folder = data_dir / name
        raise FileNotFoundError(
            f"There are no images in {folder}: unpack {row.archive}, so that its "
            "tables lie in that folder itself."
        )
    splits = ["train", "test", *["validation"] * row.official]
    return from_sources(name, row.builder.open(data_dir, splits, name))


def from_sources(name: str, sources: dict[str, Source]) -> Task:
    """Makes a task from the builder's splits, or from others of the same schema."""
    row, train = TASKS[name], sources["train"]
    if row.official:
        validation = sources["validation"]
    else:
        held_out = max(1, len(train) * folders.VALIDATION // 100)
        validation, train = split(train, folders.VALIDATION_SEED, held_out)
    return Task(name, row.classes, train, validation, sources["test"])
