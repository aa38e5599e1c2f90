"""A check of every example of a task before anything trains on it."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.console import Console

from experiments.data import fingerprint, look
from experiments.data.look import Look, first, say
from experiments.data.source import Source
from experiments.data.task import Task

SPLITS = "train", "validation", "test"
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
    sources: dict[str, Source] = {name: getattr(task, name) for name in SPLITS}
    looks = look.looks(task.name, sources, _seen, console)
    kept = {}
    for name, own in looks.items():
        where = f"{task.name}, {name}"
        kept[name] = look.kept(where, sources[name], own, console, skip_corrupt)
        _check_labels(where, own, task.classes)
    _tell_classes(task, _labels(looks["train"]), console, to_train)
    fingerprints = {
        name: fingerprint.of_split([digest for _, digest in own.seen])
        for name, own in looks.items()
    }
    return dataclasses.replace(task, **kept, fingerprint=fingerprints)


def tell(task: Any, console: Console) -> None:
    """Prints the `notes` of a task."""
    for note in task.notes:
        say(console, note)


def _seen(index: int, example: Any) -> Seen:
    image, label = example["image"], example["label"]
    look.check_pixels(index, image)
    return label, fingerprint.of_image(image, label)


def _labels(own: Look[Seen]) -> Int[np.ndarray, " N"]:
    return np.array([label for label, _ in own.seen], int)


def _check_labels(where: str, own: Look[Seen], classes: int) -> None:
    labels = _labels(own)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        found = Counter(labels[wrong].tolist())
        raise ValueError(
            f"{where}: {len(wrong)} labels are not in 0 to {classes - 1}: "
            f"{first(sorted(found))}, first at example {own.good[wrong[0]]}."
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
            say(console, f"{task.name}: {have} ({first(few)})")
