"""LoRA for tests: a config, and factors that are not 0."""

import jax
from flax import nnx

import snella_jax as snella
from snella_jax.nnx.variables import variables_of

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
