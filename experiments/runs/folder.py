"""A run folder: held by one run at a time, every file in it whole or not there.

`config.json` says what runs, `environment.json` on what, `results.json` which methods
are finished, `summary.json` that all are. Of several processes the first one writes.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import flax
import jax
from jax.sharding import Mesh
from rich.console import Console

import snella_jax as snella
from experiments import hardware
from experiments.files import is_primary, read, write
from experiments.training import sharding

LOCK = ".lock"


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
        "device": hardware.describe(f"{sharding.describe(mesh)}{processes}"),
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
    """Returns True if a folder has files; hidden ones (locks) do not count."""
    found = out.iterdir() if out.exists() else ()
    return any(not path.name.startswith(".") for path in found)
