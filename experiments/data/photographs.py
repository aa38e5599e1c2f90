"""Photographs of one thing: a folder of images, as squares of one size in memory."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from experiments.data import class_folders, fingerprint
from experiments.data.source import Files, Source


@dataclasses.dataclass(frozen=True, eq=False)
class Photographs:
    """Squares of one size, a source of dicts with `image` and `name`.

    Attributes:
      images: pixels, RGB, each cut out at random.
      centres: the photographs' central squares, which no seed moves.
      names: names of the files, in the images' order.
      notes: remarks on what was left out.
    """

    images: UInt8[np.ndarray, "N size size 3"]
    centres: UInt8[np.ndarray, "N size size 3"]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "name": self.names[index]}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the squares, see `fingerprint.of_split`."""
        hashed = [fingerprint.of_image(image, 0) for image in self.images]
        return fingerprint.of_split(hashed, "photographs")


@dataclasses.dataclass(frozen=True, eq=False)
class Repeated:
    """A source again and again: each example as often as any other.

    Epochs leave out what does not fill a batch. Of so many repetitions that the batch
    divides them nothing is left over.

    >>> found = Repeated.filling("abcdef", 4)
    >>> len(found), found[7]
    (12, 'b')

    Attributes:
      source: examples.
      times: number of repetitions.
    """

    source: Source
    times: int

    @classmethod
    def filling(cls, source: Source, batch: int) -> "Repeated":
        """Returns the least repetition of a source that fills whole batches."""
        return cls(source, int(np.lcm(len(source), batch)) // len(source))

    def __len__(self) -> int:
        return len(self.source) * self.times

    def __getitem__(self, index: int) -> Any:
        return self.source[index % len(self.source)]


def read(folder: Path, size: int, seed: int = 0) -> Photographs:
    """Reads the images of a folder, sorted by name, as squares.

    Each is turned as its EXIF tag says, its shorter side becomes `size` pixels, and a
    square is cut out of it at random: once, from the seed and the photograph's place,
    as in diffusers' DreamBooth script. Files that are no images are counted.

    Raises:
      FileNotFoundError: there is no folder, or no image in it.
      CorruptImageError: an image cannot be decoded; names it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} with photographs.")
    left_out: Counter[str] = Counter()
    paths = []
    for path in sorted(folder.iterdir()):
        if kind := class_folders.no_image(path):
            left_out[kind] += 1
        else:
            paths.append(path)
    if not paths:
        said = class_folders.kinds(left_out)
        raise FileNotFoundError(
            f"{folder} has no photographs ({', '.join(class_folders.SUFFIXES)})"
            + (f"; left out {said}." if said else ".")
        )
    source = Files(paths, np.zeros(len(paths), np.int32))
    squares, centres = [], []
    for index in range(len(paths)):
        image = source[index]["image"]
        squares.append(square(image, size, np.random.default_rng((seed, index))))
        centres.append(square(image, size))
    said = class_folders.kinds(left_out)
    notes = (f"{folder}: left out {said}",) * bool(said)
    names = tuple(path.name for path in paths)
    return Photographs(np.stack(squares), np.stack(centres), names, notes)


def square(
    image: UInt8[np.ndarray, "H W C"],
    size: int,
    rng: np.random.Generator | None = None,
) -> UInt8[np.ndarray, "size size 3"]:
    """Returns a square of an image, whole along its shorter side.

    The image is resized as torchvision's `Resize(size)` does on a Pillow image:
    bilinear, antialiased, the longer side rounded down.

    >>> wide = np.zeros((4, 8, 1), np.uint8)
    >>> square(wide, 2, np.random.default_rng(0)).shape
    (2, 2, 3)

    Args:
      image: grey or RGB.
      size: side in pixels.
      rng: draws the place of the square; None for the middle.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    sides = int(size * width / short), int(size * height / short)
    pixels = np.repeat(image, 3, 2) if image.shape[2] == 1 else image
    picture = Image.fromarray(pixels).resize(sides, Image.Resampling.BILINEAR)
    spare = [side - size for side in sides]
    if rng is None:
        left, top = (room // 2 for room in spare)
    else:
        left, top = (int(rng.integers(room + 1)) for room in spare)
    return np.asarray(picture)[top : top + size, left : left + size]
