"""CLIP's towers of texts and images (Radford et al., arXiv 2103.00020), in Flax NNX.

Axes: `B` texts or images, `T` tokens, `D` width, `P` width of the projection.

    >>> from flax import nnx
    >>> from snella_jax.models.sd3 import clip
    >>> config = clip.ClipTextConfig(width=8, depth=2, heads=2, vocab_size=50)
    >>> tower = clip.ClipText(config, rngs=nnx.Rngs(0))
    >>> hidden, pooled = tower(jnp.array([[48, 5, 7, 49, 49]]))
    >>> hidden.shape, pooled.shape
    ((1, 5, 8), (1, 8))
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from snella_jax.models.layers import basic, stack
from snella_jax.models.layers.images import check_batch, normalise
from snella_jax.models.sd3.clip.blocks import Block, through
from snella_jax.models.sd3.clip.config import ClipImageConfig, ClipTextConfig


class ClipText(nnx.Module):
    """Tower of texts: embedding, causal blocks, a final norm and a projection.

    Attributes:
      projection: only there if `config.projection` is not None.
    """

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = nnx.Embed(
            c.vocab_size,
            c.width,
            embedding_init=basic.SMALL,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            rngs=rngs,
        )
        shape = (c.positions, c.width)
        self.pos_embed = nnx.Param(basic.SMALL(rngs.params(), shape, c.param_dtype))
        self.blocks = stack.build(
            lambda rngs: Block(c, True, rngs=rngs), c.depth, c.stacked, rngs
        )
        self.norm = basic.norm(c.width, c.norm_eps, c, rngs)
        if c.projection is not None:
            self.projection = _projection(c, rngs)

    def __call__(
        self, tokens: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B P"]]:
        """Returns the states that generation is conditioned on, and the text's own.

        Args:
          tokens: texts with start and end, padded at the end with any token. Texts
            may be shorter than `config.positions`.

        Returns:
          The output of the last block but one, without the final norm
          (`hidden_states[-2]` in transformers), and the end token's state after all
          blocks, the final norm and the projection (`text_embeds`). The end token is
          the first `config.eos`, or the first of the largest id where that is None; in
          a text without `config.eos` it is the first token, as in transformers.

        Raises:
          TypeError: the tokens are no integers.
          ValueError: they have another shape, or are more than `config.positions`.
        """
        c = self.config
        _check_tokens(tokens, c.positions)
        positions = self.pos_embed[None, : tokens.shape[1]].astype(c.dtype)
        hidden, last = through(self.blocks, self.embed(tokens) + positions, c.remat)
        ends = (tokens if c.eos is None else tokens == c.eos).argmax(1)
        pooled = self.norm(last[jnp.arange(len(last)), ends])
        return hidden, pooled if c.projection is None else self.projection(pooled)


class ClipImage(nnx.Module):
    """Tower of images: patches, blocks, and the class token's projection.

    Attributes:
      projection: only there if `config.projection` is not None.
    """

    def __init__(self, config: ClipImageConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        small = basic.SMALL
        tokens = c.grid[0] * c.grid[1] + 1
        self.patch_embed = basic.convolution(
            c.channels, c.width, c.patch_hw, c, rngs, use_bias=False
        )
        self.cls_token = nnx.Param(small(rngs.params(), (c.width,), c.param_dtype))
        shape = (tokens, c.width)
        self.pos_embed = nnx.Param(small(rngs.params(), shape, c.param_dtype))
        self.pre_norm = basic.norm(c.width, c.norm_eps, c, rngs)
        self.blocks = stack.build(
            lambda rngs: Block(c, False, rngs=rngs), c.depth, c.stacked, rngs
        )
        self.norm = basic.norm(c.width, c.norm_eps, c, rngs)
        if c.projection is not None:
            self.projection = _projection(c, rngs)

    def __call__(self, images: Float[Array, "B height width C"]) -> Float[Array, "B P"]:
        """Returns the embedding of each image, not of unit length (`image_embeds`).

        Args:
          images: pixels as `normalise` returns them.

        Raises:
          ValueError: they do not have the configured height, width or channels.
        """
        c = self.config
        check_batch(images, c)
        x = self.patch_embed(images)
        x = x.reshape(len(x), -1, c.width)
        cls = jnp.broadcast_to(self.cls_token[...], (len(x), 1, c.width))
        x = jnp.concatenate([cls.astype(x.dtype), x], 1)
        x = self.pre_norm(x + self.pos_embed[None].astype(x.dtype))
        _, x = through(self.blocks, x, c.remat)
        pooled = self.norm(x[:, 0])
        return pooled if c.projection is None else self.projection(pooled)

    def normalise(
        self, pixels: Float[Array, "B height width C"]
    ) -> Float[Array, "B height width C"]:
        """Returns images as the weights expect them, from pixels in [0, 1].

        Raises:
          TypeError: the pixels are integers, which would be 0 to 255.
        """
        return normalise(pixels, self.config)


def _projection(config: ClipTextConfig | ClipImageConfig, rngs: nnx.Rngs) -> nnx.Linear:
    assert config.projection is not None
    return basic.linear(config.width, config.projection, config, rngs, use_bias=False)


def _check_tokens(tokens: Array, positions: int) -> None:
    if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise TypeError(f"tokens are {jnp.result_type(tokens)}: expected integers.")
    if tokens.ndim != 2 or not 0 < tokens.shape[1] <= positions:
        raise ValueError(
            f"tokens have shape {jnp.shape(tokens)}: expected [B, T] with T from 1 to "
            f"{positions}."
        )
