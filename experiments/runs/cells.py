"""Cells: work that several processes share, each cell done by one of them at a time.

A process locks the folder of the cell it is at. The lock of one that died is free: the
next one goes on with the cell, from its last checkpoint. While somebody is at a cell,
and after it failed, `.cell.json` in its folder says so.
"""

import contextlib
import dataclasses
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax
from rich.console import Console

from experiments import files
from experiments.training.stopping import at_once

LOCK, NOTE = ".cell", ".cell.json"
PAUSE = 2.0  # seconds between two looks at cells that others are at
LAUNCH, WORKER = "SNELLA_LAUNCH", "SNELLA_WORKER"  # set for the workers of a cluster
HELD = 9  # exit status of a process that met a lock
SECOND = f"""
import sys, filelock
try:
    filelock.FileLock(sys.argv[1]).acquire(timeout=0)
except filelock.Timeout:
    sys.exit({HELD})
"""


class Busy(Exception):
    """Another process is at a cell."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Work that has a folder of its own.

    Attributes:
      name: names it in messages.
      place: its folder.
    """

    name: str
    place: Path

    def note(self) -> dict[str, Any] | None:
        """Returns who is at it or why it failed; None for neither.

        A process that was killed leaves its note.
        """
        return files.read(self.place / NOTE)


def work(
    out: Path,
    cells: Sequence[Cell],
    tried: Callable[[Cell], str | None],
    console: Console,
) -> list[str]:
    """Does all cells that nobody else does; returns what failed.

    Of the processes that find nothing but cells of others, one waits, in case another
    dies; the rest leave.

    Args:
      out: folder that all cells share.
      cells: in the order in which they are tried.
      tried: does a cell, or what is left of it; returns what failed, if other cells may
        still succeed.
    """
    launch = os.environ.get(LAUNCH) or f"{_worker()} {time.time_ns()}"
    failed, left = [], list(cells)
    with contextlib.ExitStack() as stack:
        stack.enter_context(at_once())
        waits = False
        while left:
            busy = []
            for cell in left:
                try:
                    failed.append(attempt(cell, tried, launch))
                except Busy:
                    if jax.process_count() > 1:  # the others do not know
                        where = f"Another process is at work in {cell.place}."
                        raise SystemExit(where) from None
                    busy.append(cell)
            if busy and not waits:
                names = "; ".join(cell.name for cell in busy)
                console.print(f"Other processes are at {names}.", soft_wrap=True)
            if len(busy) == len(left):
                if not waits and not (waits := _waits(out, stack)):
                    break
                time.sleep(PAUSE)
            left = busy
    return [text for text in failed if text]


def attempt(cell: Cell, tried: Callable[[Cell], str | None], launch: str) -> str | None:
    """Does one cell; returns what failed of it.

    Args:
      launch: text that all processes that began together share: none of them tries
        again what failed for another.

    Raises:
      Busy: another process is at it.
    """
    with _held(cell):
        known = cell.note() or {}
        if known.get("failed") and known["launch"] == launch:
            return known["failed"]
        note = {"worker": _worker(), "pid": os.getpid(), "launch": launch}
        files.write(cell.place / NOTE, note | {"since": time.time()})
        text = None
        try:
            text = tried(cell)
        finally:
            if text:
                files.write(cell.place / NOTE, note | {"failed": text})
            elif files.is_primary():
                (cell.place / NOTE).unlink(missing_ok=True)
        return text


def check_locks(folder: Path) -> None:
    """Raises an `OSError` if a second process gets a lock that this one holds."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".trial"
    try:
        with filelock.FileLock(path):
            command = [sys.executable, "-c", SECOND, str(path)]
            other = subprocess.run(command, capture_output=True, encoding="utf-8")
    except (OSError, NotImplementedError) as error:
        raise OSError(f"{folder} is on a file system without locks: {error}") from error
    if other.returncode != HELD:
        raise OSError(
            f"{folder}: a second process took a lock that the first one held, so two "
            "workers would do the same cell. Expected a file system that locks (a "
            "local disk, NFSv4, Lustre mounted with `flock`; not a bucket): name "
            f"another --out. {other.stderr}".rstrip()
        )


@contextlib.contextmanager
def _held(cell: Cell) -> Iterator[None]:
    if not files.is_primary():
        yield
        return
    cell.place.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(cell.place / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise Busy(cell.name) from None
    try:
        yield
    finally:
        lock.release()


def _waits(out: Path, stack: contextlib.ExitStack) -> bool:
    """Returns True for the process that waits for the others, the first to ask."""
    lock = filelock.FileLock(out / ".waits")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    stack.callback(lock.release)
    return True


def _worker() -> str:
    return os.environ.get(WORKER) or f"{platform.node()}:{os.getpid()}"
