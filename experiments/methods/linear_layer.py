"""Selection and merging of changed `nnx.Linear` layers, for several methods."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from snella_jax.nnx.surgery import become, plain_class, thaw
from snella_jax.nnx.targets import select


class OtherProduct(nnx.Module):
    """Mixed into `nnx.Linear`: a product of one's own in the place of `x @ kernel`."""

    kernel: nnx.Variable
    bias: nnx.Variable | None
    dtype: Any

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... m"]:
        dtype = self.dtype or jnp.result_type(x, self.kernel[...])
        y = self.product(x, dtype)
        return y if self.bias is None else y + self.bias[...].astype(dtype)

    def product(
        self, x: Float[Array, "... n"], dtype: DTypeLike
    ) -> Float[Array, "... m"]:
        """Returns the output before the bias.

        Args:
          x: the input as it was given.
          dtype: dtype to compute in.
        """
        raise NotImplementedError


def linear_layers(model: nnx.Module, targets: str) -> dict[str, Any]:
    """Returns the `nnx.Linear` layers that a regex matches, by path.

    Raises:
      ValueError: it matches nothing, or another layer.
    """
    layers = select(model, targets)
    other = [path for path, x in layers.items() if not isinstance(x, nnx.Linear)]
    if other:
        raise ValueError(f"{', '.join(other)}: expected nnx.Linear layers alone.")
    return layers


def merged(model: Any, mixin: type, weight: Callable[[Any], Array], *parts: str) -> Any:
    """Returns a copy whose layers with a mixin are plain ones again, and thawed.

    Args:
      model: the adapted model.
      mixin: class that `mixed_class` made the layers of.
      weight: kernel of the plain layer, as a function of the adapted one.
      parts: attributes that the mixin has added.
    """
    model = nnx.clone(model)
    layers: list[Any] = [x for _, x in nnx.iter_graph(model) if isinstance(x, mixin)]
    for layer in layers:
        layer.kernel[...] = weight(layer).astype(layer.kernel.dtype)
        for part in parts:
            delattr(layer, part)
        become(layer, plain_class(type(layer)))
    thaw(model)
    return model
