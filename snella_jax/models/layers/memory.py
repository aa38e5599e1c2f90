"""Names of what blocks keep for the backward pass, and which of it is made again.

With "usual" a block keeps what JAX decides. With "lean" it keeps its input and what
took a matmul, by name: the stream behind attention, queries, keys and values, what
attention found, and what the MLP's activation was given. Norms, activations, rotations
and casts are made again. What comes behind it makes some of these again, too:

    >>> kept_names("usual"), kept_names("lean+attention")
    (None, ('outputs', 'stream', 'qkv', 'hidden'))
"""

from snella_jax.ops.names import OUTPUTS

# With `OUTPUTS` the names of what "lean" keeps:
STREAM = "stream"
QKV = "qkv"
ATTENTION = "attention"
HIDDEN = "hidden"
CHOICES = (ATTENTION, QKV, HIDDEN)  # in the order of what a byte less costs


def check_remat(remat: str) -> None:
    """Raises a `ValueError` unless `remat` is "none" or "blocks".

    >>> check_remat("blocks")
    """
    if remat not in ("none", "blocks"):
        raise ValueError(f'remat={remat!r}: expected "none" or "blocks".')


def kept_names(memory: str) -> tuple[str, ...] | None:
    """Returns names of arrays that blocks keep besides their input; None for all.

    Args:
      memory: "usual", or "lean", perhaps followed by names of what is made again:
        "+attention" (costs the product of weights and values), "+qkv" (the three
        projections), "+hidden" (the MLP's first layer).

    Raises:
      ValueError: another string.
    """
    if memory == "usual":
        return None
    lean, *again = str(memory).split("+")  # also where it is no string
    if lean != "lean" or not {*again} <= {*CHOICES} or len({*again}) < len(again):
        raise ValueError(
            f'memory={memory!r}: expected "usual", or "lean" and what is made again '
            f"besides: {', '.join('+' + name for name in CHOICES)}."
        )
    names = OUTPUTS, STREAM, QKV, ATTENTION, HIDDEN
    return tuple(name for name in names if name not in again)
