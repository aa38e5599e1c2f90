"""LoRA for tests: a config, factors that are not 0, and a model with its names."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import snella_jax as snella
from snella_jax.nnx.variables import variables_of

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA = {
    "rank": 2,
    "kernel": "linear",
    "gate": "none",
    "target_density": 1.0,
    "allocation": "fixed",
}


def redrawn(model, scale=0.1):
    """Draws every factor, and whatever else trains, in place."""
    key = jax.random.key(7)
    for i, (_, variable) in enumerate(variables_of(model, nnx.Param)):
        drawn = jax.random.normal(jax.random.fold_in(key, i), variable.shape)
        own = variable[...] * (not isinstance(variable, snella.Factor))
        variable[...] = (own + scale * drawn).astype(variable.dtype)
    return model


def adapted(base, **changes):
    config = snella.SnellaConfig(**LORA | changes)
    return redrawn(snella.adapt(base, config, rngs=nnx.Rngs(1)))


def delta(adapter, *index):
    """Our update `[m, n]`, as PyTorch has weights."""
    a, b = (np.asarray(getattr(adapter, name)[...])[index][0] for name in "ab")
    return b @ a.T


class Net(nnx.Module):
    """A stack, a fused qkv, heads, a convolution and an embedding, of a user's own."""

    def __init__(self, rngs):
        layer = nnx.vmap(lambda rngs: nnx.Linear(4, 6, rngs=rngs))
        self.blocks = layer(rngs.split(3))
        self.qkv = nnx.Linear(4, 12, rngs=rngs)
        self.heads = nnx.LinearGeneral((2, 3), (4, 2), axis=(-2, -1), rngs=rngs)
        self.conv = nnx.Conv(2, 5, (3, 2), rngs=rngs)
        self.table = nnx.Embed(7, 4, rngs=rngs)
        self.token = nnx.Param(jnp.ones((1, 4)))
        self.out = nnx.Linear(4, 2, rngs=rngs)


NAMES = {
    r"blocks\[(\d+)\]": r"body.\1.fc",
    "qkv": "body.attn.qkv",
    "heads": "body.heads",
    "conv": "stem.conv",
    "table": "stem.table",
    "token": "stem.extra.token",
    "out": "head.out",
}
