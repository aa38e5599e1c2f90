"""Cells of a table that takes long: each has a search and several seeds, done once.

`results.json` keeps what is done of each cell, by task and row: the same command goes
on where it was, on another machine, too, with only that file. Several processes may
work in one folder. Under `runs` beside it lies what is not finished.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
from rich.console import Console

from experiments import folder
from experiments.run import RunFailed

FILE = "results.json"
AGAIN = "The same command goes on with it."
Done = dict[str, Any]


class Store:
    """`results.json`: what all cells share, and what is done of them.

    What is done has `trials` (of the search), `chosen` (the settings that were best)
    and `seeds` (for each what training left).
    """

    def __init__(self, out: Path, shared: dict[str, Any], defaults: dict[str, Any]):
        """Opens a folder, or begins one.

        Args:
          out: the folder.
          shared: what all cells share.
          defaults: of settings that a file made before there were any may lack.

        Raises:
          ValueError: the folder was made with something else.
        """
        self.path = out / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        shared, defaults = json.loads(json.dumps([shared, defaults]))
        with self._open() as found:
            known = found.get("shared")
            if known is None and (out / "runs").exists():
                raise ValueError(
                    f"{out} has runs and no {FILE}: expected both, or another --out."
                )
            filled = {n: _filled(v, defaults.get(n)) for n, v in (known or {}).items()}
            if other := [n for n in sorted(filled) if filled[n] != shared.get(n)]:
                raise ValueError(
                    f"{self.path} was made with another {', '.join(other)}: expected "
                    "the same, or another --out."
                )
            found["shared"] = shared  # perhaps with a method that is new
            found.setdefault("rows", {})

    @property
    def shared(self) -> dict[str, Any]:
        """What all cells share."""
        return folder.read(self.path)["shared"]

    def rows(self, task: str) -> dict[str, Done]:
        """What is done of a task, by row."""
        return self.tasks().get(task, {})

    def tasks(self) -> dict[str, dict[str, Done]]:
        """What is done, by task and row."""
        return folder.read(self.path)["rows"]

    def keep(self, task: str, row: str, done: Done) -> None:
        """Writes a cell."""
        with self._open() as found:
            found["rows"].setdefault(task, {})[row] = done

    @contextlib.contextmanager
    def _open(self) -> Iterator[dict[str, Any]]:
        """The file's values, to change; other processes wait."""
        with self.locked():
            found = folder.read(self.path) or {}
            yield found
            folder.write(self.path, found)

    def locked(self) -> filelock.BaseFileLock:
        """Keeps other processes from the folder's files."""
        return filelock.FileLock(self.path.with_suffix(".lock"))


def _filled(settings: Any, defaults: Any) -> Any:
    """Settings of a method, with what they lack."""
    both = isinstance(settings, dict) and isinstance(defaults, dict)
    return {**defaults, **settings} if both else settings


def attempt(
    program: str,
    store: Store,
    cell: tuple[str, str],
    seeds: Sequence[int],
    search: Callable[[Path], Done],
    train: Callable[[Path, int, Done], Done],
    console: Console,
) -> str | None:
    """Completes a cell; says what failed, if other cells may still succeed.

    Args:
      program: as error messages call it.
      cell: task and row.
      search: `trials` and `chosen` of a folder.
      train: of a seed's folder, the seed and what was chosen.

    Raises:
      SystemExit: it was interrupted, or something is wrong that others would meet, too.
    """
    name = ", ".join(cell)
    try:
        _complete(store, cell, seeds, search, train, console)
    except filelock.Timeout:
        console.print(f"{name}: another process is at it.")
    except (RunFailed, RuntimeError, FloatingPointError) as error:
        text = f"{name}: {error}"
        console.print(text, style="red", soft_wrap=True)
        return text
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"{program}: {name}: {error}\n{AGAIN}") from error
    except KeyboardInterrupt:
        raise SystemExit(AGAIN) from None
    return None


def _complete(
    store: Store,
    cell: tuple[str, str],
    seeds: Sequence[int],
    search: Callable[[Path], Done],
    train: Callable[[Path, int, Done], Done],
    console: Console,
) -> None:
    """Does what is left; a `filelock.Timeout` where another process does."""
    task, row = cell
    place = store.path.parent / "runs" / task / row
    place.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(place / ".cell", timeout=0):
        done = store.rows(task).get(row, {})
        left = [s for s in seeds if str(s) not in done.get("seeds", {})]
        if left and "chosen" not in done:
            done |= search(place)
            store.keep(task, row, done)
        for seed in left:
            console.rule(f"{task}, {row}, seed {seed}")
            out = place / f"seed{seed}"
            result = train(out, seed, done["chosen"])
            done.setdefault("seeds", {})[str(seed)] = result
            store.keep(task, row, done)
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
