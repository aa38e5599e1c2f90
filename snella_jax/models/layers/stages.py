"""Hierarchical models: stages with a grid each, every one coarser.

Axes: `B` images, `h`, `w` the grid of a stage, `D` its width.
"""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from snella_jax.models.layers import basic, stack
from snella_jax.models.layers.images import Classifier, check_batch, check_fields


class Staged(Classifier):
    """A classifier of stages: the base of models that say what these are made of.

    Attributes:
      config: has `widths`, `drop_path`, `remat`, `memory` and `rows`, the shape of the
        blocks of each stage.
      blocks: blocks of each stage, as `stack.build` makes them.
      down: from each stage's grid to the next.
    """

    patch_embed: nnx.Conv
    embed_norm: nnx.LayerNorm
    blocks: nnx.List
    down: nnx.List
    norm: nnx.LayerNorm

    def build(
        self,
        block: Callable[[int, nnx.Rngs], nnx.Module],
        down: Callable[[int, nnx.Rngs], nnx.Module],
        eps: tuple[float, float],
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the weights.

        Args:
          block: makes one of a stage.
          down: makes what comes behind a stage.
          eps: epsilons of the norms behind the patches and before the head.
          rngs: its `params` stream draws.
        """
        c = self.config
        first, last = c.widths[0], c.widths[-1]
        self.patch_embed = basic.convolution(c.channels, first, c.patch_hw, c, rngs)
        self.embed_norm = basic.norm(first, eps[0], c, rngs)
        self.blocks = nnx.List(
            stack.build(functools.partial(block, stage), count, c.stacked, rngs)
            for stage, (count, *_) in enumerate(c.rows)
        )
        self.down = nnx.List(down(stage, rngs) for stage in range(len(c.rows) - 1))
        self.norm = basic.norm(last, eps[1], c, rngs)
        if c.num_classes:
            self.head = basic.head(last, c, rngs)

    def pooled(
        self, images: Float[Array, "B height width C"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "B D"]:
        """Returns the input of the head; arguments and errors as in the call."""
        return self.pool(self.features(images, key)[-1])

    def pool(self, last: Float[Array, "B h w D"]) -> Float[Array, "B D"]:
        """Pools the grid of the last stage."""
        raise NotImplementedError

    def features(
        self, images: Float[Array, "B height width C"], key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B h w D"], ...]:
        """Returns the grid after the blocks of each stage; arguments as in the call."""
        c, found = self.config, []
        check_batch(images, c)
        x = self.embed_norm(self.embed(images))
        drops = stack.drops(key, c.drop_path, c.rows)
        for stage, (blocks, drop) in enumerate(zip(self.blocks, drops, strict=True)):
            x = self.down[stage - 1](x) if stage else x
            x = stack.through(blocks, x, drop, c.remat, memory=c.memory)
            found.append(x)
        return tuple(found)

    def embed(
        self, images: Float[Array, "B height width C"]
    ) -> Float[Array, "B h w D"]:
        """Embeds the patches."""
        return self.patch_embed(images)


def check_stages(config: Any, *names: str) -> None:
    """Raises a `ValueError` for fields of a config that cannot be.

    Args:
      config: with `depths`, a number for each stage.
      names: names of the other fields with one.
    """
    check_fields(config)
    for name in ("depths", *names):
        numbers = getattr(config, name)
        if not numbers or len(numbers) != len(config.depths) or min(numbers) < 1:
            raise ValueError(
                f"{name}={numbers}, depths={config.depths}: expected a positive number "
                "for each stage."
            )
