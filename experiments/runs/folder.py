"""A run folder: used by one run at a time, with files that are whole or not there.

`config.json` holds the run's settings, `environment.json` its devices and versions,
`results.json` the finished methods; `summary.json` is there once all are finished. Of
several processes the first one writes.
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


class InUse(SystemExit):
    """Another process uses a run folder."""


@contextlib.contextmanager
def held(out: Path, resume: bool) -> Iterator[None]:
    """Makes a new folder, or opens that of an interrupted run, and locks it.

    Raises:
      SystemExit: a new folder has files already.
      InUse: another process uses it.
    """
    if not is_primary():
        yield
        return
    if not resume:
        check_new(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / LOCK, timeout=0):
            yield
    except filelock.Timeout:
        raise InUse(f"Another process is at work in {out}.") from None


def environment(mesh: Mesh) -> dict[str, Any]:
    """Returns devices and versions, which a run's numbers depend on."""
    count = jax.process_count()
    processes = f", {count} processes" if count > 1 else ""
    return {
        "device": hardware.describe(f"{sharding.describe(mesh)}{processes}"),
        "versions": {m.__name__: m.__version__ for m in (snella, jax, flax)},
    }


def started(out: Path, mesh: Mesh, console: Console) -> dict[str, Any]:
    """Returns the environment a run began in, and writes that in which it goes on.

    Environments other than the first are listed in `later`, and a warning is printed.
    """
    path, now = out / "environment.json", environment(mesh)
    first = read(path)
    if first is not None:
        first["device"] = sharding.named_as_now(first["device"])
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


def check_new(out: Path) -> None:
    """Exits if a folder has files; hidden ones, such as the lock, do not count."""
    found = out.iterdir() if out.exists() else ()
    if any(not path.name.startswith(".") for path in found):
        raise SystemExit(
            f"{out} is not empty: name another folder with --out, or go on with the "
            f"run in it with --resume {out}."
        )
