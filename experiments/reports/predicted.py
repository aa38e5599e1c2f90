"""Masks that a run's methods predict, kept in its folder for its figures.

`predictions/METHOD/SET.npz` holds the mask of every image of a set, bool at the image's
own size, by the image's index.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from experiments.files import MismatchError
from snella_jax.files.atomic import whole_file

Masks = Mapping[int, Bool[np.ndarray, "H W"]]


def path(out: Path, method: str, name: str) -> Path:
    """Returns the file of a method's masks of a set, in a run folder."""
    return out / "predictions" / method / f"{name}.npz"


def write(out: Path, method: str, name: str, masks: Masks) -> None:
    """Writes a method's masks of a set, whole or not at all."""
    arrays = {str(index): mask for index, mask in masks.items()}
    with whole_file(path(out, method, name)) as new, new.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]


def read(out: Path, method: str, name: str) -> Masks | None:
    """Returns a method's masks of a set; None where there is no file.

    Raises:
      MismatchError: the file is damaged.
    """
    file = path(out, method, name)
    if not file.exists():
        return None
    try:
        with np.load(file) as arrays:
            return {int(index): arrays[index] for index in arrays}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise MismatchError(f"{file} is damaged: {error}") from error
