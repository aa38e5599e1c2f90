"""Methods that put tokens beside those of a plain ViT."""

from typing import Any

from snella_jax.models.llama import Llama
from snella_jax.models.vit import ViT


def require(model: Any, method: str) -> None:
    """Raises a `ValueError` for another model, of grids or texts."""
    if not isinstance(model, ViT):
        has = "reads texts" if isinstance(model, Llama) else "has grids"
        raise ValueError(
            f"{method} puts tokens beside those of a plain ViT: a "
            f"{type(model).__name__} {has}. Leave the method out."
        )
