"""Equal blocks: stacked (every variable has a leading axis) and scanned, or a list.

If they are stacked, only one block is compiled, whatever their number.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from snella_jax.models.layers.memory import kept_names
from snella_jax.ops.dropout import drop_path
from snella_jax.ops.recompute import rematerialised

M = TypeVar("M", bound=nnx.Module)
T = TypeVar("T")
Drop = tuple[Array, Array]  # key and rate of stochastic depth in a block


def build(
    make: Callable[[nnx.Rngs], nnx.Module], depth: int, stacked: bool, rngs: nnx.Rngs
) -> Any:
    """Makes `depth` blocks, stacked or as a list."""
    if not stacked:
        return nnx.List(make(rngs) for _ in range(depth))
    return nnx.split_rngs(splits=depth)(nnx.vmap(make))(rngs)


def drops(
    key: PRNGKeyArray | None, rate: float, shapes: Sequence[tuple[int, ...]]
) -> list[Drop | None]:
    """Returns keys and rates of stochastic depth for the blocks of each stage.

    The rates rise linearly from 0 in the first block to `rate` in the last. None
    without a key or where it is 0.

    Args:
      key: key of the step.
      rate: rate of the last block.
      shapes: number of blocks of each stage, perhaps in groups.
    """
    if key is None or not rate:
        return [None] * len(shapes)
    counts = [math.prod(shape) for shape in shapes]
    # Keys, as a stream inside a scanned block would repeat.
    keys, rates = jax.random.split(key, sum(counts)), jnp.linspace(0, rate, sum(counts))
    found, ends = [], np.cumsum(counts)
    for count, end, shape in zip(counts, ends, shapes, strict=True):
        own = slice(end - count, end)
        of_key = keys.shape[1:]  # () but of those that `PRNGKey` makes
        found.append((keys[own].reshape(*shape, *of_key), rates[own].reshape(shape)))
    return found


def dropped(y: Array, drop: Drop | None, salt: int) -> Array:
    """Applies stochastic depth to a branch; `salt` tells those of a block apart."""
    if drop is None:
        return y
    key, rate = drop
    return drop_path(jax.random.fold_in(key, salt), y, rate)


def through(
    blocks: Any,
    x: T,
    drops: Drop | None,
    remat: str,
    shared: tuple[Any, ...] = (),
    *,
    memory: str = "usual",
) -> T:
    """Calls every block with `x`, or what the one before returned, and its drop.

    Args:
      blocks: blocks that `build` made.
      x: input of the first, an array or several.
      drops: with a row for each block; None for blocks that get none.
      remat, memory: see `call`.
      shared: further arguments, the same for every block.
    """
    own = () if drops is None else (drops,)
    if isinstance(blocks, nnx.List):
        for index, block in enumerate(blocks):
            graphdef, state = nnx.split(block)
            row = jax.tree.map(lambda leaf, i=index: leaf[i], own)
            x = call(graphdef, remat, memory, scanned=False)(state, x, *row, *shared)
        return x
    graphdef, state = nnx.split(blocks)
    one = call(graphdef, remat, memory, scanned=True)
    x, _ = jax.lax.scan(
        lambda x, row: (one(row[0], x, *row[1:], *shared), None), x, (state, *own)
    )
    return x


def call(
    graphdef: nnx.GraphDef, remat: str, memory: str = "usual", *, scanned: bool
) -> Callable[..., Any]:
    """Makes a block a function of its state and its arguments: its input, and its drop.

    Args:
      graphdef: the block's, behind `nnx.split`.
      remat: "blocks" to keep its input alone for the backward pass (and the few
        numbers that layers mark with `ops.names.kept`), else "none".
      memory: what it keeps otherwise, see `layers.memory`.
      scanned: True if a scan calls it.
    """

    def run(state: nnx.State, *arguments: Any) -> Any:
        return nnx.merge(graphdef, state)(*arguments)

    return recomputed(run, remat, memory, scanned=scanned)


def recomputed(
    run: Callable[..., Any], remat: str, memory: str, *, scanned: bool
) -> Callable[..., Any]:
    """Makes a function of arrays keep what `remat` and `memory` say, see `call`."""
    names = () if remat == "blocks" else kept_names(memory)
    if names is None:
        return run
    return rematerialised(run, keep=names, prevent_cse=not scanned)


def row(blocks: Any, index: int) -> Any:
    """Returns one block, of a list or of stacked ones."""
    if isinstance(blocks, nnx.List):
        return blocks[index]
    graphdef, state = nnx.split(blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))


def unstack(model: M) -> M:
    """Returns a copy whose blocks are lists, so that each may differ from the others.

    >>> from snella_jax import models
    >>> model = models.create("vit_ti16", image_size=32, rngs=nnx.Rngs(0))
    >>> model.blocks.mlp.fc1.kernel.shape, unstack(model).blocks[0].mlp.fc1.kernel.shape
    ((12, 192, 768), (192, 768))

    Args:
      model: model of `snella_jax.models`; a `Sam`'s blocks are its encoder's.

    Raises:
      ValueError: it has adapters, which belong to the stacks.
    """
    require_plain(model)
    whole: Any = nnx.clone(model)
    if whole.config.stacked:
        owner = getattr(whole, "encoder", whole)
        owner.blocks = _listed(owner.blocks)
        owner.config = dataclasses.replace(owner.config, stacked=False)
        if owner is not whole:
            whole.config = dataclasses.replace(whole.config, encoder=owner.config)
    return whole


def require_plain(model: nnx.Module) -> None:
    """Raises a `ValueError` if a model has adapters."""
    nodes = (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module))
    names = (name for node in nodes for name in vars(node))
    if any(name == "adapter" or name.endswith("_adapter") for name in names):
        raise ValueError(
            "The model has adapters: expected one without, or snella.merge(model)."
        )


def _listed(blocks: Any) -> nnx.List | nnx.Dict:
    """Returns a list for the stack, for each stack of a list, or of a dictionary."""
    match blocks:
        case nnx.List():
            return nnx.List(map(_rows, blocks))
        case nnx.Dict():
            return nnx.Dict({kind: _rows(own) for kind, own in blocks.items()})
        case _:
            return _rows(blocks)


def _rows(blocks: nnx.Module) -> nnx.List:
    depth = len(jax.tree.leaves(nnx.state(blocks))[0])
    return nnx.List(row(blocks, index) for index in range(depth))
