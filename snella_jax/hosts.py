"""Arrays and files where there are several processes."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def to_host(value: Any) -> np.ndarray:
    """An array as NumPy's in C order, gathered if it is spread over several processes.

    >>> to_host(np.ones((2, 3)).T).flags.c_contiguous
    True
    """
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value, order="C")


def once(write: Callable[[], None]) -> None:
    """Calls `write` in the first process; the others wait until it has ended.

    Raises:
      RuntimeError: in the others, where it raised in the first; there what it raised.
    """
    error: BaseException | None = None
    if jax.process_index() == 0:
        try:
            write()
        except BaseException as raised:
            error = raised
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if failed and error is None:
            raise RuntimeError("The first process could not write; see its error.")
    if error is not None:
        raise error
