"""JSON and arrays in files, whole or not there; the first process writes them."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.showing import shown


class MismatchError(ValueError):
    """What is in a run folder is of another run, or damaged."""


def is_primary() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def write(path: Path, values: Any) -> None:
    """Writes JSON; a reader sees the old file or the new one, whole."""
    if is_primary():
        replace(path, json.dumps(values, indent=2) + "\n")


def replace(path: Path, text: str) -> None:
    """Puts a text file in UTF-8 in the place of another, at once and on the disk."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(shown(text))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays, whole or not at all; all processes return once that is done."""
    if is_primary():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    multihost_utils.sync_global_devices(path.name)


def load(path: Path) -> dict[str, np.ndarray]:
    """What `save` wrote.

    Raises:
      MismatchError: the file is damaged.
    """
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise MismatchError(f"{path} is damaged: {error}") from error


def read(path: Path) -> Any:
    """What JSON there is at a path; None where there is no file.

    Raises:
      MismatchError: it is none.
    """
    try:
        return json.loads(path.read_text("utf-8")) if path.exists() else None
    except ValueError as error:
        raise MismatchError(f"{path} is damaged, no JSON: {error}") from error
