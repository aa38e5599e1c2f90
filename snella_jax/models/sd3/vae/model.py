"""Stable Diffusion 3's autoencoder, from images to latents and back, in Flax NNX.

The convolutional VAE of latent diffusion (Rombach et al., arXiv 2112.10752) without
quant convolutions: levels of residual blocks, each half as fine as the one before, and
attention of one head over the coarsest. Axes: `B` images of `H` times `W` pixels, `h`,
`w` the grid of the latents, `C` their channels, `D` the width of a level.

    >>> from snella_jax.models.sd3 import vae
    >>> config = vae.VAEConfig(widths=(8, 16), blocks=1, groups=4, latents=4)
    >>> def shapes(images):
    ...     model = vae.VAE(config, rngs=nnx.Rngs(0))
    ...     mean, logvar = model.encode(images)
    ...     return mean, model.decode(mean)
    >>> mean, images = nnx.eval_shape(shapes, jnp.zeros((1, 64, 48, 3)))
    >>> mean.shape, images.shape
    ((1, 32, 24, 4), (1, 64, 48, 3))
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from snella_jax.models.layers import basic, stack
from snella_jax.models.layers.attention import attend
from snella_jax.models.sd3.vae.config import VAEConfig

LOGVAR = (-30.0, 20.0)  # to which logarithms of variances are clipped


class VAE(nnx.Module):
    """An encoder of images and a decoder of latents; neither scales nor shifts these.

    Attributes:
      config: says shapes, `scale` and `shift`.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    @property
    def scale(self) -> float:
        """Factor of the latents that a diffusion model sees, `(z - shift) * scale`."""
        return self.config.scale

    @property
    def shift(self) -> float:
        """Mean of the latents, which a diffusion model's lack."""
        return self.config.shift

    @property
    def factor(self) -> int:
        """Side in pixels of what a latent stands for."""
        return self.config.factor

    def encode(
        self, images: Float[Array, "B H W channels"]
    ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        """Returns mean and logarithm of the variance of the images' latents, float32.

        The grid has `H // factor` times `W // factor` places.

        Args:
          images: pixels in [-1, 1].

        Raises:
          TypeError: integers.
          ValueError: another shape, or images smaller than `factor` pixels.
        """
        c = self.config
        _check(images, "images", c.channels, c.factor)
        moments = self.encoder(images).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, -1)
        return mean, jnp.clip(logvar, *LOGVAR)

    def decode(
        self, latents: Float[Array, "B h w C"]
    ) -> Float[Array, "B H W channels"]:
        """Returns the images of these latents, in about [-1, 1], float32.

        Raises:
          TypeError: integers.
          ValueError: another shape.
        """
        _check(latents, "latents", self.config.latents, 1)
        return self.decoder(latents).astype(jnp.float32)


class Encoder(nnx.Module):
    """From images to means and logarithms of variances, side by side."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        first, last = c.widths[0], c.widths[-1]
        self.conv_in = _conv3(c.channels, first, c, rngs)
        self.levels = nnx.List()
        for level, width in enumerate(c.widths):
            before = c.widths[max(level - 1, 0)]
            self.levels.append(Level(before, width, c.blocks, c, rngs=rngs))
        self.down = nnx.List(Down(width, c, rngs=rngs) for width in c.widths[:-1])
        self.middle = _middle(c, rngs)
        self.norm = _norm(last, c, rngs)
        self.conv_out = _conv3(last, 2 * c.latents, c, rngs)

    def __call__(self, images: Float[Array, "B H W channels"]) -> Array:
        x = self.conv_in(images)
        for index, level in enumerate(self.levels):
            x = self.down[index - 1](x) if index else x
            x = stack.through(level.blocks, x, None, self.config.remat)
        x = stack.through(self.middle, x, None, self.config.remat)
        return self.conv_out(jax.nn.silu(self.norm(x)))


class Decoder(nnx.Module):
    """From latents to images; level 0 is the images', as in the encoder."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        first, last = c.widths[0], c.widths[-1]
        self.conv_in = _conv3(c.latents, last, c, rngs)
        self.middle = _middle(c, rngs)
        self.levels = nnx.List()
        for level, width in enumerate(c.widths):
            before = c.widths[min(level + 1, len(c.widths) - 1)]
            self.levels.append(Level(before, width, c.blocks + 1, c, rngs=rngs))
        self.up = nnx.List(Up(width, c, rngs=rngs) for width in c.widths[1:])
        self.norm = _norm(first, c, rngs)
        self.conv_out = _conv3(first, c.channels, c, rngs)

    def __call__(self, latents: Float[Array, "B h w C"]) -> Array:
        x = stack.through(self.middle, self.conv_in(latents), None, self.config.remat)
        for index in reversed(range(len(self.levels))):
            x = stack.through(self.levels[index].blocks, x, None, self.config.remat)
            x = self.up[index - 1](x) if index else x
        return self.conv_out(jax.nn.silu(self.norm(x)))


