"""LoRA (Hu et al., arXiv 2106.09685): `y = x W0 + (x a) b^T`, of rank `r`.

`a` starts uniform in +-1/sqrt(n r), where PEFT has +-1/sqrt(n), `b` at 0, and the scale
alpha / r is 1: SNELLA's linear kernel without a threshold, computed the cheap way,
without the n x m product. Merged, it costs nothing at inference.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.methods.sparse import linear_layers
from snella_jax.nnx.surgery import become, freeze, mixed_class, plain_class, thaw
from snella_jax.nnx.variables import Factor
from snella_jax.ops.matmul import matmul


class Factors(nnx.Module):
    """`a [*stack, n, r]` and `b [*stack, m, r]`."""

    def __init__(self, kernel: nnx.Variable, rank: int, key: PRNGKeyArray):
        *stack, n, m = kernel.shape
        bound = (n * rank) ** -0.5
        self.a = Factor(jax.random.uniform(key, (*stack, n, rank), None, -bound, bound))
        self.b = Factor(jnp.zeros((*stack, m, rank)))

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... m"]:
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        return matmul(matmul(x, a), b.T)


class Lora(nnx.Module):
    """Mixed into `nnx.Linear`: adds the low-rank branch to its output."""

    lora: Factors
    kernel: nnx.Variable
    dtype: Any

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... m"]:
        base = super().__call__  # pyright: ignore[reportAttributeAccessIssue]
        if self.kernel.dtype != (self.dtype or self.kernel.dtype):
            base = jax.checkpoint(base)  # else the cast weight is kept, a copy of it
        y: Array = base(x)
        return y + self.lora(x.astype(y.dtype))


def adapt(
    model: nnx.Module,
    targets: str,
    trainable: str,
    rank: int,
    rngs: nnx.Rngs,
) -> Any:
    """A copy of `model` whose targeted `nnx.Linear` layers have a low-rank branch.

    Only the branches and what `trainable` matches train.

    Raises:
      ValueError: a regex that matches nothing, or a target that is no `nnx.Linear`.
    """
    model = nnx.clone(model)
    key = rngs.params()
    for index, layer in enumerate(linear_layers(model, targets).values()):
        join(layer, rank, jax.random.fold_in(key, index))
    freeze(model, trainable)
    return model


def join(layer: Any, rank: int, key: PRNGKeyArray) -> None:
    """Gives an `nnx.Linear` a low-rank branch, in place."""
    layer.lora = Factors(layer.kernel, rank, key)
    become(layer, mixed_class(Lora, type(layer)))


def merge(model: Any) -> Any:
    """A plain copy with the branches added to the kernels."""
    model = nnx.clone(model)
    layers: list[Any] = [x for _, x in nnx.iter_graph(model) if isinstance(x, Lora)]
    for layer in layers:
        kernel, a, b = layer.kernel[...], layer.lora.a[...], layer.lora.b[...]
        moved = kernel + jnp.einsum("...nr,...mr->...nm", a, b)
        layer.kernel[...] = moved.astype(kernel.dtype)
        del layer.lora
        become(layer, plain_class(type(layer)))
    thaw(model)
    return model
