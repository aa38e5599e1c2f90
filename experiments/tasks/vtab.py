"""VTAB-1k (Zhai et al., arXiv 1910.04867): 19 tasks, a row for each.

Splits and labels are those of the authors' `task_adaptation`; its percentages are those
of the number of examples, rounded down, and files are read in order.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data import tfds
from experiments.data.source import Source
from experiments.data.task import Task
from experiments.data.tfds import Builder, Part


@dataclasses.dataclass(frozen=True)
class Row:
    """One task.

    Attributes:
      group: natural, specialized or structured.
      builder: TFDS builder; several tasks may share one.
      validation, test: parts of the builder's splits; training is `train[:800]`.
      licence: licence of the images, as their authors state it.
    """

    group: str
    builder: Builder
    classes: int
    validation: Part
    test: Part
    licence: str


TRAIN = Part("train", count=800)
TEST, VALIDATION = Part("test"), Part("validation", count=200)


def _after(percent: int) -> Part:
    """Returns 200 examples of the training split, after this percentage of it."""
    return Part("train", (percent,), 200)


def label(features: dict[str, Any]) -> int:
    """Returns the builder's own label."""
    return int(features["label"])


def clevr_count(features: dict[str, Any]) -> int:
    """Returns 0 to 7 for 3 to 10 objects."""
    return len(features["objects"]["pixel_coords"]) - 3


def clevr_distance(features: dict[str, Any]) -> int:
    """Returns the nearest object's depth, in six bins."""
    depth = np.min(np.asarray(features["objects"]["pixel_coords"])[:, 2])
    return _last_below((0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0), depth)


def kitti_distance(features: dict[str, Any]) -> int:
    """Returns the nearest vehicle's depth in three bins; a fourth if there is none."""
    objects = features["objects"]
    vehicle = np.asarray(objects["type"]) < 3  # car, van, truck
    depths = np.asarray(objects["location"]).reshape(-1, 3)[vehicle, 2]
    return _last_below((-100.0, 8.0, 20.0, 999.0), min(depths, default=1000.0))


def dsprites_location(features: dict[str, Any]) -> int:
    """Returns the horizontal position, two of the 32 in a bin."""
    return int(features["label_x_position"]) // 2


def dsprites_orientation(features: dict[str, Any]) -> int:
    """Returns the orientation, two or three of the 40 in a bin."""
    return int(features["label_orientation"] / 2.5)


def azimuth(features: dict[str, Any]) -> int:
    """Returns one of 18 directions."""
    return int(features["label_azimuth"])


def elevation(features: dict[str, Any]) -> int:
    """Returns one of nine heights."""
    return int(features["label_elevation"])


def _last_below(thresholds: tuple[float, ...], value: float) -> int:
    """Returns the largest i with `thresholds[i] < value`."""
    return int(np.searchsorted(thresholds, value)) - 1


_RESISC = "NWPU-RESISC45.rar from its OneDrive folder, into MANUAL_DIR"
_RETINOPATHY = "Kaggle's diabetic-retinopathy-detection, into MANUAL_DIR"
_CLEVR, _KITTI = ("3.0.0", "3.1.0"), ("3.1.0", "3.2.0", "3.3.0")
_DSPRITES, _NORB = ("2.0.0",), ("2.0.0",)
_LATER_DSPRITES = Part("train", (80, 10))
_LATER_60 = Part("train", (60, 20))
_NORB_PARTS = (Part("test", count=200), Part("test", (50,)))
_N, _SP, _ST = "natural", "specialized", "structured"

