"""SAM's mask decoder (Kirillov et al., arXiv 2304.02643, appendix A).

Axes: `B` images, `S` tokens (the IoU's, one of each mask, those of the prompts), `P`
places of the image embedding, `h` x `w`, and `C` its width.
"""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from snella_jax.models.layers import basic
from snella_jax.models.layers.attention import attend
from snella_jax.models.sam.config import SamConfig

FINAL_EPS = 1e-5  # of the norm behind the layers, in Meta's code and in transformers
UPSCALE_EPS = 1e-6  # of the norm between the two upscalings
Both = tuple[Float[Array, "B S C"], Float[Array, "B P C"]]


class MaskDecoder(nnx.Module):
    """Two-way attention between tokens and image, then a mask for each mask token."""

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        width, drawn = c.width, nnx.initializers.normal(1.0)

        def embeddings(count: int) -> nnx.Param:
            return nnx.Param(drawn(rngs.params(), (count, width), c.param_dtype))

        self.iou_token, self.mask_tokens = embeddings(1), embeddings(c.masks)
        self.layers = nnx.List(
            TwoWayLayer(c, first=not index, rngs=rngs)
            for index in range(c.decoder_depth)
        )
        self.final_attn = Attention(c, width // 2, rngs=rngs)
        self.final_norm = basic.norm(width, FINAL_EPS, c, rngs)
        self.upscale1 = Upscaling(width, width // 4, c, rngs=rngs)
        self.upscale_norm = basic.norm(width // 4, UPSCALE_EPS, c, rngs)
        self.upscale2 = Upscaling(width // 4, width // 8, c, rngs=rngs)
        self.hyper = nnx.List(
            Head((width, width, width, width // 8), c, rngs=rngs)
            for _ in range(c.masks)
        )
        self.iou = Head((width, c.iou_hidden, c.iou_hidden, c.masks), c, rngs=rngs)

    def __call__(
        self,
        embedding: Float[Array, "B h w C"],
        positions: Float[Array, "h w C"],
        prompts: Float[Array, "B N C"] | None,
        dense: Float[Array, "#B h w C"],
        multimask: bool,
    ) -> tuple[Float[Array, "B M 4*h 4*w"], Float[Array, "B M"]]:
        """Returns logits of masks and a prediction of each one's IoU, both float32.

        Args:
          embedding: the image encoder's.
          positions: code of each of its places.
          prompts: tokens of points and boxes, if there are any.
          dense: map of the mask prompt, or of none.
          multimask: True for all masks but the first, False for the first.
        """
        batch, height, width, _ = embedding.shape
        own = jnp.concatenate([self.iou_token[...], self.mask_tokens[...]])
        own = jnp.broadcast_to(own.astype(embedding.dtype), (batch, *own.shape))
        tokens = own if prompts is None else jnp.concatenate([own, prompts], 1)
        image = (embedding + dense).reshape(batch, height * width, -1)
        places = positions.reshape(1, height * width, -1)
        seen, image = self._both(tokens, image, places)
        image = self._upscaled(image.reshape(embedding.shape))
        chosen = range(1, self.config.masks) if multimask else range(1)
        masks = [self.hyper[index](seen[:, 1 + index]) for index in chosen]
        logits = jnp.einsum(
            "bmc,bhwc->bmhw",
            jnp.stack(masks, 1),
            image,
            preferred_element_type=jnp.float32,
        )
        iou = self.iou(seen[:, 0]).astype(jnp.float32)
        return logits, iou[:, chosen.start : chosen.stop]

    def _both(self, tokens: Array, image: Array, places: Array) -> Both:
        """Runs the layers; `tokens`, as they were, stand for the tokens' positions."""
        seen = tokens
        for layer in self.layers:
            seen, image = layer(seen, image, tokens, places)
        seen = seen + self.final_attn(seen + tokens, image + places, image)
        return self.final_norm(seen), image

    def _upscaled(
        self, image: Float[Array, "B h w C"]
    ) -> Float[Array, "B 4*h 4*w C/8"]:
        x = jax.nn.gelu(self.upscale_norm(self.upscale1(image)), approximate=False)
        return jax.nn.gelu(self.upscale2(x), approximate=False)


class TwoWayLayer(nnx.Module):
    """Attention of tokens to each other, to the image, an MLP, and the image's to them.

    Each is followed by a norm. The first layer's tokens attend to each other without
    positions, and what they find replaces them.
    """

    def __init__(self, config: SamConfig, *, first: bool, rngs: nnx.Rngs):
        c, width, self.first = config, config.width, first
        self.self_attn = Attention(c, width, rngs=rngs)
        self.to_image = Attention(c, width // 2, rngs=rngs)
        self.mlp = Head((width, c.decoder_mlp_dim, width), c, rngs=rngs)
        self.to_tokens = Attention(c, width // 2, rngs=rngs)
        self.norm1, self.norm2, self.norm3, self.norm4 = (
            basic.norm(width, c.decoder_norm_eps, c, rngs) for _ in range(4)
        )

    def __call__(self, seen: Array, image: Array, tokens: Array, places: Array) -> Both:
        if self.first:
            seen = self.self_attn(seen, seen, seen)
        else:
            placed = seen + tokens
            seen = seen + self.self_attn(placed, placed, seen)
        seen = self.norm1(seen)
        seen = seen + self.to_image(seen + tokens, image + places, image)
        seen = self.norm2(seen)
        seen = self.norm3(seen + self.mlp(seen))
        image = image + self.to_tokens(image + places, seen + tokens, seen)
        return seen, self.norm4(image)


class Attention(nnx.Module):
    """Multi-head attention of an inner width, whose keys and values may differ."""

    def __init__(self, config: SamConfig, inner: int, *, rngs: nnx.Rngs):
        width, self.heads = config.width, config.decoder_heads
        self.q, self.k, self.v = (
            basic.linear(width, inner, config, rngs) for _ in range(3)
        )
        self.out = basic.linear(inner, width, config, rngs)

    def __call__(
        self,
        q: Float[Array, "B S C"],
        k: Float[Array, "B P C"],
        v: Float[Array, "B P C"],
    ) -> Float[Array, "B S C"]:
        q, k, v = (
            self._split(layer(x))
            for layer, x in ((self.q, q), (self.k, k), (self.v, v))
        )
        y = attend(q, k, v, "xla")  # one side is a handful of tokens
        return self.out(y.reshape(len(y), y.shape[1], -1))

    def _split(self, x: Array) -> Array:
        return x.reshape(len(x), x.shape[1], self.heads, -1)


class Head(nnx.Module):
    """MLP of linear layers `fc1`, `fc2`, ... with a ReLU between."""

    def __init__(self, widths: Sequence[int], config: SamConfig, *, rngs: nnx.Rngs):
        layers = (basic.linear(n, m, config, rngs) for n, m in pairwise(widths))
        self.names = tuple(f"fc{index}" for index in range(1, len(widths)))
        for name, layer in zip(self.names, layers, strict=True):
            setattr(self, name, layer)

    def __call__(self, x: Float[Array, "*B n"]) -> Float[Array, "*B m"]:
        for name in self.names:
            x = getattr(self, name)(x if name == "fc1" else jax.nn.relu(x))
        return x


class Upscaling(nnx.Module):
    """Transposed convolution of 2 x 2 with stride 2: each place becomes four.

    Attributes:
      kernel: `[n, 2, 2, m]`; the four places of a square by row and column.
      bias: `[m]`.
    """

    def __init__(self, n: int, m: int, config: SamConfig, *, rngs: nnx.Rngs):
        self.dtype = config.dtype
        kernel = nnx.initializers.lecun_normal(in_axis=0, out_axis=-1)
        drawn = kernel(rngs.params(), (n, 2, 2, m), config.param_dtype)
        self.kernel = nnx.Param(drawn)
        self.bias = nnx.Param(jnp.zeros((m,), config.param_dtype))

    def __call__(self, x: Float[Array, "B h w n"]) -> Float[Array, "B 2*h 2*w m"]:
        batch, height, width, _ = x.shape
        kernel = self.kernel[...].astype(self.dtype)
        y = jnp.einsum("bhwn,nijm->bhiwjm", x, kernel)
        y = y.reshape(batch, 2 * height, 2 * width, -1)
        return y + self.bias[...].astype(y.dtype)
