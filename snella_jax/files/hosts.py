"""Arrays and files of several processes."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def to_host(value: Any) -> np.ndarray:
    """Returns an array as NumPy's in C order, gathered from the processes that have it.

    In the machine's byte order, which JAX and safetensors take for granted.

    >>> found = to_host(np.ones((2, 3), ">f4").T)
    >>> found.flags.c_contiguous, found.dtype.isnative
    (True, True)
    """
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(native(value), order="C")


def native(value: Any) -> Any:
    """Converts an array of NumPy's to the machine's byte order, and nothing else.

    >>> native(np.ones(2, ">f4")).dtype.isnative, native("text")
    (True, 'text')
    """
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        return value.astype(value.dtype.newbyteorder("="))
    return value


Index = tuple[slice, ...]


def parts(value: Any) -> Iterator[tuple[Index, np.ndarray]]:
    """Yields the parts of an array that this process has, and where they lie in it.

    Every number of an array that is spread over several processes comes in one part of
    one of them; of any other array each process gets all.

    >>> [(index, part.tolist()) for index, part in parts(np.arange(3))]
    [((slice(None, None, None),), [0, 1, 2])]
    """
    if not isinstance(value, jax.Array):
        value = native(np.asarray(value))
        yield (slice(None),) * value.ndim, value
        return
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index, np.asarray(shard.data)


def over_processes(value: Any, sums: np.ndarray) -> np.ndarray:
    """Sums, uint64, over all processes what each found in its `parts`."""
    if not isinstance(value, jax.Array) or value.is_fully_addressable:
        return sums
    halves = sums.reshape(-1).view(np.uint32)  # JAX may know no 64 bits
    gathered = multihost_utils.process_allgather(halves, tiled=False)
    each = np.ascontiguousarray(gathered).view(np.uint64)
    return each.sum(0, dtype=np.uint64).reshape(sums.shape)


def once(write: Callable[[], None]) -> None:
    """Calls `write` in the first process; the others wait until it has ended.

    Raises:
      RuntimeError: in the others, if it raised in the first, where its error is raised.
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
