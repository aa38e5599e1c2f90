"""SAM's prompt encoder: points, boxes and masks as tokens and maps.

Axes: `B` images, `N` points, `h`, `w` the grid of the image embedding, `C` its width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from snella_jax.models.layers import basic
from snella_jax.models.sam.config import SamConfig

EPS = 1e-6  # of the norms behind a mask's convolutions
BOX = (2, 3)  # rows of `points` for a box's corners; 0 and 1 are those of labels


class PromptEncoder(nnx.Module):
    """Embeddings of prompts, and the code of positions that the decoder sees.

    Attributes:
      position_matrix: random frequencies `[2, C / 2]` of the published weights, with
        which the decoder was trained; they never train.
      points: embeddings of background points, foreground points, and a box's first and
        last corner.
      not_a_point: embedding of padding points.
      no_mask_embed: embedding of each place where there is no mask prompt.
      mask: layers for mask prompts.
    """

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        drawn = nnx.initializers.normal(1.0)

        def vector() -> nnx.Param:
            return nnx.Param(drawn(rngs.params(), (c.width,), c.param_dtype))

        matrix = drawn(rngs.params(), (2, c.width // 2), jnp.float32)
        self.position_matrix = basic.Constant(matrix)
        self.points = nnx.Embed(
            4,
            c.width,
            embedding_init=drawn,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            rngs=rngs,
        )
        self.not_a_point, self.no_mask_embed = vector(), vector()
        self.mask = MaskPrompt(c, rngs=rngs)

    def __call__(
        self,
        points: Num[Array, "B N 2"] | None = None,
        labels: Int[Array, "B N"] | None = None,
        boxes: Num[Array, "B 4"] | None = None,
        mask: Float[Array, "B 4*h 4*w"] | None = None,
    ) -> tuple[Float[Array, "B S C"] | None, Float[Array, "#B h w C"]]:
        """Returns tokens, None if there are neither points nor boxes, and a map.

        Arguments as in `Sam`.
        """
        tokens = []
        if points is not None and labels is not None:
            points, labels = jnp.asarray(points, jnp.float32), jnp.asarray(labels)
            if boxes is None:  # a padding point stands for the box
                points = jnp.pad(points, ((0, 0), (0, 1), (0, 0)))
                labels = jnp.pad(labels, ((0, 0), (0, 1)), constant_values=-1)
            known = self._coded(points) + self.points(jnp.maximum(labels, 0))
            padding = self.not_a_point[...].astype(known.dtype)
            tokens.append(jnp.where(labels[..., None] < 0, padding, known))
        if boxes is not None:
            corners = self._coded(jnp.asarray(boxes, jnp.float32).reshape(-1, 2, 2))
            tokens.append(corners + self.points(jnp.array(BOX)))
        if mask is None:
            empty = self.no_mask_embed[...].astype(self.config.dtype)
            dense = jnp.broadcast_to(empty, (1, *self.config.grid, empty.size))
        else:
            dense = self.mask(jnp.asarray(mask)[..., None])
        return jnp.concatenate(tokens, 1) if tokens else None, dense

    def positions(self) -> Float[Array, "h w C"]:
        """Returns the code of each place of the grid."""
        height, width = self.config.grid
        y, x = (jnp.arange(size) + 0.5 for size in (height, width))
        places = jnp.stack(jnp.meshgrid(x / width, y / height), -1)
        return self._code(places)

    def _coded(self, pixels: Float[Array, "B N 2"]) -> Float[Array, "B N C"]:
        """Returns the code of the pixels with these corners (x, y)."""
        height, width = self.config.image_hw
        return self._code((pixels + 0.5) / jnp.array([width, height], jnp.float32))

    def _code(self, places: Float[Array, "*B 2"]) -> Float[Array, "*B C"]:
        """Returns sines and cosines of places in [0, 1], computed in float32."""
        matrix = self.position_matrix[...].astype(jnp.float32)
        turns = jnp.matmul(2 * places - 1, matrix, precision=jax.lax.Precision.HIGHEST)
        angles = 2 * jnp.pi * turns
        code = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        return code.astype(self.config.dtype)


class MaskPrompt(nnx.Module):
    """Convolutions from a mask's logits, four times as fine as the grid, to a map."""

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs):
        c, few = config, config.mask_channels // 4
        self.conv1 = basic.convolution(1, few, (2, 2), c, rngs)
        self.norm1 = basic.norm(few, EPS, c, rngs)
        self.conv2 = basic.convolution(few, 4 * few, (2, 2), c, rngs)
        self.norm2 = basic.norm(4 * few, EPS, c, rngs)
        self.conv3 = basic.convolution(4 * few, c.width, (1, 1), c, rngs)

    def __call__(self, mask: Float[Array, "B 4*h 4*w 1"]) -> Float[Array, "B h w C"]:
        x = jax.nn.gelu(self.norm1(self.conv1(mask)), approximate=False)
        x = jax.nn.gelu(self.norm2(self.conv2(x)), approximate=False)
        return self.conv3(x)
