"""Models without classes: decoders of texts, SAMs, which draw masks, and MMDiTs.

A decoder keeps its embedding and head. A SAM's methods adapt its image encoder; its
mask decoder and `no_mask_embed` train whole, as `Scope.trainable` says. An MMDiT draws
pictures; nothing trains besides.
"""

from typing import Any

from snella_jax.models.llama import Llama
from snella_jax.models.sam import Sam
from snella_jax.models.sd3.mmdit import MMDiT


def is_decoder(model: Any) -> bool:
    """Returns True for a model that predicts the next token."""
    return isinstance(model, Llama)


def is_sam(model: Any) -> bool:
    """Returns True for a model that draws masks."""
    return isinstance(model, Sam)


def has_classes(model: Any) -> bool:
    """Returns True for a classifier, or any other model with a head of its own."""
    return not isinstance(model, Llama | Sam | MMDiT)


def body(model: Any) -> Any:
    """Returns the part that methods adapt: a SAM's encoder, any other model whole."""
    return model.encoder if is_sam(model) else model


def require_classes(model: Any, reason: str) -> None:
    """Raises a `ValueError` for a model without classes.

    Args:
      model: any model.
      reason: the method, and what it needs that such a model has none of.
    """
    if not has_classes(model):
        name = type(model).__name__
        raise ValueError(f"{reason}: a {name} has none. Leave the method out.")
