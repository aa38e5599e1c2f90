"""Writes an adapted model as plain weights in the format of its base."""

from pathlib import Path
from typing import Any

from flax import nnx

from snella_jax import models
from snella_jax.nnx.adapt import merge
from snella_jax.nnx.selection import has_adapters


def export(
    model: nnx.Module,
    path: str | Path,
    *,
    like: str | Path | None = None,
    unmoved_budgets: bool = False,
    **options: Any,
) -> None:
    """Merges a model of `snella_jax.models` and writes it as its base was published.

    Args:
      model: an adapted or merged model.
      path, like, options: of `models.export`.
      unmoved_budgets: as in `merge`.

    Raises:
      TypeError: another model: merge it and write it with what it comes from.
      BudgetsNeverMoved: as `merge`.
      ValueError, CheckpointError, FileNotFoundError, FileExistsError: as
        `models.export`.
    """
    if not isinstance(model, models.Model):
        raise TypeError(
            f"{type(model).__name__} is no model of snella_jax.models: write "
            "snella.merge(model) with the library that it comes from, or its adapters "
            "with snella.save."
        )
    if has_adapters(model):
        model = merge(model, unmoved_budgets=unmoved_budgets)
    models.export(model, path, like=like, **options)
