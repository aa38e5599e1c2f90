"""Looks at every example of a task before anything trains on it."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from rich.console import Console
from rich.progress import Progress

from experiments.data.source import CorruptImageError, Source, take
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
            corrupt, good, labels = [], [], []
            for index, result in enumerate(_results(source)):
                progress.advance(bar)
                if isinstance(result, CorruptImageError):
                    corrupt.append(result)
                else:
                    good.append(index)
                    labels.append(result)
            looked = corrupt, np.array(good, int), np.array(labels, int)
            splits[name] = _kept(task, name, looked, console, skip_corrupt)
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
            example = source[index]
        except CorruptImageError as error:
            return error
        image = example["image"]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            shape = f"{image.dtype} {list(image.shape)}"
            return CorruptImageError("decoded", index, f"{shape}, not [H, W, 1 or 3]")
        return example["label"]

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(source), AT_ONCE):
            yield from pool.map(look, range(start, min(start + AT_ONCE, len(source))))


def _kept(
    task: Task,
    name: str,
    looked: tuple[list[CorruptImageError], np.ndarray, np.ndarray],
    console: Console,
    skip_corrupt: bool,
) -> tuple[Source, np.ndarray]:
    source: Source = getattr(task, name)
    corrupt, good, labels = looked
    if corrupt and not skip_corrupt:
        raise ValueError(
            f"{task.name}, {name}: {len(corrupt)} of {len(source)} images are corrupt "
            f"(--skip_corrupt leaves them out):\n  {_first(corrupt, chr(10) + '  ')}"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= task.classes))
    if len(wrong):
        found = Counter(labels[wrong].tolist())
        raise ValueError(
            f"{task.name}, {name}: {len(wrong)} labels are not in 0 to "
            f"{task.classes - 1}: {_first(sorted(found))}, first at example "
            f"{good[wrong[0]]}."
        )
    if not len(good):
        raise ValueError(f"{task.name}, {name}: there are no examples.")
    if corrupt:
        console.print(
            f"{task.name}, {name}: {len(corrupt)} corrupt images of {len(source)} left "
            f"out: {_first(corrupt)}",
            style="yellow",
        )
        source = take(source, good)
    return source, labels


def _first(items: list, separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(map(str, items[:SHOWN])) + more
