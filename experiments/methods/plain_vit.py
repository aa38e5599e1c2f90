"""Methods that put tokens beside those of a plain ViT."""

from typing import Any

from snella_jax.models.vit import ViT


def require(model: Any, method: str) -> None:
    """Raises a `ValueError` for another model."""
    if not isinstance(model, ViT):
        raise ValueError(
            f"{method} puts tokens beside those of an image in a plain ViT, which a "
            f"{type(model).__name__} is not. Leave the method out."
        )
