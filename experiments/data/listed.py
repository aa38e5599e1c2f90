"""What a layout lists: files with labels, in three splits."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

Listed = list[tuple[Path, int]]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a layout lists.

    Attributes:
      validation: empty where the layout has none.
      names: of the classes, where the layout has any.
      notes: what the user should be told, such as how many files were left out.
    """

    train: Listed
    validation: Listed
    test: Listed
    names: Sequence[str] = ()
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """As many as there are names, or as the labels need."""
        every = (*self.train, *self.validation, *self.test)
        return len(self.names) or 1 + max((label for _, label in every), default=-1)


def checked(where: Path, found: Found) -> Found:
    """What was found, with a note where a file has more than one label.

    Raises:
      ValueError: a file is in two splits, whatever paths lead to it.
    """
    seen: dict[str, tuple[int, Path]] = {}
    labels: dict[str, set[int]] = {}
    for index, listed in enumerate((found.train, found.validation, found.test)):
        for file, (path, label) in zip(real(p for p, _ in listed), listed, strict=True):
            first, other = seen.setdefault(file, (index, path))
            if first != index:
                same = "" if other == path else f", which is {other},"
                raise ValueError(f"{where}: {path}{same} is in two splits.")
            labels.setdefault(file, set()).add(label)
    several = [file for file, own in labels.items() if len(own) > 1]
    if not several:
        return found
    note = f"{where}: {len(several)} files have several labels, first {several[0]}"
    return dataclasses.replace(found, notes=(*found.notes, note))


def real(paths: Iterable[Path]) -> Iterator[str]:
    """The files that paths lead to: one for all spellings, links followed."""
    folders: dict[Path, str] = {}
    for path in paths:
        if path.is_symlink():
            yield os.path.realpath(path)
            continue
        if path.parent not in folders:
            folders[path.parent] = os.path.realpath(path.parent)
        yield os.path.join(folders[path.parent], path.name)
