"""DoRA (Liu et al., arXiv 2402.09353): LoRA moves directions, magnitudes train apart.

`W = m * V / ||V||`, `V = W0 + a b^T`, with one norm and one magnitude `m` for each
output (a column of our `[n, m]` kernel); `m` starts at the norms of `W0`, so that `W`
starts at `W0`. As in the paper's 4.3 the norm is a constant to the gradient. Merged, it
costs nothing at inference.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from experiments.methods import lora
from snella_jax.nnx.surgery import become, mixed_class, plain_class, thaw
from snella_jax.nnx.targets import select
from snella_jax.nnx.variables import Factor
from snella_jax.ops.matmul import matmul


class Dora(nnx.Module):
    """Mixed into `nnx.Linear`: its weight is decomposed."""

    lora: lora.Factors
    magnitude: Factor
    kernel: nnx.Variable
    bias: nnx.Variable | None
    dtype: Any

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... m"]:
        dtype = self.dtype or jnp.result_type(x, self.kernel[...])
        a, b = self.lora.a[...], self.lora.b[...]
        scale = (self.magnitude[...] / _norms(self.kernel[...], a, b)).astype(dtype)
        x = x.astype(dtype)
        y = matmul(x, self.kernel[...].astype(dtype))
        y = (y + matmul(matmul(x, a.astype(dtype)), b.astype(dtype).T)) * scale
        return y if self.bias is None else y + self.bias[...].astype(dtype)


def adapt(
    model: nnx.Module, targets: str, trainable: str, rank: int, rngs: nnx.Rngs
) -> Any:
    """A copy of `model` whose targeted `nnx.Linear` layers are decomposed.

    Raises:
      ValueError: as `lora.adapt`.
    """
    model = lora.adapt(model, targets, trainable, rank, rngs)
    for layer in select(model, targets).values():
        kernel = layer.kernel[...].astype(jnp.float32)
        layer.magnitude = Factor(jnp.linalg.norm(kernel, axis=-2))
        become(layer, mixed_class(Dora, plain_class(type(layer))))
    return model


def merge(model: Any) -> Any:
    """A plain copy with the composed weights."""
    model = nnx.clone(model)
    layers: list[Any] = [x for _, x in nnx.iter_graph(model) if isinstance(x, Dora)]
    for layer in layers:
        a, b = layer.lora.a[...], layer.lora.b[...]
        kernel = layer.kernel[...]
        scale = (layer.magnitude[...] / _norms(kernel, a, b))[..., None, :]
        moved = (kernel + jnp.einsum("...nr,...mr->...nm", a, b)) * scale
        layer.kernel[...] = moved.astype(kernel.dtype)
        del layer.lora, layer.magnitude
        become(layer, plain_class(type(layer)))
    thaw(model)
    return model


def _norms(kernel: Array, a: Array, b: Array) -> Float[Array, "... m"]:
    direction = kernel.astype(jnp.float32) + jnp.einsum("...nr,...mr->...nm", a, b)
    return jax.lax.stop_gradient(jnp.linalg.norm(direction, axis=-2))
