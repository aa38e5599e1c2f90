"""Layers that the models share: linear ones, norms and the MLP."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from snella_jax.models.layers.activations import Gelu, activated
from snella_jax.models.layers.norms import LayerNorm
from snella_jax.ops.names import remade

XAVIER = nnx.initializers.xavier_uniform()  # the ViT's
SMALL = nnx.initializers.truncated_normal(0.02)  # Swin's and ConvNeXt's linear layers'


class Constant(nnx.Variable):
    """Numbers of a published checkpoint that never train: not an `nnx.Param`."""


def linear(
    n: int,
    m: int,
    config: Any,
    rngs: nnx.Rngs,
    *,
    use_bias: bool = True,
    init: nnx.Initializer = XAVIER,
) -> nnx.Linear:
    """Makes an `[n, m]` layer in the dtypes of a model's config."""
    return nnx.Linear(
        n,
        m,
        use_bias=use_bias,
        kernel_init=init,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def norm(width: int, eps: float, config: Any, rngs: nnx.Rngs) -> LayerNorm:
    """Makes a norm over the last axis in the dtypes of a model's config."""
    return LayerNorm(
        width,
        epsilon=eps,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where the mean is large
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def scaled(y: Float[Array, "... D"], scale: Float[Array, " D"]) -> Array:
    """Computes `y * scale` in the dtype of `y`, both of one rank, as JAX may demand.

    >>> import jax.numpy as jnp
    >>> scaled(jnp.ones((2, 3)), jnp.arange(3.0)).tolist()
    [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]
    """
    return y * scale.astype(y.dtype).reshape(*(1,) * (y.ndim - 1), -1)


def convolution(
    n: int,
    m: int,
    size: tuple[int, int],
    config: Any,
    rngs: nnx.Rngs,
    *,
    use_bias: bool = True,
) -> nnx.Conv:
    """Makes a convolution of patches that neither overlap nor leave gaps."""
    return nnx.Conv(
        n,
        m,
        kernel_size=size,
        strides=size,
        padding="VALID",
        use_bias=use_bias,
        kernel_init=nnx.initializers.lecun_normal(),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def head(width: int, config: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """Makes a classifier of `config.num_classes` that starts at 0."""
    return nnx.Linear(
        width,
        config.num_classes,
        kernel_init=nnx.initializers.zeros_init(),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


class MLP(nnx.Module):
    """MLP of two linear layers around a GELU."""

    def __init__(
        self,
        width: int,
        hidden: int,
        config: Any,
        *,
        rngs: nnx.Rngs,
        init: nnx.Initializer = XAVIER,
    ):
        self.activation: Gelu = config.activation
        self.fc1 = linear(width, hidden, config, rngs, init=init)
        self.fc2 = linear(hidden, width, config, rngs, init=init)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        with remade():
            hidden = self.fc1(x)
        with remade(self.activation == "gelu"):
            return self.fc2(activated(hidden, self.activation))
