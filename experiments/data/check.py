"""A check of every example of a task before anything trains on it."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from rich.console import Console

from experiments import terminal
from experiments.data import fingerprint
from experiments.data.source import CorruptImageError, Source, take
from experiments.data.task import Task
from experiments.paths import printable

SHOWN, MISSING_SHOWN = 5, 50
SPLITS = "train", "validation", "test"
THREADS, AT_ONCE = 8, 1024
Seen = tuple[int, bytes]  # label and fingerprint of an example


def checked(
    task: Task, console: Console, skip_corrupt: bool = False, to_train: bool = False
) -> Task:
    """Decodes every image of a task and checks every label.

    Args:
      console: where progress, the task's notes and skipped images are shown.
      skip_corrupt: leave out images that cannot be decoded, and print how many.
      to_train: refuse training images of a single class, which teach nothing.

    Returns:
      The task with its fingerprint, without the skipped images.

    Raises:
      OSError: files are missing or cannot be read; names the first ones.
      ValueError: images cannot be decoded, labels are out of range, a split has no
        examples, or there is a single class; names the first ones.
    """
    tell(task, console)
    looked = {}
    with terminal.progress(console) as progress:
        for name in SPLITS:
            source: Source = getattr(task, name)
            bar = progress.add_task(f"checking {task.name}, {name}", total=len(source))
            looked[name] = _looked(source, lambda bar=bar: progress.advance(bar))
    _check_read(task, [error for look in looked.values() for error in look.unread])
    splits = {
        name: _kept(task, name, look, console, skip_corrupt)
        for name, look in looked.items()
    }
    _tell_classes(task, splits["train"][1], console, to_train)
    sources = {name: source for name, (source, _) in splits.items()}
    fingerprints = {n: fingerprint.of_split(look.digests) for n, look in looked.items()}
    return dataclasses.replace(task, **sources, fingerprint=fingerprints)


def tell(task: Task, console: Console) -> None:
    """Prints the notes of a task."""
    for note in task.notes:
        _say(console, note)


def _say(console: Console, text: str) -> None:
    console.print(
        printable(text), style="yellow", markup=False, emoji=False, soft_wrap=True
    )


@dataclasses.dataclass(frozen=True)
class _Look:
    """Result of decoding every example of a source.

    Attributes:
      good: indices of the examples that could be decoded.
      labels, digests: labels and fingerprints of the good examples.
    """

    unread: list[OSError]
    corrupt: list[CorruptImageError]
    good: np.ndarray
    labels: np.ndarray
    digests: list[bytes]


def _looked(source: Source, advance: Callable[[], None]) -> _Look:
    unread, corrupt, good, labels, digests = [], [], [], [], []
    for index, result in enumerate(_results(source)):
        advance()
        match result:
            case OSError():
                unread.append(result)
            case CorruptImageError():
                corrupt.append(result)
            case label, digest:
                good.append(index)
                labels.append(label)
                digests.append(digest)
    return _Look(unread, corrupt, np.array(good, int), np.array(labels, int), digests)


def _check_read(task: Task, errors: list[OSError]) -> None:
    if errors:
        files = _first(errors, "\n  ", MISSING_SHOWN)
        raise type(errors[0])(
            f"{task.name}: {len(errors)} files cannot be read:\n  {files}"
        )


def _tell_classes(
    task: Task, labels: np.ndarray, console: Console, to_train: bool
) -> None:
    """Prints which classes have no training image or one; errors as `checked`."""
    counts = np.bincount(labels, minlength=task.classes)
    names = task.names or range(task.classes)
    if to_train and np.count_nonzero(counts) < 2:
        raise ValueError(
            f"{task.name}, train: all {len(labels)} images are of one class "
            f"({names[int(counts.argmax())]}), expected two classes or more."
        )
    for count, text in ((0, "no training image"), (1, "one training image")):
        few = [names[label] for label in np.flatnonzero(counts == count)]
        if few:
            have = f"{len(few)} of {task.classes} classes have {text}"
            _say(console, f"{task.name}: {have} ({_first(few)})")


def _results(source: Source) -> Iterator[Seen | OSError | CorruptImageError]:
    def look(index: int) -> Seen | OSError | CorruptImageError:
        try:
            example = source[index]
        except (OSError, CorruptImageError) as error:
            return error
        image = example["image"]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            shape = f"{image.dtype} {list(image.shape)}"
            return CorruptImageError("decoded", index, f"{shape}, not [H, W, 1 or 3]")
        return example["label"], fingerprint.of_image(image, example["label"])

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(source), AT_ONCE):
            yield from pool.map(look, range(start, min(start + AT_ONCE, len(source))))


def _kept(
    task: Task,
    name: str,
    looked: _Look,
    console: Console,
    skip_corrupt: bool,
) -> tuple[Source, np.ndarray]:
    source: Source = getattr(task, name)
    corrupt, good, labels = looked.corrupt, looked.good, looked.labels
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
        _say(
            console,
            f"{task.name}, {name}: {len(corrupt)} corrupt images of {len(source)} left "
            f"out: {_first(corrupt)}",
        )
        source = take(source, good)
    return source, labels


def _first(items: list, separator: str = ", ", shown: int = SHOWN) -> str:
    more = f"{separator}and {len(items) - shown} more" if len(items) > shown else ""
    return separator.join(map(str, items[:shown])) + more
