"""Names of the user's on their way to a terminal, a picture and a table.

A folder or a class may be called `[v2]`, `$5`, `:dog:` or `a|b`, and a file's name need
not be UTF-8: rich, matplotlib and Markdown would each take it for something of theirs.
"""

import io
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn


def console() -> Console:
    """A console that prints text as it is, on a terminal of any encoding.

    What the encoding lacks is printed as an escape: under `LC_ALL=C`, `ü` as `\\xfc`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return Console(markup=False, emoji=False)


def progress(shown_on: Console) -> Progress:
    """A bar that is gone when it is done; its descriptions are no markup."""
    description = TextColumn("{task.description}", markup=False)
    columns = description, BarColumn(), TaskProgressColumn()
    return Progress(*columns, console=shown_on, transient=True)


def shown(name: str) -> str:
    r"""A name as any file can hold it; bytes that are no UTF-8 become escapes.

    >>> shown("caf\udce9")
    'caf\\xe9'
    """
    data = name.encode("utf-8", "surrogateescape")
    return data.decode("utf-8", "backslashreplace")


def drawn(name: str) -> str:
    r"""A name as matplotlib draws it: without formulas.

    >>> print(drawn("$5 to $9"))
    \$5 to \$9
    """
    return shown(name).replace("$", r"\$")


def celled(text: str) -> str:
    r"""Text as a cell of a Markdown table, in one line.

    >>> print(celled("cats|dogs"))
    cats\|dogs
    """
    return " ".join(shown(text).split("\n")).replace("|", r"\|")