TASKS = {
    "caltech101": Row(
        _N, Builder("caltech101", ("3.0.1", "3.0.2"), label), 102, _after(90), TEST,
        "CC-BY-4.0",
    ),
    "cifar100": Row(
        _N, Builder("cifar100", ("3.0.2",), label), 100, _after(90), TEST, "not stated",
    ),
    "dtd": Row(
        _N, Builder("dtd", ("3.0.1",), label), 47, VALIDATION, TEST, "for research",
    ),
    "oxford_flowers102": Row(
        _N, Builder("oxford_flowers102", ("2.1.1",), label), 102, VALIDATION, TEST,
        "not stated",
    ),
    "oxford_iiit_pet": Row(
        _N, Builder("oxford_iiit_pet", ("3.2.0", "4.0.0"), label), 37, _after(80), TEST,
        "CC-BY-SA-4.0",
    ),
    "svhn": Row(
        _N, Builder("svhn_cropped", ("3.0.0", "3.1.0"), label), 10, _after(90), TEST,
        "non-commercial",
    ),
    "sun397": Row(
        _N, Builder("sun397/tfds", ("4.0.0",), label), 397, VALIDATION, TEST,
        "for research",
    ),
    "patch_camelyon": Row(
        _SP, Builder("patch_camelyon", ("2.0.0",), label), 2, VALIDATION, TEST, "CC0",
    ),
    "eurosat": Row(
        _SP, Builder("eurosat/rgb", ("2.0.0",), label), 10, _after(60), _LATER_60,
        "MIT",
    ),
    "resisc45": Row(
        _SP, Builder("resisc45", ("3.0.0",), label, _RESISC), 45, _after(60), _LATER_60,
        "for research",
    ),
    "diabetic_retinopathy": Row(
        _SP,
        Builder(
            "diabetic_retinopathy_detection/btgraham-300",
            ("3.0.0",), label, _RETINOPATHY,
        ),
        5, VALIDATION, TEST, "Kaggle's rules of the competition",
    ),
    "clevr_count": Row(
        _ST, Builder("clevr", _CLEVR, clevr_count), 8, _after(90), Part("validation"),
        "CC-BY-4.0",
    ),
    "clevr_dist": Row(
        _ST, Builder("clevr", _CLEVR, clevr_distance), 6, _after(90),
        Part("validation"), "CC-BY-4.0",
    ),
    "dmlab": Row(
        _ST, Builder("dmlab", ("2.0.1",), label), 6, VALIDATION, TEST, "not stated",
    ),
    "kitti_dist": Row(
        _ST, Builder("kitti", _KITTI, kitti_distance), 4, VALIDATION, TEST,
        "CC-BY-NC-SA-3.0",
    ),
    "dsprites_loc": Row(
        _ST, Builder("dsprites", _DSPRITES, dsprites_location, binary=True), 16,
        _after(80), _LATER_DSPRITES, "Apache-2.0",
    ),
    "dsprites_ori": Row(
        _ST, Builder("dsprites", _DSPRITES, dsprites_orientation, binary=True), 16,
        _after(80), _LATER_DSPRITES, "Apache-2.0",
    ),
    "smallnorb_azi": Row(
        _ST, Builder("smallnorb", _NORB, azimuth), 18, *_NORB_PARTS, "for research",
    ),
    "smallnorb_ele": Row(
        _ST, Builder("smallnorb", _NORB, elevation), 9, *_NORB_PARTS, "for research",
    ),
}  # fmt: skip

SHARED = {"cifar100": "cifar", "kitti_dist": "kitti"}  # folders, where they differ


def load(name: str, data_dir: Path) -> Task:
    """Loads a task that TFDS prepared in `data_dir`.

    Raises:
      FileNotFoundError: the task is not prepared; says how to prepare it.
      KeyError: VTAB has no such task.
    """
    row = TASKS[name]
    return from_sources(name, row.builder.open(data_dir, splits(row), name))


def labelled(name: str, features: Any) -> Source:
    """Returns a split's features as the images and labels of a task."""
    return tfds.TfdsSplit(features, TASKS[name].builder)


def splits(row: Row) -> list[str]:
    """Returns the names of the builder's splits that a task reads."""
    return sorted({part.split for part in (TRAIN, row.validation, row.test)})


def from_sources(name: str, sources: dict[str, Source], title: str = "") -> Task:
    """Makes a task from the builder's splits, or from others of the same schema."""
    row = TASKS[name]
    train, validation, test = (
        tfds.part(sources, part) for part in (TRAIN, row.validation, row.test)
    )
    return Task(title or name, row.classes, train, validation, test)
