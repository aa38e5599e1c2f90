"""Grad-CAM of a ViT (Selvaraju et al., arXiv 1610.02391): where it sees a class.

The features are the patch tokens behind the first norm of a block. Their weights are
the mean gradients of the class's score over the patches, and the heat of a patch is its
weighted sum, where that is positive.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from experiments.data.pairs import THRESHOLD
from experiments.data.source import Source
from experiments.data.transforms import Transform
from experiments.training import evaluation, sharding
from snella_jax.models import vit
from snella_jax.models.layers import stack


def grad_cam(
    score: Callable[[Float[Array, "B P D"]], Float[Array, " B"]],
    tokens: Float[Array, "B P D"],
) -> Float[Array, "B P"]:
    """Returns the heat of every patch for the scores of several images.

    Args:
      score: of each image the score of its class, from its own tokens alone.
      tokens: features of the patches.
    """
    gradients = jax.grad(lambda own: score(own).sum())(tokens)
    weights = gradients.mean(1, keepdims=True)
    return jax.nn.relu((weights * tokens).sum(-1))


def block_of(model: Any, block: int) -> int:
    """Returns the index of a block from 0; -1 is the last.

    Raises:
      ValueError: the model is no ViT, or it has no block before that one.
    """
    if not isinstance(model, vit.ViT):
        raise ValueError(f"The model is a {type(model).__name__}: expected a ViT.")
    depth = model.config.depth
    index = block + depth if block < 0 else block
    if not 0 < index < depth:
        raise ValueError(
            f"block={block}: expected 1 to {depth - 1}, or from the end -1 to "
            f"-{depth - 1}."
        )
    return index


def of_images(
    model: vit.ViT,
    images: Float[Array, "B height width C"],
    labels: Int[Array, " B"],
    block: int,
) -> Float[Array, "B rows columns"]:
    """Returns how much each patch speaks for a class of each image.

    Args:
      model: a ViT with a head.
      images: normalised pixels.
      labels: the class of each image whose logit is explained.
      block: index of the block, from 1.
    """
    first, depth = int(model.config.class_token), model.config.depth
    (entering,) = model.features(images, layers=(block - 1,))
    normed = stack.row(model.blocks, block).norm1(entering)

    def score(patches: Array) -> Array:
        own = stack.row(model.blocks, block)
        own.norm1 = _Given(jnp.concatenate([normed[:, :first], patches], 1))
        x = own(entering)
        for index in range(block + 1, depth):
            x = stack.row(model.blocks, index)(x)
        logits = model.head(model.pool(model.norm(x)))
        return jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]

    heat = grad_cam(score, normed[:, first:])
    return heat.reshape(-1, *model.config.grid)


class _Given(nnx.Module):
    """In place of a norm: returns tokens, whatever it is given."""

    def __init__(self, tokens: Float[Array, "B T D"]):
        self.tokens = nnx.data(tokens)

    def __call__(self, _: Array) -> Float[Array, "B T D"]:
        return self.tokens


def of_source(
    model: vit.ViT, source: Source, transform: Transform, mesh: Mesh, block: int
) -> Float[np.ndarray, "N rows columns"]:
    """Returns the heat of every example's own class, in the order of the source."""
    graphdef, state = nnx.split(model)
    state = sharding.place(state, mesh)
    found = np.zeros((len(source), *model.config.grid), np.float32)
    for batch in evaluation.batches(source, transform, mesh):
        valid = np.asarray(batch["valid"])
        heat = np.asarray(_run(graphdef, state, batch["image"], batch["label"], block))
        found[np.asarray(batch["index"])[valid]] = heat[valid]
    return found


@functools.partial(jax.jit, static_argnames=("graphdef", "block"))
def _run(
    graphdef: nnx.GraphDef, state: Any, images: Array, labels: Array, block: int
) -> Array:
    """`of_images`, compiled once for all models of one shape."""
    return of_images(nnx.merge(graphdef, state), images, labels, block)


def covered(
    mask: UInt8[np.ndarray, "H W"], grid: tuple[int, int]
) -> Float[np.ndarray, "rows columns"]:
    """Returns how much of each patch of an image a mask covers.

    >>> covered(np.array([[255, 255, 255, 0]] * 2, np.uint8), (1, 2)).tolist()
    [[1.0, 0.5]]
    """
    whole = Image.fromarray((mask > THRESHOLD).astype(np.float32))
    rows, columns = grid
    return np.asarray(whole.resize((columns, rows), Image.Resampling.BOX))


def inside(
    heat: Float[np.ndarray, "N rows columns"],
    cover: Float[np.ndarray, "N rows columns"],
) -> Float[np.ndarray, " N"]:
    """Returns the share of each image's heat that a mask covers; NaN without heat.

    >>> heat = np.array([[[3.0, 1.0]], [[0.0, 0.0]]])
    >>> inside(heat, np.array([[[1.0, 0.5]], [[1.0, 0.5]]])).tolist()
    [0.875, nan]
    """
    total = heat.sum((1, 2))
    return (heat * cover).sum((1, 2)) / np.where(total > 0, total, np.nan)
