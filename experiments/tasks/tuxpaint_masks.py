"""Cut-out pictures on photographs of solar cells: masks that packages alone hold.

The 295 stamps of TuxPaint-10 (`experiments/tasks/tuxpaint.py`) lie on photographs of
ELPV (`experiments/tasks/elpv.py`), at a random place and size; the mask is where a
stamp covers at least half of a pixel. Pictures are composed when they are read, by
their index alone. No stamp and no photograph is in two splits.
"""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from experiments.data.pairs import THRESHOLD, Pair
from experiments.data.segmentation_task import SegmentationTask
from experiments.tasks import elpv, tuxpaint
from experiments.tasks.tuxpaint import Stamps

NAME = "TuxPaint on ELPV"
SIZES = (0.3, 0.8)  # of a stamp's longer side, as a share of the photograph's
COPIES = (4, 1, 1)  # scenes of a stamp in the training, validation and test split


@dataclasses.dataclass(frozen=True, eq=False)
class Scenes:
    """Stamps on photographs.

    Attributes:
      stamps: every stamp.
      rows: those that are shown.
      photographs: grey photographs, of which each scene draws one.
      copies: number of scenes of a stamp.
      seed: seed of photograph, place and size.
    """

    stamps: Stamps
    rows: Int[np.ndarray, " N"]
    photographs: UInt8[np.ndarray, "P H W 1"]
    copies: int
    seed: int

    def __len__(self) -> int:
        return self.copies * len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        copy, place = divmod(index, len(self.rows))
        stamp, rng = int(self.rows[place]), np.random.default_rng((self.seed, index))
        photograph = self.photographs[rng.integers(len(self.photographs)), ..., 0]
        scene = Image.fromarray(photograph).convert("RGBA")
        layer = Image.new("RGBA", scene.size)
        layer.paste(*_placed(self.stamps.cut_out(stamp), scene.size, rng))
        mask = np.asarray(layer.getchannel("A")) > THRESHOLD
        return {
            "image": np.asarray(Image.alpha_composite(scene, layer).convert("RGB")),
            "mask": mask.astype(np.uint8),
            "name": f"{self.stamps.paths[stamp].stem}_{copy}",
        }


def load(folder: Path = tuxpaint.DEBIAN) -> SegmentationTask:
    """Loads the task; both sets are split as they are for classification.

    Raises:
      FileNotFoundError, ModuleNotFoundError: a package is missing; says how to get it.
      ValueError: the files are not those that are known.
    """
    stamps, cells = tuxpaint.load(folder), elpv.load()
    parts = []
    for seed, (name, copies) in enumerate(
        zip(("train", "validation", "test"), COPIES, strict=True)
    ):
        rows, photographs = getattr(stamps, name), getattr(cells, name)
        scenes = Scenes(rows.source, rows.rows, photographs.images, copies, seed)
        parts.append(scenes)
    return SegmentationTask(NAME, *parts)


def _placed(
    stamp: Image.Image, room: tuple[int, int], rng: np.random.Generator
) -> tuple[Image.Image, tuple[int, int]]:
    """Returns a resized stamp and the place of its left upper corner, all inside."""
    scale = rng.uniform(*SIZES) * min(room) / max(stamp.size)
    width, height = (max(1, round(scale * side)) for side in stamp.size)
    left, top = (
        int(rng.integers(whole - side + 1))
        for whole, side in zip(room, (width, height), strict=True)
    )
    return stamp.resize((width, height), Image.Resampling.BILINEAR), (left, top)
