"""Results of a table that takes long: each cell has a search and several seeds.

`results.json` keeps the finished searches and seeds, by task and row: the same command
goes on with the others, also on another machine with only that file. Several processes
may work in one folder. Unfinished runs lie in `runs` beside it.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
from rich.console import Console

from experiments import files
from experiments.data import fingerprint
from experiments.data.fingerprint import Inputs
from experiments.paths import shortened
from experiments.runs import cells
from experiments.runs.cells import Cell
from experiments.runs.cluster import Work
from experiments.runs.run import RunFailed
from experiments.tasks import catalogue
from experiments.training.stopping import Stopped

FILE = "results.json"
AGAIN = "The same command goes on with it."
SEARCH = "search"
FAILURES = (RunFailed, RuntimeError, FloatingPointError)  # which others may not meet
Done = dict[str, Any]


class Store:
    """`results.json`: the settings that all cells share, and the cells' results.

    A cell has `trials` (of its search; `pooled` those of a search over several tasks),
    `chosen` (the best settings), `seeds` (the result of each) and `failed` (why a seed
    or the search failed).
    """

    def __init__(self, out: Path, shared: dict[str, Any], defaults: dict[str, Any]):
        """Opens a folder, or begins one.

        Args:
          out: the folder.
          shared: settings that all cells share.
          defaults: values of settings that an older file may lack.

        Raises:
          ValueError: the folder was made with other settings.
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
            filled = _filled(known, defaults, shared) if known else {}
            if other := [n for n in sorted(filled) if filled[n] != shared.get(n)]:
                raise ValueError(
                    f"{self.path} was made with another {', '.join(other)}: expected "
                    "the same, or another --out."
                )
            new = {n: v for n, v in shared.items() if n not in filled}
            found["shared"] = {**(known or {}), **new}  # methods that are new
            found.setdefault("rows", {})

    @property
    def shared(self) -> dict[str, Any]:
        """Settings that all cells share."""
        return files.read(self.path)["shared"]

    def rows(self, task: str) -> dict[str, Done]:
        """Returns the cells of a task, by row."""
        return self.tasks().get(task, {})

    def tasks(self) -> dict[str, dict[str, Done]]:
        """Returns all cells, by task and row."""
        return files.read(self.path)["rows"]

    def cell(self, task: str, row: str) -> Cell:
        """Returns a cell as processes share it."""
        return Cell(f"{task}, {row}", place(self.path.parent, task, row))

    def is_finished(self, task: str, row: str, seeds: Sequence[int]) -> bool:
        """Returns True if a cell has all of these seeds."""
        done = self.rows(task).get(row, {}).get("seeds", {})
        return all(str(seed) in done for seed in seeds)

    def failures(self) -> list[str]:
        """Returns which seeds and searches failed at the last attempt, and why."""
        return [
            text
            for task, rows in self.tasks().items()
            for row, done in rows.items()
            for text in _texts((task, row), done.get("failed", {}))
        ]

    def keep(self, task: str, row: str, done: Done) -> None:
        """Writes a cell."""
        with self._open() as found:
            found["rows"].setdefault(task, {})[row] = done

    def begin(self, task: str, inputs: Inputs, console: Console) -> None:
        """Writes the fingerprints of a task's inputs, or compares them.

        Raises:
          MismatchError: the task's cells began with other inputs.
        """
        with self._open() as found:
            known = found.setdefault("inputs", {}).get(task)
            cells = found["rows"].get(task, {}).values()
            began = any(done.get("trials") or done.get("seeds") for done in cells)
            if known is None and began:
                console.print(
                    f"{self.path} does not say on which images {task} was begun: it "
                    "goes on, whether they are these or not.",
                    style="yellow",
                    soft_wrap=True,
                )
            other = known and fingerprint.differences(known, inputs)
            if other:
                raise files.MismatchError(
                    f"{self.path} was begun with others: {'; '.join(other)}. It goes "
                    "on only with what it began with; for these, name another --out."
                )
            if known is None or not known["weights"]:  # those of a random control
                found["inputs"][task] = inputs

    @contextlib.contextmanager
    def _open(self) -> Iterator[dict[str, Any]]:
        """Yields the file's values, to change; other processes wait."""
        with self.locked():
            found = files.read(self.path) or {}
            yield found
            files.write(self.path, found)

    def locked(self) -> filelock.BaseFileLock:
        """Returns a lock that keeps other processes from the folder's files."""
        return filelock.FileLock(self.path.with_suffix(".lock"))


def _filled(known: Done, defaults: Done, shared: Done) -> Done:
    """Returns a file's settings, completed by the defaults that it lacks."""
    plain = {n: v for n, v in defaults.items() if not isinstance(v, dict)}
    filled = {n: v for n, v in plain.items() if n in shared}
    for name, own in known.items():
        default = defaults.get(name)
        if isinstance(own, dict) and isinstance(default, dict):
            own = {**default, **own}
        filled[name] = own
    return filled


