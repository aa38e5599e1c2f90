"""A run folder: held by one run at a time, every file in it whole or not there.

`config.json` says what runs, `environment.json` on what, `results.json` which methods
are finished, `summary.json` that all are. Of several processes the first one writes.
"""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import flax
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

import snella_jax as snella
from experiments import mesh as meshes
from experiments.showing import shown

LOCK = ".lock"


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


@contextlib.contextmanager
def held(out: Path, resume: bool) -> Iterator[None]:
    """Makes a new folder, or takes up that of an interrupted run.

    Raises:
      SystemExit: there is something in it already, or another process uses it.
    """
    if not is_primary():
        yield
        return
    if not resume and in_use(out):
        raise SystemExit(
            f"{out} is not empty: name another folder with --out, or go on with the "
            f"run in it with --resume {out}."
        )
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / LOCK, timeout=0):
            yield
    except filelock.Timeout:
        raise SystemExit(f"Another process is at work in {out}.") from None


def environment(mesh: Mesh) -> dict[str, Any]:
    """Devices and versions, which a run's numbers depend on."""
    count = jax.process_count()
    processes = f", {count} processes" if count > 1 else ""
    return {
        "device": f"{meshes.describe(mesh)}{processes}, {os.cpu_count()} host cores",
        "versions": {m.__name__: m.__version__ for m in (snella, jax, flax)},
    }


def started(out: Path, mesh: Mesh, console: Console) -> dict[str, Any]:
    """The environment a run began in, and others (`later`) in which it went on."""
    path, now = out / "environment.json", environment(mesh)
    first = read(path)
    if first is None:
        write(path, now)
        return now
    later = first.get("later", [])
    if {**first, "later": []} != {**now, "later": []} and now not in later:
        first["later"] = [*later, now]
        write(path, first)
        console.print(
            f"The run began on {first}; here are {now}: its numbers may differ from "
            "those of a run that was not interrupted.",
            style="yellow",
            soft_wrap=True,
        )
    return first


def in_use(out: Path) -> bool:
    """Whether there is something in a folder that a run would have to respect."""
    found = out.iterdir() if out.exists() else ()
    return any(path.suffix != ".partial" and path.name != LOCK for path in found)