class Level(nnx.Module):
    """Residual blocks of one width."""

    def __init__(
        self, before: int, width: int, count: int, config: VAEConfig, *, rngs: nnx.Rngs
    ):
        self.blocks = nnx.List(
            Block(width if index else before, width, config, rngs=rngs)
            for index in range(count)
        )


class Block(nnx.Module):
    """Two convolutions, each behind a norm and SiLU, around a residual.

    Attributes:
      shortcut: only there if the widths differ.
    """

    def __init__(self, before: int, width: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.norm1 = _norm(before, config, rngs)
        self.conv1 = _conv3(before, width, config, rngs)
        self.norm2 = _norm(width, config, rngs)
        self.conv2 = _conv3(width, width, config, rngs)
        if before != width:
            self.shortcut = basic.convolution(before, width, (1, 1), config, rngs)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w out"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class Attention(nnx.Module):
    """Attention of one head over a grid, behind a norm and around a residual."""

    def __init__(self, width: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.norm = _norm(width, config, rngs)
        self.q = basic.linear(width, width, config, rngs)
        self.k = basic.linear(width, width, config, rngs)
        self.v = basic.linear(width, width, config, rngs)
        self.proj = basic.linear(width, width, config, rngs)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        y = self.norm(x)
        heads = len(x), x.shape[1] * x.shape[2], 1, x.shape[3]
        q, k, v = (f(y).reshape(heads) for f in (self.q, self.k, self.v))
        return x + self.proj(attend(q, k, v).reshape(x.shape))


class Down(nnx.Module):
    """Halves both sides; the zeros around the grid are at its right and bottom only."""

    def __init__(self, width: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.conv = _conv3(
            width, width, config, rngs, strides=2, padding=((0, 1), (0, 1))
        )

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h/2 w/2 D"]:
        return self.conv(x)


class Up(nnx.Module):
    """Doubles both sides: every place four times, then a convolution."""

    def __init__(self, width: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.conv = _conv3(width, width, config, rngs)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B 2*h 2*w D"]:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))


def _middle(config: VAEConfig, rngs: nnx.Rngs) -> nnx.List:
    """Makes a block, attention and a block of the last width."""
    width = config.widths[-1]
    return nnx.List(
        [
            Block(width, width, config, rngs=rngs),
            Attention(width, config, rngs=rngs),
            Block(width, width, config, rngs=rngs),
        ]
    )


def _conv3(n: int, m: int, config: VAEConfig, rngs: nnx.Rngs, **options) -> nnx.Conv:
    return nnx.Conv(
        n,
        m,
        (3, 3),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
        **options,
    )


def _norm(width: int, config: VAEConfig, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(
        width,
        config.groups,
        epsilon=config.norm_eps,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where the mean is large
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def _check(x: Array, name: str, channels: int, least: int) -> None:
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"{name} are {jnp.result_type(x)}: expected floats.")
    shape = jnp.shape(x)
    if len(shape) != 4 or shape[3] != channels or min(shape[1:3]) < least:
        raise ValueError(
            f"{name} have shape {shape}: expected [B, height, width, {channels}], both "
            f"sides at least {least}."
        )
