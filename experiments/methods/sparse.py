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
from jaxtyping import Array, Float, Int

from snella_jax.nnx.surgery import become, mixed_class, plain_class, thaw
from snella_jax.nnx.targets import select
from snella_jax.nnx.variables import Factor, Frozen
from snella_jax.ops.matmul import matmul


class Weights(nnx.Module):
    """`values [*stack, k]` at the flat `places [*stack, k]`, int32, of a kernel."""

    def __init__(self, places: Int[np.ndarray, "*stack k"]):
        self.places = Frozen(jnp.asarray(places, jnp.int32))
        self.values = Factor(jnp.zeros(places.shape))


class Sparse(nnx.Module):
    """Mixed into `nnx.Linear`: adds the values to its kernel."""

    sparse: Weights
    kernel: nnx.Variable
    bias: nnx.Variable | None
    dtype: Any

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... m"]:
        dtype = self.dtype or jnp.result_type(x, self.kernel[...])
        places = self.sparse.places[...]

        @jax.checkpoint
        def op(x: Array, kernel: Array, values: Array) -> Array:
            return matmul(x, _added(kernel, places, values).astype(dtype))

        y = op(x.astype(dtype), self.kernel[...], self.sparse.values[...])
        return y if self.bias is None else y + self.bias[...].astype(dtype)


def linear_layers(model: nnx.Module, targets: str) -> dict[str, Any]:
    """The `nnx.Linear` layers that a regex matches, by path.

    Raises:
      ValueError: it matches nothing, or another layer.
    """
    layers = select(model, targets)
    other = [path for path, x in layers.items() if not isinstance(x, nnx.Linear)]
    if other:
        raise ValueError(f"{', '.join(other)}: expected nnx.Linear layers alone.")
    return layers


def loosen(layer: Any, places: Int[np.ndarray, "*stack k"]) -> None:
    """Makes an `nnx.Linear` one whose weights at some flat places train, in place."""
    layer.sparse = Weights(places)
    become(layer, mixed_class(Sparse, type(layer)))


def merge(model: Any) -> Any:
    """A plain copy with the values added."""
    model = nnx.clone(model)
    layers: list[Any] = [x for _, x in nnx.iter_graph(model) if isinstance(x, Sparse)]
    for layer in layers:
        add = _added
        for _ in layer.kernel.shape[:-2]:
            add = jax.vmap(add)
        kernel, own = layer.kernel[...], layer.sparse
        moved = add(kernel, own.places[...], own.values[...])
        layer.kernel[...] = moved.astype(kernel.dtype)
        del layer.sparse
        become(layer, plain_class(type(layer)))
    thaw(model)
    return model


def _added(kernel: Array, places: Array, values: Array) -> Array:
    flat = kernel.astype(jnp.promote_types(kernel.dtype, values.dtype)).reshape(-1)
    return flat.at[places].add(values, unique_indices=True).reshape(kernel.shape)
