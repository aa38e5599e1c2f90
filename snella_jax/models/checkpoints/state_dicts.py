"""Chooses among the sets of weights that a file holds.

PyTorch's training programs keep an average of the weights (EMA) or a teacher's beside
them, each in a dictionary of its own.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from snella_jax.files.errors import CheckpointError

log = logging.getLogger("snella_jax")

# Where the weights themselves are, beside what is derived from them.
USUAL = ("model", "state_dict", "model.state_dict")
DEPTH = 4  # of dictionaries in each other


def chosen(path: Path, saved: Any, weights: str | None) -> dict[str, np.ndarray]:
    """Returns tensors by name, of what a file holds.

    Args:
      path: path of the file, for errors.
      saved: tensors by name, or dictionaries of such and of other things.
      weights: beginning of the names of those that are meant, the dictionary's
        included; None for the only ones, or those of `USUAL` (others are logged).

    Raises:
      CheckpointError: there are none, none of this name, or several others; or one of
        them is no tensor.
    """
    found = dict(_sets(saved))
    if weights is not None:
        return _part(path, saved, weights.rstrip("./"), found)
    name = next(iter(found)) if len(found) == 1 else None
    if len(found) > 1:
        listed = ", ".join(repr(name) for name in found)
        name = next((name for name in USUAL if name in found), None)
        if name is None or "" in found:
            raise CheckpointError(
                path,
                f"it holds several sets of weights, {listed}: say which with weights=",
            )
        log.warning(
            "%s holds several sets of weights, %s: took %r; weights= takes another.",
            path,
            listed,
            name,
        )
    return _checked(path, saved if name is None else found[name])


def _checked(path: Path, saved: Any) -> dict[str, np.ndarray]:
    expected = f"expected tensors by name, by themselves or under {USUAL[:2]}"
    if not isinstance(saved, Mapping) or not saved:
        raise CheckpointError(path, expected)
    other = [
        f"{name!r} is {type(value).__name__}"
        for name, value in saved.items()
        if not (isinstance(name, str) and isinstance(value, np.ndarray))
    ]
    if other:
        raise CheckpointError(path, f"{expected}; {', '.join(other[:5])}")
    return dict(saved)


def _part(
    path: Path, saved: Any, weights: str, found: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns the tensors whose names begin so, or so in one of the sets."""
    every, parts = dict(_tensors(saved)), {}
    for start in (weights, *(f"{name}.{weights}" for name in found)):
        begins = re.compile(rf"{re.escape(start)}[./]")
        part = {begins.sub("", n, 1): t for n, t in every.items() if begins.match(n)}
        if part:
            parts[start] = part
    if weights in parts or len(parts) == 1:
        return parts.get(weights) or next(iter(parts.values()))
    if parts:
        listed = ", ".join(map(repr, parts))
        raise CheckpointError(path, f"weights={weights!r} may be {listed}: say which")
    some = ", ".join(sorted(every)[:5])
    raise CheckpointError(
        path, f"it has no weights={weights!r}: {some} ({len(every)} in all)"
    )


def _sets(saved: Any, depth: int = DEPTH) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the dictionaries with weights of layers in them, by where they are."""
    if not isinstance(saved, Mapping) or not depth:
        return
    items = [(name, value) for name, value in saved.items() if isinstance(name, str)]
    if any(
        isinstance(value, np.ndarray) and name.endswith((".weight", "/kernel"))
        for name, value in items
    ):
        yield "", saved
    for name, value in items:
        for inner, tensors in _sets(value, depth - 1):
            yield (f"{name}.{inner}" if inner else name), tensors


def _tensors(saved: Any, depth: int = DEPTH) -> Iterator[tuple[str, np.ndarray]]:
    """Yields all tensors, by where they are."""
    if not isinstance(saved, Mapping) or not depth:
        return
    for name, value in saved.items():
        if isinstance(name, str) and isinstance(value, np.ndarray):
            yield name, value
        elif isinstance(name, str):
            for inner, tensor in _tensors(value, depth - 1):
                yield f"{name}.{inner}", tensor
