"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 + 10,000 grey 28 x 28 images.

Read from the gzipped IDX files that the Debian package `dataset-fashion-mnist` installs
(`apt-get install dataset-fashion-mnist`); the upstream files have the same names.
"""

import gzip
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10


def load(
    split: str, folder: Path = DEBIAN
) -> tuple[UInt8[np.ndarray, "N 28 28 1"], Int[np.ndarray, " N"]]:
    """Images (0 to 255) and labels (0 to 9) of `split`: "train" or "test".

    Raises:
      FileNotFoundError: a file is missing; the message says how to get it.
      ValueError: a file is not the IDX file its name says, or `split` is unknown.
    """
    prefixes = {"train": "train", "test": "t10k"}
    if split not in prefixes:
        raise ValueError(f"split={split!r}: Fashion-MNIST has {', '.join(prefixes)}.")
    images = _idx(folder / f"{prefixes[split]}-images-idx3-ubyte.gz", axes=3)
    labels = _idx(folder / f"{prefixes[split]}-labels-idx1-ubyte.gz", axes=1)
    return images[..., None], labels.astype(np.int32)


def _idx(path: Path, axes: int) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing. `apt-get install dataset-fashion-mnist` puts it in "
            f"{DEBIAN}; elsewhere, name the folder with --data_dir."
        )
    data = gzip.decompress(path.read_bytes())
    # IDX header: two zero bytes, type 0x08 (uint8), the number of axes, big-endian
    # sizes.
    if data[:4] != bytes((0, 0, 8, axes)):
        raise ValueError(f"{path} is not an IDX file of bytes with {axes} axes.")
    shape = np.frombuffer(data, ">u4", axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
