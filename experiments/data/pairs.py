"""Images with their masks, in two folders side by side.

An image and its mask have one name, but for their endings. Lists of names say which of
them make up a split.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from experiments.data import class_folders, lists
from experiments.data.look import first
from experiments.data.source import CorruptImageError, decoding, pixels_of

FOLDERS = (("images", "masks"), ("image", "mask"), ("Original", "Ground Truth"))
THRESHOLD = 127  # of a mask's grey; JPEGs have grey edges
MISSING = 0.1  # share of a list's names that may be missing


class Pair(TypedDict):
    """An image with its mask.

    `image` is uint8 `[H, W, 3]`, `mask` uint8 `[H, W]`, 1 for the foreground and 0 for
    the background.
    """

    image: np.ndarray
    mask: np.ndarray
    name: str


class UnfitMaskError(CorruptImageError):
    """A mask of another size than its image; names both."""

    def __init__(self, image: Path, mask: Path, *sizes: tuple[int, ...]):
        (height, width), (tall, wide) = sizes
        ValueError.__init__(
            self,
            f"{mask} has {wide} x {tall} pixels, its image {image} {width} x {height}",
        )


@dataclasses.dataclass(frozen=True)
class Files:
    """Files of a pair, and the name that they share."""

    name: str
    image: Path
    mask: Path


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Source of pairs; a missing file is an `OSError`, not a corrupt image."""

    files: Sequence[Files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Pair:
        files = self.files[index]
        image, mask = _rgb(files.image, index), _grey(files.mask, index)
        if image.shape[:2] != mask.shape:
            raise UnfitMaskError(files.image, files.mask, image.shape[:2], mask.shape)
        binary = (mask > THRESHOLD).astype(np.uint8)
        return {"image": image, "mask": binary, "name": files.name}


def _pixels(path: Path, index: int) -> UInt8[np.ndarray, "H W C"]:
    with decoding(path.read_bytes(), path, index) as image:
        return pixels_of(image)


def _rgb(path: Path, index: int) -> UInt8[np.ndarray, "H W 3"]:
    pixels = _pixels(path, index)
    return np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels


def _grey(path: Path, index: int) -> UInt8[np.ndarray, "H W"]:
    pixels = _pixels(path, index)
    if pixels.shape[2] == 3:
        return np.asarray(Image.fromarray(pixels).convert("L"))
    return pixels[..., 0]


@dataclasses.dataclass(frozen=True)
class Folder:
    """Pairs in two folders side by side.

    Attributes:
      path: the folder of both.
      pairs: files of every pair by name, sorted.
      alone: files without a partner, by name.
      notes: remarks on what was left out.
    """

    path: Path
    pairs: dict[str, Files]
    alone: dict[str, Path]
    notes: tuple[str, ...]

    def whole(self) -> Pairs:
        """Returns every pair.

        Raises:
          ValueError: an image has no mask, or a mask no image; names the first ones.
        """
        self._check_partners(list(self.alone))
        return Pairs(list(self.pairs.values()))

    def listed(self, path: Path) -> tuple[Pairs, tuple[str, ...]]:
        """Returns the pairs that a list of names has, in its order, and remarks.

        A line is a name with or without its ending, perhaps behind a folder. Files
        that no list has do not matter.

        Raises:
          FileNotFoundError: there is no list, or more than a tenth of its pairs are
            missing.
          ValueError: it is empty or has a name twice, or one of its images has no mask,
            or the other way round; names the first ones.
        """
        names = [self._name(line) for line in _lines(path)]
        doubled = [name for name, count in Counter(names).items() if count > 1]
        if doubled:
            raise ValueError(f"{path} lists {first(doubled)} more than once.")
        self._check_partners([name for name in names if name in self.alone])
        missing = [name for name in names if name not in self.pairs]
        said = (
            f"{path}: {len(missing)} of {len(names)} pairs are missing in {self.path}"
        )
        if len(missing) > MISSING * len(names):
            raise FileNotFoundError(f"{said}: {first(missing)}.")
        found = [self.pairs[name] for name in names if name in self.pairs]
        return Pairs(found), (f"{said}: {first(missing)}",) * bool(missing)

    def _name(self, line: str) -> str:
        """Returns the name that a line means: itself, or without folder and ending."""
        return line if line in self.pairs or line in self.alone else Path(line).stem

    def _check_partners(self, names: Sequence[str]) -> None:
        if names:
            files = first([str(self.alone[name]) for name in names])
            raise ValueError(
                f"{self.path}: no partner of the same name, image or mask, for "
                f"{len(names)} of the files: {files}."
            )


def kinds(path: Path) -> tuple[str, str] | None:
    """Returns the names of a folder's two folders; None where it has none of them."""
    return next((two for two in FOLDERS if all((path / x).is_dir() for x in two)), None)


def read(path: Path) -> Folder:
    """Reads the names of a folder's pairs; opens no image.

    Raises:
      FileNotFoundError: there are no two folders of these names, or no images in them.
      ValueError: two files of a folder have one name; names them.
    """
    two = kinds(path)
    if two is None:
        known = " or ".join(f"{image}/ with {mask}/" for image, mask in FOLDERS)
        raise FileNotFoundError(f"{path} has no images with masks: expected {known}.")
    left_out: Counter[str] = Counter()
    images, masks = (_by_name(path / name, left_out) for name in two)
    both = sorted(images.keys() & masks.keys())
    if not both:
        raise FileNotFoundError(
            f"{path / two[0]} and {path / two[1]} have no two images of one name."
        )
    alone = {**images, **masks}
    pairs = {name: Files(name, images[name], masks[name]) for name in both}
    for name in both:
        del alone[name]
    said = class_folders.kinds(left_out)
    notes = (f"{path}: left out {said}",) * bool(said)
    return Folder(path, pairs, dict(sorted(alone.items())), notes)


def _by_name(folder: Path, left_out: Counter[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if kind := class_folders.no_image(path):
            left_out[kind] += 1
        elif path.stem in found:
            raise ValueError(
                f"{folder} has {found[path.stem].name} and {path.name}: expected one "
                "file of a name."
            )
        else:
            found[path.stem] = path
    return found


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"The list {path} is missing.")
    found = [line.strip() for line in lists.text(path) if line.strip()]
    if not found:
        raise ValueError(f"{path} is empty.")
    return found
