"""Errors about a name that is not known: the nearest ones, and where all are listed."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: str, known: Iterable[str], where: str) -> str:
    """Returns the text of such an error.

    Args:
      kind: what the name would be of.
      name: as it was given.
      known: all names that there are.
      where: a command that lists them.

    >>> print(unknown("task", "cifar10", ["cifar100", "svhn"], "show --list"))
    no task is called 'cifar10'; did you mean cifar100? `show --list` lists all.
    """
    near = difflib.get_close_matches(name, list(known), n=3)
    guess = f"; did you mean {' or '.join(near)}?" if near else ":"
    return f"no {kind} is called {name!r}{guess} `{where}` lists all."
