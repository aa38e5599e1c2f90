"""Paths of weights in models and trees of parameters, and regexes for them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax


def chosen(paths: Iterable[str], targets: str) -> list[str]:
    """Returns the paths that the regex matches in full.

    Raises:
      ValueError: there is none; the message lists them all.
    """
    paths = list(paths)
    found = [path for path in paths if re.fullmatch(targets, path)]
    if not found:
        raise ValueError(
            f"targets={targets!r} matches no layer that can be adapted (a regex has to "
            f"match a whole path, as r'.*/fc' does). There are: {listed(paths)}"
        )
    return found


def check_trainable(trainable: str, kernels: Iterable[str]) -> None:
    """Raises a `ValueError` if an adapted kernel would train itself, too."""
    both = [name for name in kernels if matches_or_holds(trainable, name)]
    if both:
        raise ValueError(
            f"trainable={trainable!r} matches adapted weights: {listed(both)}\n"
            "A weight trains or has an adapter: take them out of one of the two."
        )


def matches_or_holds(regex: str, path: str) -> bool:
    """Returns True if the regex matches the path, or a module above it, in full."""
    names = path.split("/")
    parents = ("/".join(names[: i + 1]) for i in range(len(names)))
    return bool(regex) and any(re.fullmatch(regex, parent) for parent in parents)


def renamed(path: str, names: Mapping[str, str]) -> tuple[str, str] | None:
    """Returns the first regex that matches a path in full, and the name it gives.

    Args:
      path: a path.
      names: name by regex, which may take its groups.

    Raises:
      ValueError: a regex does not compile, or its name takes a group that it has not.

    >>> renamed("blocks/3/fc", {r"blocks/(\\d+)/fc": r"layers.\\1.fc"})[1]
    'layers.3.fc'
    """
    for regex, name in names.items():
        try:
            if match := re.fullmatch(regex, path):
                return regex, match.expand(name)
        except (re.error, IndexError) as error:
            raise ValueError(
                f"The regex {regex!r} with the name {name!r} does not compile: {error}."
            ) from error
    return None


def join(path: Any) -> str:
    """Joins a path as regexes see it."""
    return "/".join(map(str, path))


def listed(paths: Any) -> str:
    """Lists paths for an error message, a line each."""
    return "\n  ".join(["", *paths]) if paths else "none"


def path_of(key_path: tuple) -> tuple[str, ...]:
    """Returns the names along a key path, without the `.value` of an `nnx.Variable`."""
    if key_path and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]
    return names_along(key_path)


def names_along(key_path: tuple) -> tuple[str, ...]:
    """Returns the names along a key path, of JAX's paths in any pytree."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in key_path)
