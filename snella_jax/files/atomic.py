"""Folders and files that are whole or not there, whenever a process dies."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Makes a new folder to write files into, which then takes the place of `folder`.

    Where `folder` is a link, it stays one and what it points at is exchanged. After an
    error everything is as it was. A process that is killed in between the two renames
    of an exchange leaves the old and the new folder, both complete, in a hidden one
    beside it (`leftovers`).

    Raises:
      FileExistsError: `folder` is the current folder or a mounted disk, which cannot be
        exchanged.

    >>> with tempfile.TemporaryDirectory() as here:
    ...     with whole_folder(Path(here, "made")) as new:
    ...         _ = (new / "file").write_text("content")
    ...     Path(here, "made", "file").read_text("utf-8")
    'content'
    """
    folder = folder.resolve()
    check_exchangeable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
    new, old = made / "new", made / "old"
    try:
        new.mkdir()
        yield new
        for path in new.iterdir():
            _to_disk(path)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        if old.exists() and not folder.exists():  # stopped between the two
            os.replace(old, folder)
        shutil.rmtree(made)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Makes a new file to write, which then takes the place of `path`.

    Where that is a link, it stays one and what it points at is replaced.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_prefix(path), dir=path.parent) as made:
        new = Path(made, path.name)
        yield new
        _to_disk(new)
        os.replace(new, path)


def check_exchangeable(folder: Path) -> None:
    """Raises a `FileExistsError` for a folder that no other can take the place of."""
    folder = folder.resolve()
    if folder.exists() and folder.samefile(os.curdir):
        kind = "the current folder"
    elif folder.is_mount():
        kind = "where a disk is mounted"
    else:
        return
    raise FileExistsError(
        f"{folder} is {kind}: a new folder cannot take its place. Name one in it."
    )


def leftovers(folder: Path) -> list[Path]:
    """Lists what `whole_folder` left beside `folder` when its process was killed."""
    folder = folder.resolve()
    name = rf"{re.escape(_prefix(folder))}[a-z0-9_]{{8}}"
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    made = sorted(path for path in beside if re.fullmatch(name, path.name))
    return [path / kind for path in made for kind in ("old", "new")]


def _prefix(path: Path) -> str:
    """Returns the beginning of names beside `path`; short if they would be refused."""
    name = os.fsencode(path.name)
    short = path.name if len(name) < 200 else hashlib.sha256(name).hexdigest()
    return f".{short}."


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
