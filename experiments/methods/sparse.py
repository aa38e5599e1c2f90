"""Single weights that train: values at fixed places of a frozen kernel.

`W = W0 + values at places`: as in a gradient under a mask, but only the values have an
optimizer's state. The summed weight is made again in the backward pass. Merged, it
costs nothing at inference.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from experiments.methods import linear_layer
from snella_jax.nnx.surgery import become, mixed_class
from snella_jax.nnx.variables import Factor, Frozen
from snella_jax.ops.matmul import matmul


class Weights(nnx.Module):
    """`values [*stack, k]` at the flat `places [*stack, k]`, int32, of a kernel."""

    def __init__(self, places: Int[np.ndarray, "*stack k"]):
        self.places = Frozen(jnp.asarray(places, jnp.int32))
        self.values = Factor(jnp.zeros(places.shape))


class Sparse(linear_layer.OtherProduct):
    """Mixed into `nnx.Linear`: adds the values to its kernel."""

    sparse: Weights

    def product(
        self, x: Float[Array, "... n"], dtype: DTypeLike
    ) -> Float[Array, "... m"]:
        """Returns `x @ (kernel + values)`; the sum is not kept for the way back."""
        places = self.sparse.places[...]

        @jax.checkpoint
        def op(x: Array, kernel: Array, values: Array) -> Array:
            return matmul(x, _added(kernel, places, values).astype(x.dtype))

        return op(x.astype(dtype), self.kernel[...], self.sparse.values[...])


def loosen(layer: Any, places: Int[np.ndarray, "*stack k"]) -> None:
    """Makes an `nnx.Linear` one whose weights at some flat places train, in place."""
    layer.sparse = Weights(places)
    become(layer, mixed_class(Sparse, type(layer)))


def merge(model: Any) -> Any:
    """Returns a plain copy with the values added."""

    def weight(layer: Any) -> Array:
        add = _added
        for _ in layer.kernel.shape[:-2]:
            add = jax.vmap(add)
        own = layer.sparse
        return add(layer.kernel[...], own.places[...], own.values[...])

    return linear_layer.merged(model, Sparse, weight, "sparse")


def _added(kernel: Array, places: Array, values: Array) -> Array:
    flat = kernel.astype(jnp.promote_types(kernel.dtype, values.dtype)).reshape(-1)
    return flat.at[places].add(values, unique_indices=True).reshape(kernel.shape)
