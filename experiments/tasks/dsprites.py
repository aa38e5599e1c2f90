"""dSprites (Matthey et al., 2017), re-rendered: 737,280 binary images of 64 x 64.

The factors are exactly dSprites': every combination of 3 shapes (square, ellipse,
heart), 6 scales (0.5 to 1), 40 orientations (0 to 2 pi, both ends), 32 x and 32 y
positions. The rasterisation is ours: a pixel is white if its centre lies in the shape.
The sizes are chosen so that the largest sprite stays inside the image at every position
and that the mean pixel is dSprites' 0.043. Tables call it "re-rendered", because its
numbers are not comparable with those on the original files.
"""

import dataclasses
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from experiments.data.task import Task
from experiments.tasks import vtab

SIDE = 64
SHAPES = ("square", "ellipse", "heart")
SCALES = np.linspace(0.5, 1, 6)
ORIENTATIONS = np.linspace(0, 2 * np.pi, 40)
POSITIONS = np.linspace(0, 1, 32)
FACTORS = (len(SHAPES), len(SCALES), len(ORIENTATIONS), len(POSITIONS), len(POSITIONS))
# In pixels, at scale 1. Centres run over the middle half of the image, a pixel a step.
SQUARE = 17.15  # side
ELLIPSE = (13.7, 6.85)  # half axes
HEART = 9.05  # of the curve's unit
FIRST, LAST = 16.0, 48.0
ORDER_SEED = 0  # TFDS stores dSprites in a shuffled order; ours is this one


@dataclasses.dataclass(frozen=True)
class Dsprites:
    """The features of TFDS's `dsprites`, rendered when an example is read.

    Examples have a fixed shuffled order, as in TFDS, so that consecutive ones are a
    fair sample. `image` is uint8 `[64, 64, 1]` of 0 and 1.
    """

    def __len__(self) -> int:
        return int(np.prod(FACTORS))

    def __getitem__(self, index: int) -> dict[str, Any]:
        factors = np.unravel_index(_order()[index], FACTORS)
        shape, scale, orientation, x, y = (int(factor) for factor in factors)
        return {
            "image": render(shape, scale, orientation, x, y)[..., None],
            "label_shape": shape,
            "label_scale": scale,
            "label_orientation": orientation,
            "label_x_position": x,
            "label_y_position": y,
            "value_shape": shape + 1.0,
            "value_scale": SCALES[scale],
            "value_orientation": ORIENTATIONS[orientation],
            "value_x_position": POSITIONS[x],
            "value_y_position": POSITIONS[y],
        }


def load(name: str) -> Task:
    """Loads VTAB-1k's `dsprites_loc` or `dsprites_ori` on the re-rendered images."""
    source = vtab.labelled(name, Dsprites())
    return vtab.from_sources(name, {"train": source}, f"{name} (re-rendered)")


def render(
    shape: int, scale: int, orientation: int, x: int, y: int
) -> UInt8[np.ndarray, "64 64"]:
    """Returns one image of 0 and 1, given the indices of its factors."""
    columns, rows = np.meshgrid(*[np.arange(SIDE) + 0.5] * 2)
    right = columns - (FIRST + (LAST - FIRST) * POSITIONS[x])
    down = rows - (FIRST + (LAST - FIRST) * POSITIONS[y])
    angle = ORIENTATIONS[orientation]
    # Into the sprite's own frame, at scale 1.
    u = (np.cos(angle) * right + np.sin(angle) * down) / SCALES[scale]
    v = (-np.sin(angle) * right + np.cos(angle) * down) / SCALES[scale]
    return INSIDE[shape](u, v).astype(np.uint8)


def _square(u: np.ndarray, v: np.ndarray) -> Bool[np.ndarray, "64 64"]:
    return np.maximum(np.abs(u), np.abs(v)) <= SQUARE / 2


def _ellipse(u: np.ndarray, v: np.ndarray) -> Bool[np.ndarray, "64 64"]:
    return (u / ELLIPSE[0]) ** 2 + (v / ELLIPSE[1]) ** 2 <= 1


def _heart(u: np.ndarray, v: np.ndarray) -> Bool[np.ndarray, "64 64"]:
    """Returns (x^2 + y^2 - 1)^3 <= x^2 y^3: tip down, centred at half its height."""
    x, y = u / HEART, -v / HEART + 0.1
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


INSIDE = (_square, _ellipse, _heart)


@cache
def _order() -> np.ndarray:
    return np.random.default_rng(ORDER_SEED).permutation(int(np.prod(FACTORS)))
