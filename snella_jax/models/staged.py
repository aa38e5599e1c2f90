"""What hierarchical models share: stages with a grid each, every one coarser.

Axes: `B` images, `h`, `w` the grid of a stage, `D` its width.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from snella_jax.models import described as config_files
from snella_jax.models import images, parts, stack
from snella_jax.models.building import configured, filled
from snella_jax.models.checkpoint_error import CheckpointError
from snella_jax.models.loading import Checkpoint
from snella_jax.models.tables import check_numbers


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
        self.patch_embed = parts.convolution(c.channels, first, c.patch_hw, c, rngs)
        self.embed_norm = parts.norm(first, eps[0], c, rngs)
        self.blocks = nnx.List(
            stack.build(functools.partial(block, stage), count, c.stacked, rngs)
            for stage, (count, *_) in enumerate(c.rows)
        )
        self.down = nnx.List(down(stage, rngs) for stage in range(len(c.rows) - 1))
        self.norm = parts.norm(last, eps[1], c, rngs)
        if c.num_classes:
            self.head = parts.head(last, c, rngs)

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


Arrays = Mapping[str, np.ndarray]
Prepare = Callable[[Arrays, Any], Arrays]


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config files say of the config and shapes do not.

    Raises:
      CheckpointError: as `described.described`, or a head that sees no mean.
    """
    known = config_files.described(checkpoint)
    if (pool := known.pop("pool", "mean")) != "mean":
        raise CheckpointError(checkpoint.path, f'global_pool={pool!r}: expected "avg"')
    known.pop("heads", None)  # in the tables of biases, if there are any
    return known


def load(
    kinds: tuple[Callable[..., Any], Callable[..., Any]],
    checkpoint: Checkpoint,
    arrays: Mapping[str, np.ndarray],
    problems: Sequence[str],
    shape: Callable[[], dict[str, Any]],
    known: Mapping[str, Any],
    num_classes: int | None,
    options: Mapping[str, Any],
    prepare: Prepare = lambda arrays, config: arrays,
) -> Any:
    """A model with published weights.

    Args:
      kinds: of the model and its config.
      checkpoint: for errors.
      arrays: by path, as `arrange` gave them, and the `problems` that it found.
      shape: fields of the config, what shapes say.
      known: what `described` says, and the format.
      num_classes: as of `filled`.
      options: fields that the caller gives; None leaves what the file says.
      prepare: the arrays as the config needs them.

    Raises:
      CheckpointError: as `configured` and `filled`.
      ValueError, TypeError: an option that cannot be.
    """
    kind, config_kind = kinds

    def of_the_file() -> dict[str, Any]:
        height, width, channels, _ = arrays["patch_embed/kernel"].shape
        classes = arrays["head/bias"].size if "head/bias" in arrays else 0
        patches = {"patch_size": (height, width), "channels": channels}
        shapes = patches | {"num_classes": classes} | shape()
        _agree(checkpoint, shapes, num_classes is None)
        found = {**shapes, **known}
        check_numbers(found, "pixel_mean", "pixel_std", "norm_eps", "image_size")
        return found

    config = configured(config_kind, checkpoint, of_the_file, problems)
    given = {name: value for name, value in options.items() if value is not None}
    config = dataclasses.replace(config, **given)
    return filled(
        kind,
        config,
        checkpoint,
        prepare(arrays, config),
        num_classes=num_classes,
        width=config.widths[-1],
        stacked=r"blocks/\d+",
        problems=problems,
    )


THEIRS = {  # what configs of timm and transformers call fields of ours
    "width": ("embed_dim",),
    "widths": ("hidden_sizes", "dims"),
    "depths": ("depths",),
    "heads": ("num_heads",),
    "window": ("window_size",),
    "mlp_ratio": ("mlp_ratio",),
    "patch_size": ("patch_size",),
    "channels": ("num_channels", "in_chans"),
}


def _agree(checkpoint: Checkpoint, shapes: Mapping[str, Any], kept_head: bool) -> None:
    """Raises a `ValueError` where the folder's config is of other weights."""
    has = {
        theirs: shapes[ours]
        for ours, names in THEIRS.items()
        for theirs in names
        if ours in shapes
    }
    stages = len(shapes["depths"])
    has |= {"num_layers": stages, "num_stages": stages}
    if kept_head and shapes["num_classes"]:
        has |= {"num_classes": shapes["num_classes"], "label_offset": 0}
    config_files.agree(checkpoint, **has)


def counts(arrays: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the blocks of each stage, by the paths of their arrays.

    Counted, not the largest: a number that leaves a gap is a tensor without a place.
    """
    found = (re.match(r"blocks/(\d+)/(\d+)/", path) for path in arrays)
    blocks = {match.groups() for match in found if match}
    stages = [stage for stage, _ in blocks]
    return tuple(stages.count(str(i)) for i in range(len(set(stages))))
