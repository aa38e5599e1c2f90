"""Looks at every example of a task before anything trains on it."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from rich.console import Console
from rich.progress import Progress

from experiments.data.source import CorruptImageError, Rows, Source
from experiments.data.task import Task

SHOWN = 5
THREADS, AT_ONCE = 8, 1024


def checked(task: Task, console: Console, skip_corrupt: bool = False) -> Task:
    """The task, every image of which can be decoded and every label is a class.

    Args:
      console: where progress and what was skipped are shown.
      skip_corrupt: leave images out that cannot be decoded, and say how many.

    Raises:
      ValueError: images that cannot be decoded, labels out of range, or a split without
        examples; names the first few.
    """
    splits = {}
    with Progress(console=console, transient=True) as progress:
        for name in ("train", "validation", "test"):
            source: Source = getattr(task, name)
            bar = progress.add_task(f"checking {task.name}, {name}", total=len(source))
            corrupt, labels = [], np.full(len(source), -1)
            for index, result in enumerate(_results(source)):
                progress.advance(bar)
                if isinstance(result, CorruptImageError):
                    corrupt.append(result)
                else:
                    labels[index] = result
            splits[name] = _kept(task, name, corrupt, labels, console, skip_corrupt)
    missing = sorted(set(range(task.classes)) - set(splits["train"][1].tolist()))
    if missing:
        console.print(
            f"{task.name}: {len(missing)} of {task.classes} classes have no training "
            f"image ({_first(missing)})",
            style="yellow",
        )
    sources = {name: source for name, (source, _) in splits.items()}
    return dataclasses.replace(task, **sources)


def _results(source: Source) -> Iterator[int | CorruptImageError]:
    def look(index: int) -> int | CorruptImageError:
        try:
            return source[index]["label"]
        except CorruptImageError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(source), AT_ONCE):
            yield from pool.map(look, range(start, min(start + AT_ONCE, len(source))))


def _kept(
    task: Task,
    name: str,
    corrupt: list[CorruptImageError],
    labels: np.ndarray,
    console: Console,
    skip_corrupt: bool,
) -> tuple[Source, np.ndarray]:
    source: Source = getattr(task, name)
    if corrupt and not skip_corrupt:
        raise ValueError(
            f"{task.name}, {name}: {len(corrupt)} of {len(source)} images are corrupt "
            f"(--skip_corrupt leaves them out):\n  {_first(corrupt, chr(10) + '  ')}"
        )
    good = labels != -1
    wrong = np.flatnonzero(good & ((labels < 0) | (labels >= task.classes)))
    if len(wrong):
        found = Counter(labels[wrong].tolist())
        raise ValueError(
            f"{task.name}, {name}: {len(wrong)} labels are not in 0 to "
            f"{task.classes - 1}: {_first(sorted(found))}, first at example {wrong[0]}."
        )
    if not good.any():
        raise ValueError(f"{task.name}, {name}: there are no examples.")
    if corrupt:
        console.print(
            f"{task.name}, {name}: {len(corrupt)} corrupt images of {len(source)} left "
            f"out: {_first(corrupt)}",
            style="yellow",
        )
        source = Rows(source, np.flatnonzero(good))
    return source, labels[good]


def _first(items: list, separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(map(str, items[:SHOWN])) + more
