"""Layers that read the same array sketch it once, with the key of the first of them.

Queries, keys and values read one array, as gates and ups do. With a key each they would
keep three sketches of it. What is shared is found by the identity of the array, which a
layer has to be given as the others were: before it casts it.
"""

import itertools
import weakref
from collections.abc import Hashable

import jax
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, PRNGKeyArray

from snella_jax.ops.sketch import Sketch


class _Reading:
    """A key and what was kept with it, in one trace; holds none of it alive."""

    def __init__(self, key: PRNGKeyArray):
        self.when = _when()
        self.key = weakref.ref(key)
        self.kept: dict[Hashable, weakref.ref] = {}


_era = itertools.count(1)
_now = 0
_readings: dict[int, tuple[weakref.ref, list[_Reading]]] = {}


def new_keys() -> None:
    """Forgets all readings: from here on layers read with other keys."""
    global _now
    _now = next(_era)


def kept_once(
    sketch: Sketch, key: PRNGKeyArray, read: Array, x: Array, axis: int
) -> tuple[PRNGKeyArray, Array]:
    """Returns the key for a layer's input, and what it keeps of that: `sketch.kept`.

    Those of the layer that read the same array first, in this trace and since
    `new_keys`; where there is none, its own.

    Args:
      sketch: the layer's.
      key: the layer's.
      read: the array that it was given.
      x: `read` in the dtype that it computes in.
      axis: axis of the rows.

    >>> import jax.numpy as jnp
    >>> sketch, x = Sketch(4), jnp.ones((9, 2))
    >>> query, value = jax.random.split(jax.random.key(0))
    >>> _, rows = kept_once(sketch, query, x, x, 0)
    >>> key, again = kept_once(sketch, value, x, x, 0)
    >>> key is query, again is rows, rows.shape
    (True, True, (3, 2))
    """
    reading = _reading(read, key)
    first = reading.key()
    key = key if first is None else first
    name = sketch, x.dtype, axis
    kept = reading.kept[name]() if name in reading.kept else None
    if kept is None:
        kept = sketch.kept(key, jax.lax.stop_gradient(x), axis)
        reading.kept[name] = weakref.ref(kept)
    return key, kept


def _reading(array: Array, key: PRNGKeyArray) -> _Reading:
    """Finds the reading of an array, or notes a new one with this key."""
    own = id(array)
    known, readings = _readings.get(own, (None, []))
    if known is None or known() is not array:  # another one was there before
        known, readings = weakref.ref(array, lambda _: _readings.pop(own, None)), []
        _readings[own] = known, readings
    readings[:] = [one for one in readings if one.key() is not None]
    now = _when()
    for one in readings:
        if one.when == now:
            return one
    readings.append(_Reading(key))
    return readings[-1]


def _when() -> tuple:
    """Says in which trace this is, and since which `new_keys`."""
    return _now, get_opaque_trace_state(convention="nnx")
