"""ELPV (Deitsch et al., 2019): 2,624 real grey 300 x 300 photographs of solar cells.

In the PyPI package `elpv-dataset` (`pip install -e ".[demo]"`; 91 MB, CC-BY-NC-SA 4.0).
An expert's defect probability is 0, 1/3, 2/3 or 1 for 1508, 295, 106 and 715 of them;
1,550 cells are polycrystalline, 1,074 monocrystalline.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8

from experiments.data.source import Arrays, pin, split
from experiments.data.task import Task

NAME = "ELPV"
SIZE = 2624
SHA256 = "3a55d8b7a55b2459842e84ec00200ba878a2cecf414a4af1b5597c69b817dbbb"
TRAIN, VALIDATION = 800, 200
NAMES = {
    "defect": ("0", "1/3", "2/3", "1"),  # the probability of a defect
    "mono": ("polycrystalline", "monocrystalline"),
}


@dataclasses.dataclass(frozen=True)
class Elpv:
    """The whole data set.

    Attributes:
      images: pixels of 0 to 255.
      defect: class 0 to 3, three times the defect probability.
      mono: 1 for a monocrystalline cell, 0 for a polycrystalline one.
    """

    images: UInt8[np.ndarray, "2624 300 300 1"]
    defect: Int[np.ndarray, " 2624"]
    mono: Int[np.ndarray, " 2624"]


def load(labels: Literal["defect", "mono"] = "defect", split_seed: int = 0) -> Task:
    """Loads the task, split as VTAB-1k: 800 to train, 200 to validate, 1,624 to test.

    Raises:
      ModuleNotFoundError, ValueError: as `photographs`.
    """
    cells = photographs()
    source = Arrays(cells.images, getattr(cells, labels))
    parts = split(source, split_seed, TRAIN, VALIDATION)
    kind = {"defect": "defects", "mono": "mono- or polycrystalline"}[labels]
    return Task(f"{NAME}, {kind}", len(NAMES[labels]), *parts, names=NAMES[labels])


def photographs() -> Elpv:
    """Loads every photograph, in the package's order.

    Raises:
      ModuleNotFoundError: the package is not installed; says how.
      ValueError: the photographs are not those of version 1.0.0.post1.
    """
    try:
        from elpv_dataset.utils import (  # pyright: ignore[reportMissingImports]
            load_dataset,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'ELPV is in elpv-dataset: pip install -e ".[demo]"'
        ) from error
    images, probability, kind = load_dataset()
    defect = np.rint(3 * probability).astype(np.int32)
    mono = (kind == "mono").astype(np.int32)
    pin(NAME, SHA256, images, defect, mono)
    return Elpv(images[..., None], defect, mono)
