"""Errors about names that are not known: the nearest ones, and where all are listed."""

import difflib
from collections.abc import Collection, Iterable


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


def guessed(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Returns names that are not known, each with the nearest that is.

    >>> guessed(["lora.rnk", "x"], ["lora.rank", "lora.lr"])
    ['lora.rnk (did you mean lora.rank?)', 'x']
    """
    nearest = ((name, difflib.get_close_matches(name, known, n=1)) for name in names)
    return [f"{n} (did you mean {near[0]}?)" if near else n for n, near in nearest]
