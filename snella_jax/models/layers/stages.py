"""What hierarchical models share: stages with a grid each, every one coarser.

Axes: `B` images, `h`, `w` the grid of a stage, `D` its width.
"""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from snella_jax.models.layers import basic, images, stack


class Staged(nnx.Module):
    """A classifier of stages; mixed into those that say what these are made of.

    Attributes:
      config: has `widths`, `drop_path`, `remat` and `rows`, the shape of the blocks of
        each stage.
      blocks: of each stage, as `stack.build` makes them.
      down: from each stage's grid to the next.
    """

    config: Any
    patch_embed: nnx.Conv
    embed_norm: nnx.LayerNorm
    blocks: nnx.List
    down: nnx.List
    norm: nnx.LayerNorm
    head: nnx.Linear

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
          eps: of the norms behind the patches and before the head.
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

    def __call__(
        self, pixels: Float[Array, "B height width C"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "B classes"]:
        """Logits of normalised images (or pooled features where there is no head).

        Args:
          pixels: already normalised as the weights expect.
          key: switches stochastic depth on (training); None is deterministic.

        Raises:
          ValueError: the images do not have the configured height, width or channels.
        """
        pooled = self.pooled(pixels, key)
        return self.head(pooled) if self.config.num_classes else pooled

    def pooled(
        self, pixels: Float[Array, "B height width C"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "B D"]:
        """What the head sees of images; arguments and errors as of the call."""
        return self.pool(self.features(pixels, key)[-1])

    def pool(self, last: Float[Array, "B h w D"]) -> Float[Array, "B D"]:
        """What the head sees of the last stage's grid."""
        raise NotImplementedError

    def features(
        self, pixels: Float[Array, "B height width C"], key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B h w D"], ...]:
        """The grid after the blocks of each stage; arguments as of the call."""
        c, found = self.config, []
        images.check_batch(pixels, c)
        x = self.embed_norm(self.embed(pixels))
        drops = stack.drops(key, c.drop_path, c.rows)
        for stage, (blocks, drop) in enumerate(zip(self.blocks, drops, strict=True)):
            x = self.down[stage - 1](x) if stage else x
            x = stack.through(blocks, x, drop, c.remat)
            found.append(x)
        return tuple(found)

    def embed(
        self, pixels: Float[Array, "B height width C"]
    ) -> Float[Array, "B h w D"]:
        """The patches."""
        return self.patch_embed(pixels)

    def normalise(
        self, pixels: Float[Array, "B height width C"]
    ) -> Float[Array, "B height width C"]:
        """Images as the weights expect them, from pixels in [0, 1].

        Raises:
          TypeError: integers, which would be 0 to 255.
        """
        return images.normalise(pixels, self.config)


def check(config: Any, *names: str) -> None:
    """Raises a `ValueError` for fields of a config that cannot be.

    Args:
      config: with `depths`, a number for each stage.
      names: of the other fields with one.
    """
    images.check(config)
    for name in ("depths", *names):
        numbers = getattr(config, name)
        if not numbers or len(numbers) != len(config.depths) or min(numbers) < 1:
            raise ValueError(
                f"{name}={numbers}, depths={config.depths}: expected a positive number "
                "for each stage."
            )
