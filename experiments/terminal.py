"""Output of commands: plain text, progress bars, errors in one line.

A user's folder or class may be called `[v2]` or `:dog:`, which rich would take for
markup.
"""

import contextlib
import io
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn


def console() -> Console:
    """Returns a console that prints text as it is, on a terminal of any encoding.

    A character that the encoding lacks is printed as an escape: under `LC_ALL=C`, `ü`
    becomes `\\xfc`. A notebook gets lines of text, not bars that move.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    terminal = False if "ipykernel" in sys.modules else None
    return Console(
        markup=False, emoji=False, force_jupyter=False, force_terminal=terminal
    )


def progress(shown_on: Console) -> Progress:
    """Returns a progress bar that disappears when done and prints names as they are."""
    description = TextColumn("{task.description}", markup=False)
    columns = description, BarColumn(), TaskProgressColumn()
    return Progress(*columns, console=shown_on, transient=True)


@contextlib.contextmanager
def exit_on_error(program: str) -> Iterator[None]:
    """Turns an error of the user's input into an exit with one line, not a traceback.

    Raises:
      SystemExit: the block raised a `ValueError`, `OSError` or `ModuleNotFoundError`.

    >>> with exit_on_error("python -m experiments.report"):
    ...     raise ValueError("name at least one run folder.")
    Traceback (most recent call last):
    SystemExit: python -m experiments.report: name at least one run folder.
    """
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"{program}: {error}") from error