@dataclasses.dataclass(frozen=True)
class Part:
    """Work on a cell.

    Attributes:
      name: task and row.
      seeds: seeds that it has when it is finished.
      do: does what is left of it; returns what failed.
    """

    name: tuple[str, str]
    seeds: Sequence[int]
    do: Callable[[], str | None]


def work(
    program: str, words: Sequence[str], store: Store, parts: Mapping[Cell, Part]
) -> Work:
    """Returns the work on a table's cells, in their order, as workers share it."""

    def is_finished(cell: Cell) -> bool:
        return store.is_finished(*parts[cell].name, parts[cell].seeds)

    def tried(cell: Cell) -> str | None:
        return parts[cell].do()

    out = store.path.parent
    return Work(program, words, out, list(parts), is_finished, tried)


def place(out: Path, task: str, row: str) -> Path:
    """Returns the folder of a cell's runs; a task that is a path has a short name.

    >>> place(Path("out"), "digits", "lora").as_posix()
    'out/runs/digits/lora'
    >>> place(Path("out"), "/data/pets.csv", "lora").as_posix()
    'out/runs/pets-2b9c5331/lora'
    """
    if task not in catalogue.ENTRIES:
        whole = task.encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(whole).hexdigest()[:8]
        task = f"{shortened(Path(task).stem, 240)}-{digest}"
    return out / "runs" / task / row


def _texts(cell: tuple[str, str], failed: dict[str, str]) -> list[str]:
    """Returns the failures of a cell's steps as text."""
    return [f"{', '.join((*cell, step))}: {error}" for step, error in failed.items()]


def attempt(
    program: str,
    store: Store,
    cell: tuple[str, str],
    seeds: Sequence[int],
    search: Callable[[Path], Done],
    train: Callable[[Path, int, Done], Done],
    console: Console,
) -> str | None:
    """Completes a cell; returns what failed, if other cells may still succeed.

    No other process may be at it (`runs.cells`). A seed that fails does not stop the
    others: a table of those before it would favour unstable methods.

    Args:
      program: name of the command in error messages.
      cell: task and row.
      search: returns `trials` and `chosen`, given a folder.
      train: returns a seed's result, given its folder, the seed and what was chosen.

    Raises:
      SystemExit: it was interrupted, or an error would stop other cells, too.
    """
    name = ", ".join(cell)
    try:
        failed = _complete(store, cell, seeds, search, train, console)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"{program}: {name}: {error}\n{AGAIN}") from error
    except KeyboardInterrupt:
        raise SystemExit(AGAIN) from None
    except Stopped as stop:
        console.print(f"{stop} {AGAIN}", soft_wrap=True)
        raise
    text = "\n".join(_texts(cell, failed))
    console.print(text, style="red", soft_wrap=True, end="\n" if text else "")
    return text or None


def _complete(
    store: Store,
    cell: tuple[str, str],
    seeds: Sequence[int],
    search: Callable[[Path], Done],
    train: Callable[[Path, int, Done], Done],
    console: Console,
) -> dict[str, str]:
    """Does what is left of a cell, and returns what failed of it."""
    task, row = cell
    where = place(store.path.parent, task, row)
    where.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    done = store.rows(task).get(row, {})
    left = [s for s in seeds if str(s) not in done.get("seeds", {})]
    if left and "chosen" not in done:
        with _kept(store, cell, done, SEARCH, failed):
            done |= search(where)
    for seed in left if "chosen" in done else ():
        console.rule(f"{task}, {row}, seed {seed}")
        out = where / f"seed{seed}"
        with _kept(store, cell, done, f"seed {seed}", failed):
            result = train(out, seed, done["chosen"])
            done.setdefault("seeds", {})[str(seed)] = result
        if f"seed {seed}" not in failed:
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return failed


def awaited(
    store: Store,
    cell: tuple[str, str],
    names: Sequence[str],
    do: Callable[[], str | None],
) -> Any:
    """Returns an entry of a cell; waits for a process that is at work on it.

    If that one dies, this one goes on with the cell.

    Args:
      store: has the cell.
      cell: task and row.
      names: of the entry and those that it is in, the outermost first.
      do: does the cell.

    Raises:
      RuntimeError: it is not there, and no process is at work on it.
    """
    task, row = cell
    shared = store.cell(task, row)

    def entry() -> Any:
        found = store.rows(task).get(row, {})
        for name in names:
            found = found.get(name, {})
        return found or None

    while (found := entry()) is None:
        launch = (shared.note() or {}).get("launch", "")  # this one: it came before
        try:
            cells.attempt(shared, lambda _: do(), launch)
        except cells.Busy:
            time.sleep(cells.PAUSE)
        else:
            if entry() is None:
                raise RuntimeError(f"{task}, {row}: it was not finished")
    return found


@contextlib.contextmanager
def _kept(
    store: Store, cell: tuple[str, str], done: Done, step: str, failed: dict[str, str]
) -> Iterator[None]:
    """Writes a cell after a step, or why the step failed."""
    before = done.pop("failed", {})
    before.pop(step, None)
    try:
        yield
    except FAILURES as error:
        failed[step] = before[step] = str(error)
    if before:
        done["failed"] = before
    store.keep(*cell, done)
