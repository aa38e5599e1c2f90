"""Files with labels in three splits, as a layout on disk lists them."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

Listed = list[tuple[Path, int]]


@dataclasses.dataclass(frozen=True)
class Found:
    """Files and labels of three splits.

    Attributes:
      validation: empty if the layout has no validation split.
      names: names of the classes; empty if the layout has none.
      notes: notes for the user, such as how many files were left out.
    """

    train: Listed
    validation: Listed
    test: Listed
    names: Sequence[str] = ()
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """Number of classes: that of the names, else the largest label plus one."""
        every = (*self.train, *self.validation, *self.test)
        return len(self.names) or 1 + max((label for _, label in every), default=-1)


def checked(where: Path, found: Found) -> Found:
    """Returns the same splits, with a note if a file has more than one label.

    Raises:
      ValueError: a file is in two splits, under one path or several.
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
    """Yields the real path of each file: links are followed, spellings unified."""
    folders: dict[Path, str] = {}
    for path in paths:
        if path.is_symlink():
            yield os.path.realpath(path)
            continue
        if path.parent not in folders:
            folders[path.parent] = os.path.realpath(path.parent)
        yield os.path.join(folders[path.parent], path.name)
