"""Paths that users give: `~`, and what a run folder may be called."""

import os
import re
from pathlib import Path
from typing import Annotated

import jax
from tyro.constructors import PrimitiveConstructorSpec

# Orbax takes these for patterns, separators and URLs, TensorStore wants UTF-8.
UNREADABLE = re.compile(r"[*?\[\\\ud800-\udfff]|:(?=/|$)")
DEEPEST = 400  # bytes; the longest path below a run folder is shorter


def at_home(path: str | Path) -> Path:
    """The path, in the user's home where it begins with `~`.

    >>> at_home("runs/~").as_posix()
    'runs/~'
    """
    return Path(os.path.expanduser(path))


Given = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: at_home(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
"""A path on a command line."""


def check_out(out: Path) -> None:
    """Raises a `ValueError` where a run folder could not be made or filled.

    Nothing is made.
    """
    whole = out.absolute()
    longest = os.pathconf("/", "PC_PATH_MAX") if hasattr(os, "pathconf") else 4096
    try:
        kind = "folder" if not out.exists() or out.is_dir() else "file"
    except OSError as error:  # a name that is too long
        raise ValueError(f"--out {out}: {error.strerror}; choose another.") from error
    if kind == "file":
        raise ValueError(f"--out {out} is a file: expected a folder, or a new name.")
    if len(os.fsencode(whole)) + DEEPEST > longest:
        raise ValueError(
            f"--out {out} is {len(os.fsencode(whole))} bytes long: what lies in it "
            f"would have paths of more than {longest}. Choose a shorter one."
        )
    if jax.process_count() > 1 and is_unreadable(out):
        raise ValueError(
            f"--out {out}: several processes can share no checkpoints below a name "
            "with *, ?, [, a backslash, a colon at its end or bytes that are no UTF-8. "
            "Choose another."
        )


def is_unreadable(path: Path) -> bool:
    """Whether Orbax would write into a folder what it cannot read again."""
    return bool(UNREADABLE.search(path.absolute().as_posix()))
