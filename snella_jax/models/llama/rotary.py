"""Rotary position embeddings (Su et al., arXiv 2104.09864) of the LLaMAs.

Feature `i` of a head forms a pair with feature `i + d / 2` ("half split", as in
Hugging Face's files); Meta's files and GGUF pair `2 i` with `2 i + 1`, so the rows of
their q and k are permuted when they are read.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Frequencies of LLaMA 3.1 and later, for texts longer than those trained on.

    Wavelengths above `original_context / low_factor` become `factor` times as long,
    those below `original_context / high_factor` stay, those between are interpolated.

    Attributes:
      factor: 8 in LLaMA 3.1, 32 in 3.2.
      low_factor: `low_freq_factor` in transformers.
      high_factor: `high_freq_factor` there.
      original_context: `original_max_position_embeddings` there, in tokens.

    Source: rope type `llama3` of transformers (`modeling_rope_utils`).
    """

    factor: float
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value}: expected a positive number.")
        if self.low_factor >= self.high_factor:
            raise ValueError(
                f"low_factor={self.low_factor}: expected less than "
                f"high_factor={self.high_factor}."
            )

    def scaled(self, frequencies: Float[np.ndarray, " d"]) -> Float[np.ndarray, " d"]:
        """Scales inverse frequencies, in float32."""
        waves = np.float32(2 * math.pi) / frequencies
        low, high = self.low_factor, self.high_factor
        share = (np.float32(self.original_context) / waves - low) / (high - low)
        slow = frequencies / np.float32(self.factor)
        between = (1 - share) * slow + share * frequencies
        long = waves > self.original_context / low
        short = waves < self.original_context / high
        return np.where(short, frequencies, np.where(long, slow, between))


class Rotation(NamedTuple):
    """Cosines and sines of the angles of every token, float32 `[B, T, d / 2]`."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]

    def __call__(self, x: Float[Array, "B T H d"]) -> Float[Array, "B T H d"]:
        """Rotates queries or keys, in float32."""
        first, second = jnp.split(x.astype(jnp.float32), 2, -1)
        cos, sin = self.cos[:, :, None], self.sin[:, :, None]
        turned = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(turned, -1).astype(x.dtype)


def inverse_frequencies(
    head_dim: int, theta: float, scaling: Llama3Scaling | None = None
) -> Float[np.ndarray, " half"]:
    """Computes `1 / theta ** (2 i / d)` in float32, scaled.

    Written so: `theta ** (-2 i / d)` rounds otherwise, and the angles differ by 5e-4 at
    position 9000.

    >>> inverse_frequencies(4, 10_000.0).tolist()
    [1.0, 0.009999999776482582]
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents
    return frequencies if scaling is None else scaling.scaled(frequencies)


def rotation(
    positions: Int[Array, "B T"], frequencies: Float[np.ndarray, " half"]
) -> Rotation:
    """Returns the rotation of tokens at these positions."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))
