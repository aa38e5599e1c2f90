"""Names of arrays, by which a recomputed block tells what it keeps."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

KEPT = "snella_jax.kept"  # of what every recomputed block keeps
OUTPUTS = "outputs"  # of products that few layers keep, and of sketches

_remade = ContextVar("remade", default=False)


@contextlib.contextmanager
def remade(cheaply: bool = True) -> Iterator[None]:
    """Says that the layers called inside read what is cheap to make again, or not.

    Of what is, a recomputed block need not keep sketches.
    """
    before = _remade.set(cheaply)
    try:
        yield
    finally:
        _remade.reset(before)


def sketched(rows: Array) -> Array:
    """Names a sketch of an input like other outputs, but for inside `remade`."""
    return rows if _remade.get() else named(rows, OUTPUTS)


def kept(value: Array) -> Array:
    """Marks an array that `rematerialised` keeps: small, and costly to make again."""
    return checkpoint_name(value, KEPT)


def named(value: Array, name: str) -> Array:
    """Names an array that `rematerialised` keeps if it is told so."""
    return checkpoint_name(value, f"snella_jax.{name}")
