"""From prompts to what the transformer is conditioned on, by towers of texts.

`B` prompts, `S` tokens of context, `D` and `P` the widths of context and pooled state.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from snella_jax.models.sd3.clip import ClipText
from snella_jax.models.sd3.flow import Text
from snella_jax.models.sd3.t5 import T5
from snella_jax.models.sd3.tokenizers import Tokenizer

BANG = 0  # id of "!", with which bigG's texts are filled


class Encoder(Protocol):
    """Encoder of prompts."""

    def encode(self, prompts: Sequence[str]) -> Text:
        """Returns context `[B, S, D]` and pooled state `[B, P]`, float32."""
        ...


class Rows(Protocol):
    """Tokenizer that makes rows of ids."""

    def padded(
        self, texts: Sequence[str], length: int | None = None, pad: int | None = None
    ) -> Int[np.ndarray, "B length"]:
        """Returns ids of texts, filled up; see `tokenizers.Tokenizer.padded`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class OneTower:
    """Encoder of one tower of texts, whose hidden states are the context.

    Attributes:
      tower: tower of texts.
      tokenizer: makes its tokens.
    """

    tower: ClipText
    tokenizer: Rows

    def encode(self, prompts: Sequence[str]) -> Text:
        """Returns the states of `config.positions` tokens, and the pooled one.

        Raises:
          ValueError: the tokenizer gives an id that the tower has no row for.
        """
        tokens = self.tokenizer.padded(prompts, self.tower.config.positions)
        hidden, pooled = _states(self.tower, tokens, prompts)
        return _wide(hidden), _wide(pooled)


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoders:
    """Stable Diffusion 3's encoders: CLIP-L, OpenCLIP's bigG and, on request, T5.

    The context is 77 tokens of both CLIPs, side by side and filled with zeros up to
    T5's width, and then T5's tokens, or zeros in their place. The pooled state is that
    of both CLIPs, side by side.

    Attributes:
      clip_l, clip_g: towers of texts, with as many positions each.
      t5: encoder of T5; None for zeros in its place.
      clip_tokenizer: tokenizer of both CLIPs.
      t5_tokenizer: tokenizer of T5; None without T5.
      t5_length: T5's tokens: 256 in diffusers' pipeline, 77 in its training script.
      width: width of the context, T5's.
    """

    clip_l: ClipText
    clip_g: ClipText
    t5: T5 | None
    clip_tokenizer: Tokenizer
    t5_tokenizer: Tokenizer | None = None
    t5_length: int = 256
    width: int = 4096

    def __post_init__(self):
        configs = self.clip_l.config, self.clip_g.config
        lengths = [config.positions for config in configs]
        if lengths[0] != lengths[1]:
            raise ValueError(f"The CLIPs have {lengths} positions: expected as many.")
        for config in configs:
            if self.clip_tokenizer.size != config.vocab_size:
                raise ValueError(
                    f"CLIP's tokenizer has {self.clip_tokenizer.size} tokens, and the "
                    f"tower {config.vocab_size}: expected as many."
                )
        if (self.t5 is None) != (self.t5_tokenizer is None):
            raise ValueError("T5 needs its tokenizer: expected both or neither.")
        if self.t5 is not None and self.t5.config.width != self.width:
            raise ValueError(
                f"T5 is {self.t5.config.width} wide: expected width={self.width}."
            )
        both = sum(config.width for config in configs)
        if both > self.width:
            raise ValueError(f"The CLIPs are {both} wide: more than {self.width}.")
        if self.t5_length < 1:
            raise ValueError(f"t5_length={self.t5_length}: expected at least 1.")

    def encode(self, prompts: Sequence[str]) -> Text:
        """Returns context `[B, 77 + t5_length, width]` and pooled state, float32.

        Raises:
          TypeError: one prompt instead of several.
          ValueError: a prompt is no text of characters.
        """
        length = self.clip_l.config.positions
        states = [
            _states(tower, self.clip_tokenizer.padded(prompts, length, pad), prompts)
            for tower, pad in ((self.clip_l, None), (self.clip_g, BANG))
        ]
        context = jnp.concatenate([_wide(hidden) for hidden, _ in states], -1)
        rest = self.width - context.shape[-1]
        context = jnp.pad(context, ((0, 0), (0, 0), (0, rest)))
        pooled = jnp.concatenate([_wide(pooled) for _, pooled in states], -1)
        return jnp.concatenate([context, self._of_t5(prompts)], 1), pooled

    def _of_t5(self, prompts: Sequence[str]) -> Float[Array, "B t5_length width"]:
        if self.t5 is None or self.t5_tokenizer is None:
            return jnp.zeros((len(prompts), self.t5_length, self.width))
        tokens = self.t5_tokenizer.padded(prompts, self.t5_length)
        return _wide(_states(self.t5, tokens, prompts))


def _states(
    tower: ClipText | T5, tokens: Int[np.ndarray, "B T"], prompts: Sequence[str]
) -> Any:
    """Calls a tower, compiled once for each shape.

    Raises:
      ValueError: it has no row for an id.
    """
    size = tower.config.vocab_size
    for prompt, row in zip(prompts, tokens, strict=True):
        if row.max() >= size:
            raise ValueError(
                f"{prompt!r} has the id {row.max()}, and the tower {size} tokens."
            )
    graphdef, state = nnx.split(tower)
    return _called(graphdef, state, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _called(graphdef: nnx.GraphDef, state: nnx.State, tokens: Array) -> Any:
    return nnx.merge(graphdef, state)(tokens)


def _wide(x: Array) -> Float[Array, "..."]:
    return x.astype(jnp.float32)
