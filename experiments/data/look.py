"""Decoding of every example of a task, and how what is wrong with it is said."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np
from rich.console import Console

from experiments import terminal
from experiments.data.source import CorruptImageError, Source, take
from experiments.paths import printable

SHOWN, MISSING_SHOWN = 5, 50
THREADS, AT_ONCE = 8, 1024
Seen = TypeVar("Seen")


@dataclasses.dataclass(frozen=True)
class Look(Generic[Seen]):
    """Result of decoding every example of a source.

    Attributes:
      unread: errors of files that are missing or cannot be read.
      corrupt: errors of files that were read and cannot be decoded.
      good: indices of the examples that could be decoded.
      seen: what was found of each of them.
    """

    unread: list[OSError]
    corrupt: list[CorruptImageError]
    good: list[int]
    seen: list[Seen]


def looks(
    name: str,
    sources: Mapping[str, Source],
    see: Callable[[int, Any], Seen],
    console: Console,
) -> dict[str, Look[Seen]]:
    """Decodes every example of some sources.

    Args:
      name: name of the task.
      sources: by the name of the split.
      see: returns what is kept of an example, from its index and the example; raises
        a `CorruptImageError` where it is malformed.
      console: where progress is shown.

    Raises:
      OSError: files are missing or cannot be read; names the first ones.
    """
    found = {}
    with terminal.progress(console) as progress:
        for split, source in sources.items():
            bar = progress.add_task(f"checking {name}, {split}", total=len(source))
            found[split] = _look(source, see, lambda bar=bar: progress.advance(bar))
    unread = [error for look in found.values() for error in look.unread]
    if unread:
        files = first(unread, "\n  ", MISSING_SHOWN)
        raise type(unread[0])(f"{name}: {len(unread)} files cannot be read:\n  {files}")
    return found


def _look(
    source: Source, see: Callable[[int, Any], Seen], advance: Callable[[], None]
) -> Look[Seen]:
    look: Look[Seen] = Look([], [], [], [])
    for index, result in enumerate(_results(source, see)):
        advance()
        match result:
            case OSError():
                look.unread.append(result)
            case CorruptImageError():
                look.corrupt.append(result)
            case _:
                look.good.append(index)
                look.seen.append(result)
    return look


def _results(
    source: Source, see: Callable[[int, Any], Seen]
) -> Iterator[Seen | OSError | CorruptImageError]:
    def result(index: int) -> Seen | OSError | CorruptImageError:
        try:
            return see(index, source[index])
        except (OSError, CorruptImageError) as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(source), AT_ONCE):
            yield from pool.map(result, range(start, min(start + AT_ONCE, len(source))))


def check_pixels(index: int, image: np.ndarray) -> None:
    """Raises a `CorruptImageError` if an image is not uint8 `[H, W, 1 or 3]`."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        shape = f"{image.dtype} {list(image.shape)}"
        raise CorruptImageError("decoded", index, f"{shape}, not [H, W, 1 or 3]")


def kept(
    where: str, source: Source, look: Look, console: Console, skip_corrupt: bool
) -> Source:
    """Returns the examples of a source that could be decoded.

    Args:
      where: task and split, for messages.
      skip_corrupt: leave the others out, and print how many.

    Raises:
      ValueError: some are corrupt and not to be left out, or none is left; names the
        first ones.
    """
    corrupt = look.corrupt
    if corrupt and not skip_corrupt:
        raise ValueError(
            f"{where}: {len(corrupt)} of {len(source)} images are corrupt "
            f"(--skip_corrupt leaves them out):\n  {first(corrupt, chr(10) + '  ')}"
        )
    if not look.good:
        raise ValueError(f"{where}: there are no examples.")
    if not corrupt:
        return source
    say(
        console,
        f"{where}: {len(corrupt)} corrupt images of {len(source)} left out: "
        f"{first(corrupt)}",
    )
    return take(source, np.asarray(look.good))


def say(console: Console, text: str) -> None:
    """Prints a remark on the data."""
    console.print(
        printable(text), style="yellow", markup=False, emoji=False, soft_wrap=True
    )


def first(items: list, separator: str = ", ", shown: int = SHOWN) -> str:
    """Returns the first items as text, and how many more there are.

    >>> first([1, 2, 3], shown=2)
    '1, 2, and 1 more'
    """
    more = f"{separator}and {len(items) - shown} more" if len(items) > shown else ""
    return separator.join(map(str, items[:shown])) + more
