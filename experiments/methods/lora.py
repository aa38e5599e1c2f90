"""LoRA (Hu et al., arXiv 2106.09685): `y = x W0 + (x a) b^T`, of rank `r`.

`a` starts uniform in +-1/sqrt(n r), where PEFT has +-1/sqrt(n), `b` at 0, and the scale
alpha / r is 1: SNELLA's linear kernel without a threshold, computed the cheap way,
without the n x m product. Merged, it costs nothing at inference.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from experiments.methods import linear_layer
from experiments.methods.method import Ranked
from experiments.methods.sketched import Rows, Sketched
from experiments.training.session import Scope
from snella_jax.core.budgets import FIXED
from snella_jax.core.config import Rule
from snella_jax.nnx.adapt import attach
from snella_jax.nnx.surgery import become, freeze, mixed_class, plain_class
from snella_jax.nnx.targets import targets_of
from snella_jax.nnx.variables import Factor
from snella_jax.ops.matmul import matmul
from snella_jax.ops.names import OUTPUTS, named
from snella_jax.ops.sketch import EVERY_ROW, Sketch


@dataclasses.dataclass(frozen=True)
class Lora(Sketched, Ranked):
    """LoRA: two factors beside every targeted matrix."""

    title: ClassVar[str] = "LoRA"
    low_rank: ClassVar[bool] = True

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model with low-rank branches; raises as `branched`."""
        how = scope.trainable, self.rank, scope.rngs(), self.rows
        return branched(base, scope.targets, *how)

    def merged(self, model: Any) -> Any:
        """Returns a plain copy with the branches added to the kernels."""
        return merge(model)

    def adapter(self, model: Any) -> Any:
        """Returns the model with its branches as adapters of the library."""
        return as_adapters(model)


class Factors(nnx.Module):
    """`a [*stack, n, r]` and `b [*stack, m, r]`, and the rows for `a` if sketched."""

    def __init__(
        self,
        kernel: nnx.Variable,
        rank: int,
        key: PRNGKeyArray,
        sketch: Sketch = EVERY_ROW,
    ):
        *stack, n, m = kernel.shape
        bound = (n * rank) ** -0.5
        self.a = Factor(jax.random.uniform(key, (*stack, n, rank), None, -bound, bound))
        self.b = Factor(jnp.zeros((*stack, m, rank)))
        self.rows = Rows(sketch, tuple(stack)) if sketch.factor > 1 else None

    def __call__(
        self, x: Float[Array, "... n"], dtype: DTypeLike
    ) -> Float[Array, "... m"]:
        """Returns `(x a) b^T`, computed in a dtype."""
        a, b = self.a[...].astype(dtype), self.b[...].astype(dtype)
        if self.rows is None:
            narrow = matmul(x.astype(dtype), a)
        else:
            narrow = self.rows.product(x, a)
        return matmul(named(narrow, OUTPUTS), b.T)

    def product(self) -> Float[Array, "*stack n m"]:
        """Returns `a b^T`."""
        return jnp.einsum("...nr,...mr->...nm", self.a[...], self.b[...])


class LoraLinear(nnx.Module):
    """Mixed into `nnx.Linear`: adds the low-rank branch to its output."""

    lora: Factors
    kernel: nnx.Variable
    dtype: Any

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... m"]:
        base = super().__call__  # pyright: ignore[reportAttributeAccessIssue]
        if self.kernel.dtype != (self.dtype or self.kernel.dtype):
            base = jax.checkpoint(base)  # else the cast weight is kept, a copy of it
        y: Array = base(x)
        return y + self.lora(x, y.dtype)


def branched(
    model: nnx.Module,
    targets: str,
    trainable: str,
    rank: int,
    rngs: nnx.Rngs,
    sketch: Sketch = EVERY_ROW,
) -> Any:
    """Returns a copy of a model whose targeted layers have a low-rank branch.

    Only the branches and what `trainable` matches train.

    Raises:
      ValueError: a regex that matches nothing, or a target that is no `nnx.Linear`.
    """
    model = nnx.clone(model)
    key = rngs.params()
    layers = linear_layer.linear_layers(model, targets)
    for index, layer in enumerate(layers.values()):
        join(layer, rank, jax.random.fold_in(key, index), sketch)
    freeze(model, trainable)
    return model


def join(layer: Any, rank: int, key: PRNGKeyArray, sketch: Sketch = EVERY_ROW) -> None:
    """Gives an `nnx.Linear` a low-rank branch, in place."""
    layer.lora = Factors(layer.kernel, rank, key, sketch)
    become(layer, mixed_class(LoraLinear, type(layer)))


def as_adapters(model: Any) -> Any:
    """Returns a copy whose branches are adapters: SNELLA's linear kernel without gate.

    With the same factors, and the same that trains besides.
    """
    model = nnx.clone(model)
    branches = {}
    for path, layer in list(nnx.iter_graph(model)):
        if isinstance(layer, LoraLinear):
            branches["/".join(map(str, path))] = layer.lora
            del layer.lora
            become(layer, plain_class(type(layer)))
    targets = targets_of(model)
    sites, starts = {}, {}
    for path, own in branches.items():
        a, b = own.a[...], own.b[...]
        rule = Rule(rank=a.shape[-1], kernel="linear", gate="none")
        site = sites[path] = targets[path].site(path, rule, must_move=False)
        counts = (np.full(site.lead, n, np.int32) for n in (site.capacity, FIXED))
        starts[path] = ({"a": a[..., None, :, :], "b": b[..., None, :, :]}, *counts)
    attach(model, {path: targets[path] for path in sites}, sites, starts)
    return model


def merge(model: Any) -> Any:
    """Returns a plain copy with the branches added to the kernels."""

    def weight(layer: Any) -> Array:
        return layer.kernel[...] + layer.lora.product()

    return linear_layer.merged(model, LoraLinear, weight, "lora")
