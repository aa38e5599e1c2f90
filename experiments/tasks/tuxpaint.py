"""TuxPaint-10: 295 cut-out pictures of ten kinds of things, with masks.

PNGs with an alpha channel from the Debian package `tuxpaint-stamps-default`
(`apt-get install tuxpaint-stamps-default`, 161 MB; GPL-2). The alpha channel is the
foreground's mask; the image is laid on white.
"""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image

from experiments.data.source import Example, Rows, decoding
from experiments.data.task import Task

DEBIAN = Path("/usr/share/tuxpaint/stamps")
FOLDERS = {
    "bird": "animals/birds",
    "fish": "animals/fish",
    "insect": "animals/insects",
    "mammal": "animals/mammals",
    "fruit": "food/fruit",
    "vegetable": "food/vegetables",
    "flower": "plants/flowers",
    "money": "symbols/money",
    "house": "town/houses",
    "monument": "town/monuments",
}
COUNT = 295
SHA256 = "c27fc3f8684284241576b5111df52be54768cab30a2213193972d8444e64d4c6"
SHARES = (0.5, 0.15)  # of each class to train and to validate on; the rest is for tests


@dataclasses.dataclass(frozen=True, eq=False)
class Stamps:
    """The pictures as RGB on white, with their masks."""

    paths: tuple[Path, ...]
    labels: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        picture = self.cut_out(index)
        white = Image.new("RGBA", picture.size, "white")
        pixels = np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
        mask = np.asarray(picture.getchannel("A"))
        return {"image": pixels, "label": int(self.labels[index]), "mask": mask}

    def cut_out(self, index: int) -> Image.Image:
        """Returns a picture with its transparency, RGBA."""
        path = self.paths[index]
        with decoding(path.read_bytes(), path, index) as image:
            return image.convert("RGBA")


def load(folder: Path = DEBIAN, split_seed: int = 0) -> Task:
    """Loads the task: half of every class to train, 15% to validate, the rest to test.

    Raises:
      FileNotFoundError: the package is not installed; says how.
      ValueError: the files are not those of the package's version 2022.06.04.
    """
    source = stamps(folder)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    rng = np.random.default_rng(split_seed)
    for label in range(len(FOLDERS)):
        own = rng.permutation(np.flatnonzero(source.labels == label))
        cuts = np.cumsum([round(share * len(own)) for share in SHARES])
        for part, rows in zip(parts, np.split(own, cuts), strict=True):
            part.extend(rows)
    splits = (Rows(source, np.asarray(part)) for part in parts)
    return Task("TuxPaint-10", len(FOLDERS), *splits, names=tuple(FOLDERS))


def stamps(folder: Path = DEBIAN) -> Stamps:
    """Returns every picture, by class and name; errors are those of `load`."""
    found = _found(folder)
    if not found:
        raise FileNotFoundError(
            f"There are no stamps in {folder}: apt-get install tuxpaint-stamps-default "
            f"puts them in {DEBIAN}."
        )
    if digest(folder) != SHA256:
        raise ValueError(
            f"The {len(found)} stamps in {folder} are not the {COUNT} of "
            "tuxpaint-stamps-default 2022.06.04."
        )
    paths, labels = zip(*found, strict=True)
    return Stamps(paths, np.asarray(labels, np.int32))


def digest(folder: Path) -> str:
    """Returns the SHA-256 of the names and bytes of the pictures."""
    hashed = hashlib.sha256()
    for path, _ in _found(folder):
        hashed.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return hashed.hexdigest()


def _found(folder: Path) -> list[tuple[Path, int]]:
    return [
        (path, label)
        for label, part in enumerate(FOLDERS.values())
        for path in sorted((folder / part).rglob("*.png"))
    ]
