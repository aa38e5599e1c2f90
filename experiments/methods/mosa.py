"""MoSA (Zhang et al., arXiv 2312.02923): an adapter whose parts train in turns.

AdaptFormer's bottleneck, its up-projection split at random into parts that do not
overlap. In training one part, drawn for every MLP and batch, is active; in evaluation
all of it is. Simplified: the down-projection is shared, and the paper's hierarchical
sparsity and its loss between two passes are left out. Ours: the active part counts
times the number of parts, as dropout scales. At inference it is an AdaptFormer.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.methods import adapter, kinds
from experiments.methods.method import Ranked
from experiments.training.session import Scope
from snella_jax.nnx.surgery import become, mixed_class
from snella_jax.nnx.variables import Frozen
from snella_jax.ops.matmul import matmul
from snella_jax.ops.names import OUTPUTS, named

WHOLE = -1


@dataclasses.dataclass(frozen=True)
class Mosa(Ranked):
    """AdaptFormer's bottleneck, a part of it at a time."""

    title: ClassVar[str] = "MoSA"

    parts: int = 4
    """Parts that the up-projection is divided into."""

    def check(self, name: str) -> None:
        """Raises a `ValueError` on settings that would fail in the midst of a run."""
        super().check(name)
        if not 2 <= self.parts <= 127:
            raise ValueError(f"{name}.parts={self.parts}: expected 2 to 127.")

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model with a divided bottleneck beside every MLP.

        Raises:
          ValueError: as `adapter.bottlenecked`, or the model has no classes.
        """
        kinds.require_classes(base, "MoSA draws its parts with the key of a call")
        rngs, parts = scope.rngs(), self.parts
        how = "parallel", scope.trainable, self.rank, rngs
        model = adapter.bottlenecked(base, *how)
        nodes: list[Any] = [
            node
            for _, node in nnx.iter_graph(model)
            if isinstance(node, adapter.Bottleneck)
        ]
        for node in nodes:
            *stack, rank, width = node.up.kernel.shape
            even = (jnp.arange(rank * width) % parts).astype(jnp.int8)
            even = jnp.broadcast_to(even, (*stack, rank * width))
            key = rngs.params()
            mixed = jax.random.permutation(key, even, axis=-1, independent=True)
            node.part = Frozen(mixed.reshape(node.up.kernel.shape))
            node.active = Active(jnp.full(stack, WHOLE, jnp.int32))
            node.parts = parts
            become(node, mixed_class(Divided, type(node)))
        become(model, mixed_class(Drawing, type(model)))
        return model


class Active(nnx.Variable):
    """int32 `[*stack]`: the part that is active, or `WHOLE`."""


class Divided(nnx.Module):
    """Mixed into a bottleneck: only the active part of its up-projection counts.

    Attributes:
      part: int8 `[*stack, r, D]`: which part each weight belongs to.
    """

    part: Frozen
    active: Active
    parts: int
    down: adapter.Dense
    up: adapter.Dense

    def __call__(self, x: Float[Array, "*B D"], act: Any) -> Float[Array, "*B D"]:
        active, kernel = self.active[...], self.up.kernel[...]
        alone = jnp.where(self.part[...] == active, self.parts * kernel, 0)
        kernel = jnp.where(active == WHOLE, kernel, alone).astype(x.dtype)
        bias = self.up.bias[...].astype(x.dtype)
        return matmul(act(named(self.down(x), OUTPUTS)), kernel) + bias


class Drawing(nnx.Module):
    """Mixed into a model: draws the active parts where a key says that it trains."""

    def __call__(self, images: Array, key: PRNGKeyArray | None = None) -> Array:
        base: Any = super()
        divided = [
            node for _, node in nnx.iter_graph(self) if isinstance(node, Divided)
        ]
        for index, node in enumerate(divided):
            active = jnp.full(node.active.shape, WHOLE, jnp.int32)
            if key is not None:
                own = jax.random.fold_in(key, index)
                active = jax.random.randint(own, active.shape, 0, node.parts)
            node.active = Active(active)
        return base.__call__(images, key)
