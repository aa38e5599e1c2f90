"""Bottlenecks after or beside every MLP; they stay at inference.

Adapter-r (Houlsby et al., arXiv 1902.00751, placed as by Pfeiffer et al., arXiv
2005.00247): `y + up(gelu(down(y)))` of the MLP's output `y`. AdaptFormer-r (Chen et
al., arXiv 2205.13535): `mlp(x) + 0.1 up(relu(down(x)))` of its input. `up` starts at 0,
`down` as `kaiming_uniform(sqrt(5))`: uniform in +-1/sqrt(width). Both are part of the
MLP's branch: a block that scales its branches (LayerScale: DINOv2, ConvNeXt) scales
them, too, which the models of the two papers do not have. At a decoder's MLPs they are
the series and the parallel adapters of Hu et al. (arXiv 2304.01933).
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.methods import kinds
from experiments.methods.method import Ranked
from experiments.training.session import Scope
from snella_jax.models.layers.basic import MLP
from snella_jax.models.llama.model import SwiGLU
from snella_jax.nnx.surgery import become, freeze, mixed_class
from snella_jax.nnx.variables import Factor
from snella_jax.ops.matmul import matmul
from snella_jax.ops.names import OUTPUTS, named

SCALE = 0.1
Where = Literal["sequential", "parallel"]


@dataclasses.dataclass(frozen=True)
class Adapter(Ranked):
    """A bottleneck after every MLP."""

    title: ClassVar[str] = "Adapter"
    where: ClassVar[Where] = "sequential"

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model with bottlenecks; raises as `bottlenecked`."""
        how = self.where, scope.trainable, self.rank, scope.rngs()
        return bottlenecked(base, *how)


@dataclasses.dataclass(frozen=True)
class AdaptFormer(Adapter):
    """A bottleneck beside every MLP."""

    title: ClassVar[str] = "AdaptFormer"
    where: ClassVar[Where] = "parallel"


class Dense(nnx.Module):
    """`x @ kernel [*stack, n, m] + bias [*stack, m]`."""

    def __init__(self, kernel: Float[Array, "*stack n m"]):
        self.kernel = Factor(kernel)
        self.bias = Factor(jnp.zeros((*kernel.shape[:-2], kernel.shape[-1])))

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... m"]:
        kernel, bias = (p[...].astype(x.dtype) for p in (self.kernel, self.bias))
        return matmul(x, kernel) + bias


class Bottleneck(nnx.Module):
    """`up(act(down(x)))`, of a rank."""

    def __init__(
        self, stack: tuple[int, ...], width: int, rank: int, key: PRNGKeyArray
    ):
        bound = width**-0.5
        down = jax.random.uniform(key, (*stack, width, rank), None, -bound, bound)
        self.down, self.up = Dense(down), Dense(jnp.zeros((*stack, rank, width)))

    def __call__(self, x: Float[Array, "*B D"], act: Any) -> Float[Array, "*B D"]:
        return self.up(act(named(self.down(x), OUTPUTS)))


class Sequential(nnx.Module):
    """Mixed into an MLP: the bottleneck follows it."""

    bottleneck: Bottleneck

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y: Array = super().__call__(x)  # pyright: ignore[reportAttributeAccessIssue]
        y = named(y, OUTPUTS)
        return y + self.bottleneck(y, jax.nn.gelu)


class Parallel(nnx.Module):
    """Mixed into an MLP: the bottleneck stands beside it."""

    bottleneck: Bottleneck

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y: Array = super().__call__(x)  # pyright: ignore[reportAttributeAccessIssue]
        return y + SCALE * self.bottleneck(x, jax.nn.relu)


def bottlenecked(
    model: nnx.Module,
    where: Where,
    trainable: str,
    rank: int,
    rngs: nnx.Rngs,
) -> Any:
    """Returns a copy of a model with a bottleneck at every MLP.

    Raises:
      ValueError: a rank below 1, a model without MLPs, or a `trainable` that matches
        nothing.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: expected at least 1.")
    model = nnx.clone(model)
    key = rngs.params()
    mlps: list[Any] = [
        node
        for _, node in nnx.iter_graph(kinds.body(model))
        if isinstance(node, MLP | SwiGLU)
    ]
    if not mlps:
        raise ValueError(
            f"A {type(model).__name__} has no MLP of snella_jax.models.layers, beside "
            "which bottlenecks stand. Leave the method out."
        )
    for index, mlp in enumerate(mlps):
        join(mlp, where, rank, jax.random.fold_in(key, index))
    freeze(model, trainable)
    return model


def join(mlp: Any, where: Where, rank: int, key: PRNGKeyArray) -> None:
    """Gives an MLP, or a stack of them, a bottleneck, in place."""
    first = mlp.fc1 if hasattr(mlp, "fc1") else mlp.gate
    *stack, width, _ = first.kernel.shape
    mlp.bottleneck = Bottleneck(tuple(stack), width, rank, key)
    mixin = Sequential if where == "sequential" else Parallel
    become(mlp, mixed_class(mixin, type(mlp)))
