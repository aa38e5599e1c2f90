"""Decoders of texts, which have no classes and keep their embedding and head."""

from typing import Any

from snella_jax.models.llama import Llama


def is_one(model: Any) -> bool:
    """Returns True for a model that predicts the next token."""
    return isinstance(model, Llama)


def refuse(model: Any, reason: str) -> None:
    """Raises a `ValueError` for a decoder.

    Args:
      model: any model.
      reason: the method, and what it needs that a decoder has none of.
    """
    if is_one(model):
        name = type(model).__name__
        raise ValueError(f"{reason}: a {name} has none. Leave the method out.")
