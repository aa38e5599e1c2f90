"""JSON, text and arrays in files, each whole or not there; one process writes them."""

import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.paths import printable
from snella_jax.files.atomic import whole_file


class MismatchError(ValueError):
    """Error of a run folder whose content is damaged or belongs to another run."""


def is_primary() -> bool:
    """Returns True in the process that writes files."""
    return jax.process_index() == 0


def write(path: Path, values: Any, indent: int = 2) -> None:
    """Writes JSON; a reader sees the old file or the new one, whole."""
    if is_primary():
        replace(path, json.dumps(values, indent=indent) + "\n")


def replace(path: Path, text: str) -> None:
    """Writes a text file in UTF-8; a reader sees the old file or the new one, whole."""
    with whole_file(path) as new:
        new.write_text(printable(text), "utf-8")


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays, whole or not at all; all processes return once that is done."""
    if is_primary():
        with whole_file(path) as new, new.open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    multihost_utils.sync_global_devices(path.name)


def load(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays that `save` wrote.

    Raises:
      MismatchError: the file is damaged.
    """
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise MismatchError(f"{path} is damaged: {error}") from error


def read(path: Path) -> Any:
    """Reads JSON; returns None if there is no file.

    Raises:
      MismatchError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8")) if path.exists() else None
    except ValueError as error:
        raise MismatchError(f"{path} is damaged, no JSON: {error}") from error
