"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 + 10,000 grey 28 x 28 images.

The task follows VTAB-1k's protocol: 800 + 200 of the training images, drawn once, and
the whole test split.

It is read from the gzipped IDX files that the Debian package `dataset-fashion-mnist`
installs (`apt-get install dataset-fashion-mnist`); the upstream files have the same
names.
"""

import gzip
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from experiments.data.source import Arrays, pin, split
from experiments.data.task import Task

NAME = "Fashion-MNIST, 1k"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10
NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SHA256 = {
    "train": "c7d8cfe8172756709eda8bbe8b201cb44f70785b4cd9974a82408b36cc1f72e4",
    "test": "2589de149ea70a51076dfb7116c581fbd9b4c7b39b8e9c9f19ec089d65d659b8",
}
TRAIN, VALIDATION = 800, 200


def load(folder: Path = DEBIAN, split_seed: int = 0) -> Task:
    """Loads the task.

    Raises:
      FileNotFoundError, ValueError: as `read`, or the files are not Fashion-MNIST's.
    """
    sources = {}
    for part, sha256 in SHA256.items():
        images, labels = read(part, folder)
        pin(f"{NAME}, {part}", sha256, images, labels)
        sources[part] = Arrays(images, labels)
    train, validation, _ = split(sources["train"], split_seed, TRAIN, VALIDATION)
    return Task(NAME, CLASSES, train, validation, sources["test"], NAMES)


def read(
    part: str, folder: Path = DEBIAN
) -> tuple[UInt8[np.ndarray, "N 28 28 1"], Int[np.ndarray, " N"]]:
    """Reads images (0 to 255) and labels (0 to 9) of `part`: "train" or "test".

    Raises:
      FileNotFoundError: a file is missing; the message says how to get it.
      ValueError: a file is not the IDX file its name says, or `part` is unknown.
    """
    prefixes = {"train": "train", "test": "t10k"}
    if part not in prefixes:
        raise ValueError(f"part={part!r}: Fashion-MNIST has {', '.join(prefixes)}.")
    images = _idx(folder / f"{prefixes[part]}-images-idx3-ubyte.gz", axes=3)
    labels = _idx(folder / f"{prefixes[part]}-labels-idx1-ubyte.gz", axes=1)
    return images[..., None], labels.astype(np.int32)


def _idx(path: Path, axes: int) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: apt-get install dataset-fashion-mnist puts it in "
            f"{DEBIAN}."
        )
    data = gzip.decompress(path.read_bytes())
    # IDX header: two zero bytes, type 0x08 (uint8), the number of axes, big-endian
    # sizes.
    if data[:4] != bytes((0, 0, 8, axes)):
        raise ValueError(f"{path} is not an IDX file of bytes with {axes} axes.")
    shape = np.frombuffer(data, ">u4", axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
