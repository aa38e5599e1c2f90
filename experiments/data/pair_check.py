"""A check of every image and mask of a segmentation task."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from experiments.data import fingerprint, look
from experiments.data.check import SPLITS, tell
from experiments.data.look import Look, first, say
from experiments.data.segmentation_task import SegmentationTask
from experiments.data.source import Source


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is kept of a pair that was decoded.

    Attributes:
      name: name of the pair.
      image: fingerprint of the image alone.
      pair: fingerprint of image and mask.
      empty: True if the mask has no foreground.
    """

    name: str
    image: bytes
    pair: bytes
    empty: bool


def checked(
    task: SegmentationTask,
    console: Console,
    skip_corrupt: bool = False,
) -> SegmentationTask:
    """Decodes every image and every mask of a task and its extra tests.

    Empty masks are counted, and so are images that are in the training or validation
    split and in another one, under whatever names; and names that are in two splits
    with other pixels, as an image has that was compressed again.

    Args:
      console: where progress, the task's notes and what was counted are shown.
      skip_corrupt: leave out pairs that cannot be decoded, or whose sizes do not fit,
        and print how many.

    Returns:
      The task with its fingerprint, without the skipped pairs.

    Raises:
      OSError: files are missing or cannot be read; names the first ones.
      ValueError: images cannot be decoded, sizes do not fit, a split has no pairs, or
        no mask of it has any foreground; names the first ones.
    """
    tell(task, console)
    splits: dict[str, Source] = {name: getattr(task, name) for name in SPLITS}
    if not len(task.train):  # a test alone
        splits = {"test": task.test}
    sources = {**splits, **task.extra_tests}
    looks = look.looks(task.name, sources, _seen, console)
    kept = {}
    for name, own in looks.items():
        where = f"{task.name}, {name}"
        kept[name] = look.kept(where, sources[name], own, console, skip_corrupt)
        _tell_empty(where, own.seen, console)
    _tell_repeated(task.name, looks, console)
    fingerprints = {
        name: fingerprint.of_split([seen.pair for seen in own.seen])
        for name, own in looks.items()
    }
    return dataclasses.replace(
        task,
        **{name: kept[name] for name in splits},
        extra_tests={name: kept[name] for name in task.extra_tests},
        fingerprint=fingerprints,
    )


def require_training(task: SegmentationTask) -> None:
    """Raises a `ValueError` for a task that is a test alone."""
    if not len(task.train):
        raise ValueError(
            f"{task.name} has no training images: it is a test of models that were "
            "trained on another set."
        )


def _seen(index: int, example: Any) -> Seen:
    image, mask = example["image"], example["mask"]
    look.check_pixels(index, image)
    return Seen(
        example["name"],
        fingerprint.of_image(image, 0),
        fingerprint.of_pair(image, mask),
        not mask.any(),
    )


def _tell_empty(where: str, seen: Sequence[Seen], console: Console) -> None:
    empty = [own.name for own in seen if own.empty]
    if len(empty) == len(seen):
        raise ValueError(
            f"{where}: none of {len(seen)} masks has any foreground, pixels above 127; "
            "masks of 0 and 1 have to be stored as 0 and 255."
        )
    if empty:
        say(console, f"{where}: {len(empty)} of {len(seen)} masks are empty "
                     f"({first(empty)})")  # fmt: skip


def _tell_repeated(task: str, looks: dict[str, Look[Seen]], console: Console) -> None:
    """Prints how many images or names are in the training or validation split, too."""
    names = [name for name in ("train", "validation") if name in looks]
    for place, fitted in enumerate(names):
        kind = "training" if fitted == "train" else fitted
        known = {own.image: own.name for own in looks[fitted].seen}
        called = set(known.values())
        for split in (name for name in looks if name not in names[: place + 1]):
            where, seen = f"{task}, {split}", looks[split].seen
            same = [own for own in seen if own.image in known]
            if same:
                shown = [
                    own.name if own.name == known[own.image]
                    else f"{own.name} is {known[own.image]}"
                    for own in same
                ]  # fmt: skip
                said = f"{len(same)} images are in the {kind} split, too"
                say(console, f"{where}: {said} ({first(shown)})")
            # Further sets have names of their own.
            renamed = [
                own.name
                for own in seen
                if split in SPLITS and own.name in called and own.image not in known
            ]
            if renamed:
                said = f"{len(renamed)} names are in the {kind} split, too, with other"
                say(console, f"{where}: {said} pixels ({first(renamed)})")
