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


def _states(
    tower: ClipText, tokens: Int[np.ndarray, "B T"], prompts: Sequence[str]
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
