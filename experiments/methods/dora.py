"""DoRA (Liu et al., arXiv 2402.09353): LoRA moves directions, magnitudes train apart.

`W = m * V / ||V||`, `V = W0 + a b^T`, with one norm and one magnitude `m` for each
output (a column of our `[n, m]` kernel); `m` starts at the norms of `W0`, so that `W`
starts at `W0`. As in the paper's 4.3 the norm is a constant to the gradient. Merged, it
costs nothing at inference.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from experiments.methods import linear_layer, lora
from experiments.methods.method import Ranked
from experiments.methods.sketched import Sketched
from experiments.training.session import Scope
from snella_jax.nnx.surgery import become, mixed_class, plain_class
from snella_jax.nnx.targets import select
from snella_jax.nnx.variables import Factor
from snella_jax.ops.matmul import matmul
from snella_jax.ops.names import OUTPUTS, named


@dataclasses.dataclass(frozen=True)
class Dora(Sketched, Ranked):
    """DoRA: LoRA with magnitudes that train apart."""

    title: ClassVar[str] = "DoRA"

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model whose targeted layers are decomposed.

        Raises:
          ValueError: as `lora.branched`.
        """
        targets, trainable = scope.targets, scope.trainable
        how = trainable, self.rank, scope.rngs(), self.rows
        model = lora.branched(base, targets, *how)
        for layer in select(model, targets).values():
            kernel = layer.kernel[...].astype(jnp.float32)
            layer.magnitude = Factor(jnp.linalg.norm(kernel, axis=-2))
            become(layer, mixed_class(DoraLinear, plain_class(type(layer))))
        return model

    def merged(self, model: Any) -> Any:
        """Returns a plain copy with the composed weights."""

        def weight(layer: Any) -> Array:
            moved = layer.kernel[...] + layer.lora.product()
            return moved * layer.scale()[..., None, :]

        return linear_layer.merged(model, DoraLinear, weight, "lora", "magnitude")


class DoraLinear(linear_layer.OtherProduct):
    """Mixed into `nnx.Linear`: its weight is decomposed."""

    lora: lora.Factors
    magnitude: Factor

    def product(
        self, x: Float[Array, "... n"], dtype: DTypeLike
    ) -> Float[Array, "... m"]:
        """Returns the sum of both products, times the scales."""
        scale = self.scale().astype(dtype)
        y = matmul(x.astype(dtype), self.kernel[...].astype(dtype))
        return named(y + self.lora(x, dtype), OUTPUTS) * scale

    def scale(self) -> Float[Array, "*stack m"]:
        """Returns the magnitudes over the norms of the directions, in float32."""
        direction = self.kernel[...].astype(jnp.float32) + self.lora.product()
        norms = jax.lax.stop_gradient(jnp.linalg.norm(direction, axis=-2))
        return self.magnitude[...] / named(norms, OUTPUTS)
