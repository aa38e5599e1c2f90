"""An adapted model as plain weights in the format of its base."""

from pathlib import Path
from typing import Any

from flax import nnx

from snella_jax.adapt import merge
from snella_jax.models import vit
from snella_jax.rules import adapted_layers


def export(
    model: nnx.Module, path: str | Path, *, like: str | Path, **options: Any
) -> None:
    """Merges a model of `snella_jax.models` and writes it as its base was published.

    Args:
      model: with adapters, or merged.
      path, like, options: of the model's own `export`, such as `vit.export`.

    Raises:
      TypeError: a model of another library: merge it and write it with that.
      BudgetsNeverMoved: as `merge`.
      ValueError, CheckpointError, FileNotFoundError, FileExistsError: as `vit.export`.
    """
    if not isinstance(model, vit.ViT):
        raise TypeError(
            f"{type(model).__name__} is no model of snella_jax.models: write "
            "snella.merge(model) with the library that it comes from."
        )
    plain = merge(model) if any(True for _ in adapted_layers(model)) else model
    vit.export(plain, path, like=like, **options)
