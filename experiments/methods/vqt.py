"""VQT (Tu et al., arXiv 2212.03220): queries of their own read every block.

Learnt tokens join the queries of every block's attention and nothing else, so that the
image's tokens stay what they are and no gradient goes back through the blocks. What
becomes of them behind the block's MLP goes to the head, beside what it saw before.
Simplified: one linear head, without the paper's selection of its inputs, which pass
the model's last norm first. At inference the queries and the wide head stay.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from experiments.methods import plain_vit
from experiments.methods.prompts import Tokens, behind, drawn
from experiments.training.session import Scope
from snella_jax.models.layers.memory import STREAM
from snella_jax.nnx.surgery import become, freeze, mixed_class
from snella_jax.nnx.variables import Factor
from snella_jax.ops.names import named


@dataclasses.dataclass(frozen=True)
class Vqt(Tokens):
    """Learnt queries that read every block."""

    title: ClassVar[str] = "VQT"

    count: int = 1
    """Number of queries in each block."""

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a ViT with queries in each block; they and the head train.

        Raises:
          ValueError: the model is no ViT.
        """
        plain_vit.require(base, "VQT")
        read, rngs = nnx.clone(base), scope.rngs()
        c = read.config
        read.room = c.depth * self.count
        shape = (c.depth, self.count) if c.stacked else (self.count,)
        for block in [read.blocks] if c.stacked else read.blocks:
            block.room = read.room
            block.queries = drawn(c, shape, rngs.params())
            become(block, mixed_class(Queried, type(block)))
        zeros = nnx.initializers.zeros_init()
        read.head = nnx.Linear(
            (1 + read.room) * c.width,
            c.num_classes,
            kernel_init=zeros,
            dtype=c.dtype,
            rngs=rngs,
        )
        become(read, mixed_class(Read, type(read)))
        freeze(read, "head")
        return read


class Queried(nnx.Module):
    """Mixed into a block: behind the image's tokens stands what queries found.

    Attributes:
      queries: `[*stack, P, D]`.
      room: tokens behind the image's: those of all blocks, the newest last.
    """

    queries: Factor
    room: int

    def __call__(self, x: Float[Array, "B T D"], drop: Any = None) -> Array:
        block: Any = super()
        # Nothing that trains is behind the image's tokens.
        tokens = jax.lax.stop_gradient(x[:, : -self.room])
        read = self._read(tokens)
        older = x[:, tokens.shape[1] + read.shape[1] :]
        return jnp.concatenate([block.__call__(tokens, drop), older, read], 1)

    def _read(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B P D"]:
        block: Any = self
        x = behind(tokens[:, :0], self.queries[...])
        y = block.attn(block.norm1(x), block.norm1(tokens))
        x = named(x + block._branch(y, "scale1", None, 0), STREAM)
        return x + block._branch(block.mlp(block.norm2(x)), "scale2", None, 1)


class Read(nnx.Module):
    """Mixed into a ViT: its head sees what the blocks' queries found, too."""

    room: int

    def _embed(self, images: Array) -> Array:
        tokens = super()._embed(images)  # pyright: ignore[reportAttributeAccessIssue]
        return jnp.pad(tokens, ((0, 0), (0, self.room), (0, 0)))

    def attention_maps(self, images: Array, *, layers: tuple[int, ...]) -> Any:
        """Not implemented: the image's tokens attend as the base's do."""
        raise NotImplementedError("VQT's tokens attend as the base's: ask that one.")

    def pool(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B D_all"]:
        """The image's own and all that was found, side by side."""
        base: Any = super()
        found = tokens[:, -self.room :].reshape(len(tokens), -1)
        return jnp.concatenate([base.pool(tokens[:, : -self.room]), found], -1)
