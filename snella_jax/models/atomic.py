"""Folders and files that are whole or not there, whenever a process dies."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write files into; at the end it takes the place of `folder`.

    After an error everything is as it was. A process that is killed in between the two
    renames of an exchange leaves the old and the new folder, both complete, in a hidden
    one beside it (`leftovers`).

    >>> with tempfile.TemporaryDirectory() as here:
    ...     with whole_folder(Path(here, "made")) as new:
    ...         _ = (new / "file").write_text("content")
    ...     Path(here, "made", "file").read_text()
    'content'
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
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
    """A new file to write; at the end it takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as made:
        new = Path(made, path.name)
        yield new
        _to_disk(new)
        os.replace(new, path)


def leftovers(folder: Path) -> list[Path]:
    """What `whole_folder` left beside `folder` when its process was killed."""
    name = rf"\.{re.escape(folder.name)}\.[a-z0-9_]{{8}}"
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    made = sorted(path for path in beside if re.fullmatch(name, path.name))
    return [path / kind for path in made for kind in ("old", "new")]


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
