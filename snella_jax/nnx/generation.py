"""Texts that an adapted LLaMA writes."""

from typing import Any

import numpy as np
from jaxtyping import Array, Int

from snella_jax.models import llama
from snella_jax.nnx.adapt import merge
from snella_jax.nnx.selection import has_adapters


def generate(
    model: llama.Llama,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    unmoved_budgets: bool = False,
    **options: Any,
) -> Int[Array, "B N"]:
    """Merges a model's adapters, once, and writes on from prompts.

    To write more than once, merge it yourself and call `models.llama.generate`.

    Args:
      model: an adapted or merged LLaMA.
      tokens, options: of `models.llama.generate`.
      unmoved_budgets: as in `merge`.

    Raises:
      TypeError: another model, or as `models.llama.generate`.
      BudgetsNeverMoved: as `merge`.
      ValueError: as `models.llama.generate`.
    """
    if not isinstance(model, llama.Llama):
        raise TypeError(f"{type(model).__name__} writes nothing: expected a LLaMA.")
    if has_adapters(model):
        model = merge(model, unmoved_budgets=unmoved_budgets)
    return llama.generate(model, tokens, **options)
