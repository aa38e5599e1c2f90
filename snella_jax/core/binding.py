"""Refuses a model that is for another binding, and names the right call."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax import nnx


def check_binding(model: Any, own: str) -> None:
    """Raises a `TypeError` that says what to call if a model is for another binding.

    Args:
      model: model that `adapt` was given.
      own: "NNX", "Linen" or "pytree".
    """
    found, call = _binding(model)
    if found != own:
        kind = model if isinstance(model, type) else type(model)
        raise TypeError(f"{kind.__name__} is {call}")


def _binding(model: Any) -> tuple[str, str]:
    match model:
        case type():
            return "", "a class: expected an object of it."
        case nnx.Module():
            return (
                "NNX",
                "an NNX module: call snella_jax.adapt(model, config, rngs=...), or "
                "Tuning.create.",
            )
        case nn.Module():
            return "Linen", (
                "a Linen module: call snella_jax.linen.adapt(module, variables, "
                "config, *inputs, key=...), or Tuning.create_linen."
            )
        case nnx.State():
            return "", "the state of an NNX model: expected the model itself."
        case Mapping():
            return "pytree", (
                "a mapping of parameters: call snella_jax.pytree.adapt(params, config, "
                "key=...), or snella_jax.linen.adapt with the module that they are of."
            )
    if isinstance(getattr(model, "module", None), nn.Module):  # of transformers
        return "", (
            "no module, but has one: call snella_jax.linen.adapt(model.module, "
            '{"params": model.params}, config, *inputs, key=...).'
        )
    return "", (
        "no NNX module, Linen module or nested dict of arrays. For another pytree "
        "make its arrays a dict by snella_jax.pytree.flattened, and call "
        "snella_jax.pytree.adapt(params, config, key=...): see docs/adapters.md."
    )
