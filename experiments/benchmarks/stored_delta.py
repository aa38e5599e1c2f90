"""SNELLA without its recompute: delta is kept for the backward pass."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from snella_jax.core.gates import sparsify
from snella_jax.nnx.layers import Adapter
from snella_jax.nnx.selection import adapted_layers
from snella_jax.nnx.surgery import become, plain_class


class Stored(nnx.Module):
    """An adapted `nnx.Linear` whose update automatic differentiation stores."""

    adapter: Adapter
    kernel: nnx.Variable
    bias: nnx.Variable | None
    dtype: Any

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... m"]:
        # Not `sparse_delta`, whose gradient is made of the factors again.
        rule, budget = self.adapter.rule, self.adapter.budget[...]
        dense = self.adapter.site.kernel.apply(self.adapter.factors())
        weight = self.kernel[...] + sparsify(dense, budget, rule.gate)
        y = jnp.asarray(x, self.dtype) @ weight.astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def keep_delta(model: nnx.Module) -> None:
    """Makes every adapted layer of `model` store its update, in place.

    Raises:
      ValueError: an adapted layer is not an `nnx.Linear`.
    """
    for path, layer in list(adapted_layers(model)):
        if plain_class(type(layer)) is not nnx.Linear:
            raise ValueError(f"{path} is no nnx.Linear.")
        become(layer, Stored)
