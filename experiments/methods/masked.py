"""Kernelized factors under a mask that is fixed beforehand (the paper's Table XVII).

`y = x (W0 + M * kernel(a, b))`: what competition decides while SNELLA trains, SPT's
sensitivity decides before it: `M` has the targeted weights whose squared gradients,
summed over the training images, are the largest of all. A mask takes a byte a weight;
the update is recomputed on the way back. Merged, it costs nothing at inference;
locating costs the gradient of every targeted kernel once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from experiments.methods.first_stage import Places
from experiments.methods.sparse import linear_layers
from snella_jax.kernels import Factors, Kernel
from snella_jax.nnx.surgery import become, freeze, mixed_class, plain_class, thaw
from snella_jax.nnx.variables import Factor, Frozen
from snella_jax.ops.matmul import matmul


class Update(nnx.Module):
    """A kernel's factors, stacked like `mask [*stack n m]`."""

    def __init__(
        self,
        kernel: Kernel,
        mask: Bool[np.ndarray, "*stack n m"],
        rank: int,
        key: PRNGKeyArray,
    ):
        *stack, n, m = mask.shape

        def init(key: PRNGKeyArray) -> Factors:
            return kernel.init(key, (n, m), rank)

        for _ in stack:
            init = jax.vmap(init)
        factors = init(jax.random.split(key, tuple(stack)) if stack else key)
        for name, value in factors.items():
            setattr(self, name, Factor(value))
        self.kernel, self.names = kernel, tuple(factors)
        self.mask = Frozen(jnp.asarray(mask))

    def factors(self) -> Factors:
        """Those of all matrices of the stack."""
        return {name: getattr(self, name)[...] for name in self.names}


class MaskedLinear(nnx.Module):
    """Mixed into `nnx.Linear`: adds the masked update to its kernel."""

    update: Update
    kernel: nnx.Variable
    bias: nnx.Variable | None
    dtype: Any

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... m"]:
        dtype = self.dtype or jnp.result_type(x, self.kernel[...])
        own = self.update

        @jax.checkpoint
        def op(x: Array, kernel: Array, factors: Factors, mask: Array) -> Array:
            moved = kernel + _delta(own.kernel, factors, mask)
            return matmul(x, moved.astype(dtype))

        operands = self.kernel[...], own.factors(), own.mask[...]
        y = op(x.astype(dtype), *operands)
        return y if self.bias is None else y + self.bias[...].astype(dtype)


def adapt(
    model: nnx.Module,
    masks: Places,
    trainable: str,
    kernel: Kernel,
    rank: int,
    rngs: nnx.Rngs,
) -> Any:
    """A copy of `model` whose targeted `nnx.Linear` kernels move where a mask allows.

    Args:
      model: not adapted.
      masks: of `locate.top`.
      trainable: regex of what trains besides.
      kernel: makes the update.
      rank: columns of its factors.

    Raises:
      ValueError: `trainable` matches nothing, or a target is no `nnx.Linear`.
    """
    model = nnx.clone(model)
    key = rngs.params()
    layers = linear_layers(model, "|".join(masks))
    for index, (path, layer) in enumerate(layers.items()):
        own = jax.random.fold_in(key, index)
        layer.update = Update(kernel, masks[path], rank, own)
        become(layer, mixed_class(MaskedLinear, type(layer)))
    freeze(model, trainable)
    return model


def merge(model: Any) -> Any:
    """A plain copy with the masked updates added."""
    model = nnx.clone(model)
    layers = [x for _, x in nnx.iter_graph(model) if isinstance(x, MaskedLinear)]
    for layer in layers:
        kernel, own = layer.kernel[...], layer.update
        delta = functools.partial(_delta, own.kernel)
        for _ in kernel.shape[:-2]:
            delta = jax.vmap(delta)
        moved = kernel + delta(own.factors(), own.mask[...])
        layer.kernel[...] = moved.astype(kernel.dtype)
        del layer.update
        become(layer, plain_class(type(layer)))
    thaw(model)
    return model


def _delta(kernel: Kernel, factors: Factors, mask: Array) -> Float[Array, "n m"]:
    return jnp.where(mask, kernel.apply(factors), 0)
