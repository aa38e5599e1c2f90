"""Sources: examples by index, as Grain reads them, and sources made of others."""

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
from jaxtyping import Int, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError


class Example(TypedDict):
    """An image of 0 to 255 with its label, and a mask if the data set has one.

    `image` is uint8 `[H, W, 1 or 3]`, `label` an int from 0, `mask` uint8 `[H, W]`
    from 0 for background to 255 for foreground.
    """

    image: np.ndarray
    label: int
    mask: NotRequired[np.ndarray]


class Source(Protocol):
    """Examples by index: the same one each time, from any thread or process.

    An example is a dict, for classification an `Example`.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class CorruptImageError(ValueError):
    """An image that cannot be decoded; names it and its index in the source."""

    def __init__(self, name: str | Path, index: int, reason: object):
        super().__init__(f"image {index} ({name}) cannot be decoded: {reason}")

    def __reduce__(self):  # worker processes send it home
        return _with_message, (type(self), str(self))


def _with_message(kind: type[CorruptImageError], message: str) -> CorruptImageError:
    error = kind.__new__(kind)
    ValueError.__init__(error, message)
    return error


@contextlib.contextmanager
def decoding(data: bytes, name: str | Path, index: int) -> Iterator[Image.Image]:
    """Opens the image in a file's bytes.

    Raises:
      CorruptImageError: the image cannot be opened, or the block fails to read it.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError as error:
        reason = "no format that Pillow reads" if data else "the file is empty"
        raise CorruptImageError(name, index, reason) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CorruptImageError(name, index, error) from error


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def pixels_of(image: Image.Image) -> UInt8[np.ndarray, "H W C"]:
    """Returns one channel of a grey image, RGB of any other, as viewers show it.

    The image is turned as its EXIF orientation says. Transparency is dropped: the
    colour stored below it shows. Of several pictures (GIF, TIFF) the first is taken.

    Raises:
      ValueError: the image is grey with more than 8 bits, which would be clipped at
        255.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"{image.mode} pixels, expected 8 bits a channel")
    image.load()
    turn = _TURNS.get(_orientation(image))
    if image.mode in ("1", "L"):
        image = image.convert("L")
    else:
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns of the straight way
        image = image.convert("RGB")
    pixels = np.asarray(image if turn is None else image.transpose(turn))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF tag; 1, upright, if it is missing or cannot be read.

    Not `ImageOps.exif_transpose`, which also writes all tags anew and fails where one
    of them is malformed.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError):
        return 1


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """Images of one size in memory."""

    images: UInt8[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": int(self.labels[index])}


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """Image files; a missing one is an `OSError`, not a corrupt image."""

    paths: Sequence[Path]
    labels: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        path = self.paths[index]
        with decoding(path.read_bytes(), path, index) as image:
            pixels = pixels_of(image)
        return {"image": pixels, "label": int(self.labels[index])}


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Some examples of a source, in the order of `rows`."""

    source: Source
    rows: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.rows[index])]


@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """One source after the other."""

    first: Source
    second: Source

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> Example:
        if index < len(self.first):
            return self.first[index]
        return self.second[index - len(self.first)]


def pin(name: str, sha256: str, *arrays: np.ndarray) -> None:
    """Raises a `ValueError` if data are not those that our tables were made with.

    Args:
      sha256: expected hash of the arrays' bytes, one after the other.
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    if digest.hexdigest() != sha256:
        raise ValueError(
            f"{name}: the data differ from those of our tables (SHA-256 "
            f"{digest.hexdigest()}, expected {sha256})."
        )


def split(source: Source, seed: int, *sizes: int) -> list[Arrays | Rows]:
    """Splits shuffled examples into disjoint parts of these sizes and a rest.

    Raises:
      ValueError: the sizes add up to more than there are examples.
    """
    if sum(sizes) > len(source):
        raise ValueError(f"{sum(sizes)} examples are wanted, there are {len(source)}.")
    order = np.random.default_rng(seed).permutation(len(source))
    return [take(source, rows) for rows in np.split(order, np.cumsum(sizes))]


def few(source: Source, count: int, seed: int = 0) -> "Arrays | Rows":
    """Returns at most so many examples of each class, drawn once, in their order.

    Fewer of them are among more of the same seed.

    >>> whole = Arrays(np.zeros((6, 1, 1, 1), np.uint8), np.array([0, 1, 0, 1, 1, 1]))
    >>> few(whole, 2).labels.tolist().count(1)
    2
    """
    labels = labels_of(source)
    order = np.random.default_rng(seed).permutation(len(labels))
    rows = [order[labels[order] == label][:count] for label in np.unique(labels)]
    return take(source, np.sort(np.concatenate(rows)))


def labels_of(source: Source) -> Int[np.ndarray, " N"]:
    """Returns the label of every example; of files without decoding them."""
    match source:
        case Arrays() | Files():
            return np.asarray(source.labels)
        case Rows():
            return labels_of(source.source)[source.rows]
        case Joined():
            return np.concatenate([labels_of(source.first), labels_of(source.second)])
    return np.array([source[index]["label"] for index in range(len(source))], int)


def take(source: Source, rows: Int[np.ndarray, " N"]) -> "Arrays | Rows":
    """Returns some examples of a source; those of arrays are copied for workers."""
    if isinstance(source, Arrays):
        return Arrays(source.images[rows], source.labels[rows])
    return Rows(source, rows)
