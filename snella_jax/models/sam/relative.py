"""Attention over a grid with biases by relative position, decomposed by axis.

The logit of a query at `(y, x)` and a key at `(i, j)` is
`q . k / sqrt(d) + q . rows[y - i + h - 1] + q . columns[x - j + w - 1]`, with a table
for each axis that all heads share (MViTv2, Li et al., arXiv 2112.01526). Axes: `B`
grids, `h`, `w` their sides, `T = h * w` tokens, `H` heads of `d` numbers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from snella_jax.models.layers import attention
from snella_jax.models.layers.attention import Implementation

QUERIES = 512  # at once, where XLA makes their logits


def attend(
    q: Float[Array, "B h w H d"],
    k: Float[Array, "B h w H d"],
    v: Float[Array, "B h w H d"],
    rows: Float[Array, "2*h-1 d"],
    columns: Float[Array, "2*w-1 d"],
    implementation: Implementation = "auto",
) -> Float[Array, "B h w H d"]:
    """Lets the tokens of each grid attend to each other.

    XLA's implementation makes the logits of about 512 queries at a time, and again in
    the backward pass: there is no `T x T` array of a larger grid.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 3, 4, 2, 8))
    >>> attend(q, k, v, jnp.zeros((5, 8)), jnp.zeros((7, 8))).shape
    (2, 3, 4, 2, 8)

    Args:
      q, k, v: queries, keys and values.
      rows, columns: vectors of the offsets of two tokens along each axis.
      implementation: as in `layers.attention.attend`, which does not know of the
        channels that "cudnn" gets for the bias (`extended`).
    """
    biases = by_place(rows), by_place(columns)
    if implementation == "auto":
        width = extended_width(q.shape[-1], q.shape[1:3])
        device = jax.local_devices()[0]
        implementation = attention.best(device, q.dtype, width)
    if implementation == "xla":
        return _in_chunks(q, k, v, *biases)
    scale = 1 / math.sqrt(q.shape[-1])
    longer = extended(q, k, v, *biases)
    y = attention.attend(*longer, implementation, scale=scale)
    return y[..., : q.shape[-1]].reshape(q.shape)


def by_place(table: Float[Array, "2*n-1 d"]) -> Float[Array, "n n d"]:
    """Returns the vector of every place of a query (first) and of a key on an axis.

    >>> by_place(jnp.arange(3.0)[:, None])[..., 0].tolist()
    [[1.0, 0.0], [2.0, 1.0]]
    """
    places = np.arange((len(table) + 1) // 2)
    return table[places[:, None] - places + len(places) - 1]


def extended_width(head_dim: int, grid: tuple[int, ...]) -> int:
    """Returns the width of what `extended` returns: a multiple of 8.

    >>> extended_width(64, (14, 14)), extended_width(64, (64, 64))
    (96, 192)
    """
    return 8 * math.ceil((head_dim + sum(grid)) / 8)


def extended(
    q: Float[Array, "B h w H d"],
    k: Float[Array, "B h w H d"],
    v: Float[Array, "B h w H d"],
    rows: Float[Array, "h h d"],
    columns: Float[Array, "w w d"],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"], Float[Array, "B T H D"]]:
    """Returns queries, keys and values with which plain attention has the biases.

    Behind a query stand its biases for every row and for every column, by `sqrt(d)`;
    behind a key a 1 in its row and in its column; behind a value zeros. With a scale of
    `1 / sqrt(d)`, a fused implementation that knows no bias thus adds them.

    Args:
      q, k, v: queries, keys and values.
      rows, columns: vectors of both axes that `by_place` made.
    """
    *lead, height, width, heads, head_dim = q.shape
    by_row, by_column = _biases(math.sqrt(head_dim) * q, rows, columns)
    place = np.indices((height, width))[..., None]  # [2, h, w, 1]
    ones = [place[axis] == np.arange(n) for axis, n in enumerate((height, width))]
    shape = *lead, height, width, heads
    where = [
        jnp.broadcast_to(jnp.asarray(one, k.dtype)[:, :, None], (*shape, one.shape[-1]))
        for one in ones
    ]
    total = extended_width(head_dim, (height, width))

    def joined(*parts: Array) -> Array:
        x = jnp.concatenate(parts, -1).reshape(*lead, height * width, heads, -1)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, total - x.shape[-1])])

    return joined(q, by_row, by_column), joined(k, *where), joined(v)


def resized_table(
    table: Float[np.ndarray, "L d"], length: int
) -> Float[np.ndarray, "length d"]:
    """Resizes a table of relative positions: linear, half-pixel centres, float64.

    Equal to `torch.nn.functional.interpolate(mode="linear")`, with which SAM reads its
    tables on other grids; nothing is smoothed where the table gets shorter.

    >>> resized_table(np.arange(3.0)[:, None], 6)[:, 0].tolist()
    [0.0, 0.25, 0.75, 1.25, 1.75, 2.0]
    """
    old = np.arange(len(table))
    centres = (np.arange(length) + 0.5) * len(table) / length - 0.5
    columns = np.asarray(table, np.float64).T
    return np.stack([np.interp(centres, old, column) for column in columns], -1)


def _biases(q: Array, rows: Array, columns: Array) -> tuple[Array, Array]:
    """Returns `[B, h, w, H, n]` for the rows and for the columns of the keys."""
    by_row = jnp.einsum("byxhd,ynd->byxhn", q, rows)
    return by_row, jnp.einsum("byxhd,xnd->byxhn", q, columns)


def _in_chunks(q: Array, k: Array, v: Array, rows: Array, columns: Array) -> Array:
    """Computes attention for some rows of queries at a time."""
    batch, height, width, heads, head_dim = q.shape
    k, v = (x.reshape(batch, height * width, heads, head_dim) for x in (k, v))
    count = math.ceil(height / max(1, QUERIES // width))
    if count == 1:
        return _recomputed(q, rows, columns, k, v)
    own = math.ceil(height / count)  # rows of a chunk; the last may have some of zeros
    spare = own * count - height
    q = jnp.pad(q, ((0, 0), (0, spare), (0, 0), (0, 0), (0, 0)))
    rows = jnp.pad(rows, ((0, spare), (0, 0), (0, 0)))
    chunks = (
        q.reshape(batch, count, own, width, heads, head_dim).swapaxes(0, 1),
        rows.reshape(count, own, height, head_dim),
    )
    y = jax.lax.map(lambda chunk: _recomputed(*chunk, columns, k, v), chunks)
    y = y.swapaxes(0, 1).reshape(batch, own * count, width, heads, head_dim)
    return y[:, :height]


# The logits are made again in the backward pass, as in `layers.attention`.
@jax.checkpoint
@jax.named_scope("attention")
def _recomputed(q: Array, rows: Array, columns: Array, k: Array, v: Array) -> Array:
    """Lets `q`, some rows of the grid, attend to all of it (`k`, `v`: `[B T H d]`)."""
    by_row, by_column = (x.transpose(0, 3, 1, 2, 4) for x in _biases(q, rows, columns))
    bias = by_row[..., :, None] + by_column[..., None, :]  # [B, H, y, x, h, w]
    flat = len(q), q.shape[1] * q.shape[2], *q.shape[3:]
    y = jax.nn.dot_product_attention(
        q.reshape(flat),
        k,
        v,
        bias.reshape(*bias.shape[:2], flat[1], k.shape[1]),
        implementation="xla",
    )
    return y.reshape(q.shape)
