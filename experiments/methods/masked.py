"""Kernelized factors under a mask that is fixed beforehand (the paper's Table XVII).

`y = x (W0 + M * kernel(a, b))`: what competition decides while SNELLA trains, SPT's
sensitivity decides before it: `M` has the targeted weights whose squared gradients,
summed over the training images, are the largest of all. A mask takes a byte a weight;
the update is recomputed on the way back. Merged, it costs nothing at inference;
locating costs the gradient of every targeted kernel once.
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, PRNGKeyArray

import snella_jax as snella
from experiments.methods import linear_layer
from experiments.methods.method import Ranked
from experiments.methods.sensitivity import Rule, Scored, Scores, top
from experiments.training.session import Places, Scope
from snella_jax.kernels import Factors, Kernel
from snella_jax.nnx.surgery import become, freeze, mixed_class
from snella_jax.nnx.variables import Factor, Frozen
from snella_jax.ops.matmul import matmul


@dataclasses.dataclass(frozen=True)
class MaskedSnella(Ranked, Scored):
    """SNELLA's kernel under a mask that SPT's sensitivity fixes beforehand."""

    title: ClassVar[str] = "Masked SNELLA"
    rule: ClassVar[Rule] = "squares"

    lr: float = 2e-2
    """Peak learning rate."""
    kernel: Literal["piecewise_linear", "mix_k"] = "mix_k"
    """Kernel that makes the update from the factors."""
    target_density: float = 0.3
    """Fraction of the targeted weights that move."""

    def choose(self, scores: Scores) -> Places:
        """Returns masks of the largest of all scores."""
        return top(scores, self.target_density)

    @property
    def variant(self) -> str:
        """The density, which masks differ by."""
        return f"_{self.target_density:g}"

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy whose targeted kernels move where a mask allows.

        Raises:
          ValueError: `trainable` matches nothing, or a target is no `nnx.Linear`.
        """
        model = nnx.clone(base)
        kernel, key = snella.kernels.named(self.kernel), scope.rngs().params()
        layers = linear_layer.linear_layers(model, "|".join(scope.places))
        for index, (path, layer) in enumerate(layers.items()):
            own = jax.random.fold_in(key, index)
            layer.update = Update(kernel, scope.places[path], self.rank, own)
            become(layer, mixed_class(MaskedLinear, type(layer)))
        freeze(model, scope.trainable)
        return model

    def merged(self, model: Any) -> Any:
        """Returns a plain copy with the masked updates added."""

        def weight(layer: Any) -> Array:
            kernel, own = layer.kernel[...], layer.update
            delta = functools.partial(_delta, own.kernel)
            for _ in kernel.shape[:-2]:
                delta = jax.vmap(delta)
            return kernel + delta(own.factors(), own.mask[...])

        return linear_layer.merged(model, MaskedLinear, weight, "update")

    @property
    def searched(self) -> dict[str, float]:
        """Settings that a search can choose, with their values."""
        return super().searched | {"target_density": self.target_density}

    @property
    def has_density(self) -> bool:
        """True: the mask has one."""
        return True

    def check(self, name: str) -> None:
        """Raises a `ValueError` on settings that would fail in the midst of a run."""
        super().check(name)
        if not 0 < self.target_density <= 1:
            raise ValueError(
                f"{name}.target_density={self.target_density}: expected above 0, to 1."
            )
        if self.rank % 2:
            raise ValueError(
                f"{name}.rank={self.rank}: expected a multiple of 2, its pieces."
            )


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
        """Returns the factors of all matrices of the stack."""
        return {name: getattr(self, name)[...] for name in self.names}


class MaskedLinear(linear_layer.OtherProduct):
    """Mixed into `nnx.Linear`: adds the masked update to its kernel."""

    update: Update

    def product(
        self, x: Float[Array, "... n"], dtype: DTypeLike
    ) -> Float[Array, "... m"]:
        """Returns `x @ (kernel + update)`; the sum is not kept for the way back."""
        own = self.update

        @jax.checkpoint
        def op(x: Array, kernel: Array, factors: Factors, mask: Array) -> Array:
            moved = kernel + _delta(own.kernel, factors, mask)
            return matmul(x, moved.astype(x.dtype))

        return op(x.astype(dtype), self.kernel[...], own.factors(), own.mask[...])


def _delta(kernel: Kernel, factors: Factors, mask: Array) -> Float[Array, "n m"]:
    return jnp.where(mask, kernel.apply(factors), 0)
