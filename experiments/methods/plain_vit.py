"""Which methods work on the tokens of a plain ViT alone."""

from typing import Any

from snella_jax.models.vit import ViT

ALONE = ("vpt_shallow", "vpt_deep", "vqt", "noah")


def require(model: Any, method: str) -> None:
    """Raises a `ValueError` for another model, whose tokens are a grid."""
    if not isinstance(model, ViT):
        raise ValueError(
            f"{method} puts tokens beside those of a plain ViT: a "
            f"{type(model).__name__} has grids. Leave the method out."
        )
