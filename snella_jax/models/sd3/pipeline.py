"""From prompts to pictures: text encoders, transformer, sampler and VAE in one."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from snella_jax.models.layers.images import pair
from snella_jax.models.layers.stack import require_plain
from snella_jax.models.sd3 import flow
from snella_jax.models.sd3.mesh import automatic, placed, split
from snella_jax.models.sd3.mmdit import MMDiT
from snella_jax.models.sd3.text import Encoder
from snella_jax.models.sd3.vae import VAE

Prompts = str | Sequence[str] | flow.Text


class Pipeline:
    """Pictures of Stable Diffusion 3, or of another MMDiT, for prompts.

    >>> from snella_jax.models.sd3 import mmdit
    >>> sizes = {"width": 32, "depth": 2, "heads": 4, "channels": 3, "positions": 12}
    >>> config = mmdit.MMDiTConfig(**sizes, context_dim=20, pooled_dim=12)
    >>> pipeline = Pipeline(mmdit.MMDiT(config, rngs=nnx.Rngs(0)), None, None)
    >>> text = np.ones((1, 4, 20)), np.ones((1, 12))  # encoded already
    >>> empty = np.zeros((1, 4, 20)), np.zeros((1, 12))
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> pipeline(text, empty, steps=2, size=(8, 12), key=keys).shape
    (2, 8, 12, 3)

    Attributes:
      transformer: without adapters.
      vae: decoder of its latents; None if its latents are pixels in [-1, 1].
      encoders: encoder of prompts; None if they were dropped.
      shift: shift of the noise levels.
      mesh: mesh of devices; None for the devices that the weights are on.
    """

    def __init__(
        self,
        transformer: MMDiT,
        vae: VAE | None,
        encoders: Encoder | None,
        *,
        shift: float = flow.SHIFT,
        mesh: Mesh | None = None,
    ):
        """Joins components, and places the weights on a mesh.

        Args:
          transformer, vae, encoders, shift: see the attributes.
          mesh: its axes `data` and `fsdp` split a batch of pictures, its axis `tensor`
            (or `model`) the weights by their last axis and `fsdp` by the one before it,
            where they divide them; each may be missing.

        Raises:
          ValueError: the transformer has adapters (`snella.merge` it, or call
            `snella.pictures`), its latents are not those of the VAE, or the mesh has
            other axes.
        """
        require_plain(transformer)
        channels = 3 if vae is None else vae.config.latents
        if transformer.config.channels != channels:
            of = "pixels, as there is no VAE" if vae is None else "the VAE's latents"
            raise ValueError(
                f"The transformer has channels={transformer.config.channels}: expected "
                f"{channels}, those of {of}."
            )
        self.mesh = None if mesh is None else automatic(mesh)
        self.transformer = placed(transformer, self.mesh)
        self.vae = None if vae is None else placed(vae, self.mesh)
        self.encoders = encoders
        self.shift = shift

    def with_transformer(self, transformer: MMDiT) -> "Pipeline":
        """Returns a pipeline with another transformer, such as one that was merged."""
        return Pipeline(
            transformer, self.vae, self.encoders, shift=self.shift, mesh=self.mesh
        )

    def without_encoders(self) -> "Pipeline":
        """Returns a pipeline that takes encoded prompts alone, to free memory."""
        return Pipeline(
            self.transformer, self.vae, None, shift=self.shift, mesh=self.mesh
        )

    def encode(self, prompts: str | Sequence[str]) -> flow.Text:
        """Returns context `[B, S, D]` and pooled `[B, P]` of prompts.

        Raises:
          TypeError: a prompt is no string.
          ValueError: there is none, or the encoders were dropped.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        wrong = [text for text in texts if not isinstance(text, str)]
        if wrong:
            raise TypeError(f"prompts: {type(wrong[0]).__name__}, expected strings.")
        if not texts:
            raise ValueError("prompts: there is none, expected one or more.")
        if self.encoders is None:
            raise ValueError(
                "The text encoders were dropped: give what encode(prompts) returned "
                "before."
            )
        return self.encoders.encode(texts)

    def __call__(
        self,
        prompt: Prompts,
        negative: Prompts = "",
        *,
        steps: int = 28,
        guidance: float = 7.0,
        size: int | tuple[int, int] = 512,
        key: PRNGKeyArray | None = None,
        noise: Float[Array | np.ndarray, "B h w C"] | None = None,
    ) -> UInt8[Array, "B height width 3"]:
        """Draws a picture for each prompt.

        One program is compiled for each size, number of pictures and of steps. A
        picture depends on its own prompts and key alone, not on the others of its
        batch, but for rounding.

        Args:
          prompt: a text, several, or what `encode` made of them; one alone is drawn
            once for every key.
          negative: what pictures are led away from; one, or one for each picture.
          steps: steps of the sampler.
          guidance: strength of the prompt; 1 leaves `negative` out and takes half the
            time.
          size: side, or height and width, in pixels.
          key: a key, of which picture `i` gets `jax.random.fold_in(key, i)`; or an
            array of keys, one for each picture.
          noise: normal numbers to begin with, in place of a key.

        Raises:
          TypeError: a prompt is no string.
          ValueError: an argument of another shape or range, or numbers of prompts, keys
            and pictures that do not fit each other or the mesh.
        """
        if not -math.inf < guidance < math.inf:
            raise ValueError(f"guidance={guidance}: expected a number.")
        shape = self._latents(size)
        text = self._encoded("prompt", prompt)
        start = self._noise(key, noise, len(text[0]), shape)
        count = len(start)
        empty = None if guidance == 1 else self._encoded("negative", negative)
        transformer, vae = nnx.split(self.transformer), nnx.split(self.vae)
        return _drawn(
            transformer[0],
            vae[0],
            transformer[1],
            vae[1],
            split(start, self.mesh),
            self._rows("prompt", text, count),
            None if empty is None else self._rows("negative", empty, count),
            jnp.float32(guidance),
            steps=steps,
            shift=self.shift,
        )

    def _latents(self, size: int | tuple[int, int]) -> tuple[int, int, int]:
        """Returns the latents' shape for pictures of a size."""
        config = self.transformer.config
        factor = 1 if self.vae is None else self.vae.factor
        least, most = factor * config.patch, factor * config.patch * config.positions
        height, width = pair(size)
        if any(side % least or not 0 < side <= most for side in (height, width)):
            raise ValueError(
                f"size={size!r}: expected multiples of {least}, up to {most}."
            )
        return height // factor, width // factor, config.channels

    @staticmethod
    def _noise(key: Any, noise: Any, prompts: int, shape: tuple[int, ...]) -> Any:
        """Returns the noise that was given, or draws it."""
        if (key is None) == (noise is None):
            raise ValueError("Expected either a key or noise.")
        if noise is None:
            return _normal(_keys(key, prompts), shape)
        if noise.shape[1:] != shape:
            raise ValueError(
                f"noise has shape {noise.shape}: expected [B, {str(shape)[1:-1]}]."
            )
        return noise

    def _encoded(self, name: str, prompts: Any) -> Any:
        """Encodes texts; returns them, or what is encoded already, on the host."""
        texts = isinstance(prompts, str) or not any(
            isinstance(part, np.ndarray | Array) for part in prompts
        )
        context, pooled = map(np.asarray, self.encode(prompts) if texts else prompts)
        config = self.transformer.config
        known = context.ndim == 3 and context.shape[-1] == config.context_dim
        if not known or pooled.shape != (len(context), config.pooled_dim):
            raise ValueError(
                f"{name}: context {context.shape} and pooled {pooled.shape}, expected "
                f"[B, S, {config.context_dim}] and [B, {config.pooled_dim}]."
            )
        return context, pooled

    def _rows(self, name: str, text: flow.Text, count: int) -> Any:
        """Returns encoded prompts with a row for each picture."""
        if len(text[0]) not in (1, count):
            raise ValueError(
                f"{name}: {len(text[0])} for {count} pictures, expected one or {count}."
            )
        both = tuple(np.broadcast_to(rows, (count, *rows.shape[1:])) for rows in text)
        return split(both, self.mesh)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("steps", "shift"))
def _drawn(
    transformer: nnx.GraphDef,
    vae: nnx.GraphDef,
    transformer_state: nnx.State,
    vae_state: nnx.State,
    noise: Float[Array, "B h w C"],
    text: flow.Text,
    empty: flow.Text | None,
    guidance: Float[Array, ""],
    *,
    steps: int,
    shift: float,
) -> UInt8[Array, "B height width 3"]:
    """Samples latents and decodes them."""
    model: Any = nnx.merge(transformer, transformer_state)
    decoder: Any = nnx.merge(vae, vae_state)
    latents = flow.sample(
        model, noise, *text, empty, steps=steps, guidance=guidance, shift=shift
    )
    if decoder is not None:
        latents = decoder.decode(latents / decoder.scale + decoder.shift)
    return jnp.round((latents / 2 + 0.5).clip(0, 1) * 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=1)
def _normal(keys: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "B h w C"]:
    """Draws normal numbers for each key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def _keys(key: Any, prompts: int) -> PRNGKeyArray:
    """Returns a key for each picture."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim > 1 or (key.ndim and prompts not in (1, len(key))):
        raise ValueError(
            f"key has shape {key.shape} for {prompts} prompts: expected one key, or "
            "one for each."
        )
    if key.ndim:
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(prompts))
