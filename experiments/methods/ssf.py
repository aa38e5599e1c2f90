"""SSF (Lian et al., arXiv 2210.08823): a scale and a shift of every layer's output.

One scale and one shift for each output of every linear layer, norm and convolution with
a bias (which takes the shift up when merged), the head apart. The scales start around 1
and the shifts around 0 (deviation 0.02). Merged, they cost nothing at inference.
"""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.methods import kinds
from experiments.methods.method import Method
from experiments.training.session import Scope
from snella_jax.core.paths import join
from snella_jax.nnx.surgery import become, freeze, mixed_class, plain_class, thaw
from snella_jax.nnx.variables import Factor
from snella_jax.ops.names import OUTPUTS, named

LAYERS = (nnx.Linear, nnx.LayerNorm, nnx.Conv)
DEVIATION = 0.02


@dataclasses.dataclass(frozen=True)
class Ssf(Method):
    """SSF: scales and shifts of every layer's output."""

    title: ClassVar[str] = "SSF"

    lr: float = 1e-2
    """Peak learning rate."""

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model whose layers but the head's are modulated.

        Raises:
          ValueError: `scope.trainable` matches nothing, or no layer has a bias.
        """
        model = nnx.clone(base)
        layers = _layers(model)
        if not layers:
            raise ValueError(
                "SSF shifts outputs of layers with biases, which take the shifts up: a "
                f"{type(model).__name__} has none. Leave the method out."
            )
        key = scope.rngs().params()
        for index, layer in enumerate(layers):
            layer.ssf = Modulation(layer.bias.shape, jax.random.fold_in(key, index))
            become(layer, mixed_class(Modulated, type(layer)))
        freeze(model, scope.trainable)
        return model

    def merged(self, model: Any) -> Any:
        """Returns a plain copy: `(x W + b) s + t = x (W s) + (b s + t)`."""
        model = nnx.clone(model)
        modulated: list[Any] = [
            node for _, node in nnx.iter_graph(model) if isinstance(node, Modulated)
        ]
        for layer in modulated:
            scale, shift = layer.ssf.scale[...], layer.ssf.shift[...]
            weight = layer.kernel if hasattr(layer, "kernel") else layer.scale
            axes = weight[...].ndim - scale.ndim  # between the stack and the outputs
            wide = scale.reshape(*scale.shape[:-1], *[1] * axes, scale.shape[-1])
            weight[...] = weight[...] * wide.astype(weight.dtype)
            moved = layer.bias[...] * scale + shift
            layer.bias[...] = moved.astype(layer.bias.dtype)
            del layer.ssf
            become(layer, plain_class(type(layer)))
        thaw(model)
        return model


class Modulation(nnx.Module):
    """`scale [*stack, m]` and `shift [*stack, m]`."""

    def __init__(self, shape: tuple[int, ...], key: PRNGKeyArray):
        normal = DEVIATION * jax.random.normal(key, (2, *shape))
        self.scale, self.shift = Factor(1 + normal[0]), Factor(normal[1])


class Modulated(nnx.Module):
    """Mixed into a layer: scales and shifts its output."""

    ssf: Modulation
    bias: Any

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... m"]:
        y: Array = super().__call__(x)  # pyright: ignore[reportAttributeAccessIssue]
        scale, shift = self.ssf.scale[...], self.ssf.shift[...]
        if hasattr(self, "kernel"):  # a norm's output is cheap to make again
            y = named(y, OUTPUTS)
        return y * scale.astype(y.dtype) + shift.astype(y.dtype)


def _layers(model: nnx.Module) -> list[Any]:
    """Returns what is modulated, in the order of the graph."""
    return [
        node
        for path, node in nnx.iter_graph(kinds.body(model))
        if isinstance(node, LAYERS) and node.bias is not None and join(path) != "head"
    ]
