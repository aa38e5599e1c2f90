"""Texts that an adapted LLaMA writes, and pictures that an adapted MMDiT draws."""

from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Int, UInt8

from snella_jax.models import llama, sd3
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


def pictures(
    pipeline: sd3.Pipeline,
    transformer: nnx.Module,
    prompt: Any,
    negative: Any = "",
    *,
    unmoved_budgets: bool = False,
    **options: Any,
) -> UInt8[Array, "B height width 3"]:
    """Draws with another transformer in a pipeline, whose adapters are merged once.

    To draw more than once, merge it yourself: `pipeline.with_transformer(merged)`.

    Args:
      pipeline: its other components are used.
      transformer: an adapted or merged MMDiT.
      prompt, negative, options: of `models.sd3.Pipeline`.
      unmoved_budgets: as in `merge`.

    Raises:
      TypeError: another model, or as `models.sd3.Pipeline`.
      BudgetsNeverMoved: as `merge`.
      ValueError: as `models.sd3.Pipeline`.
    """
    if not isinstance(transformer, sd3.mmdit.MMDiT):
        raise TypeError(
            f"{type(transformer).__name__} draws nothing: expected an MMDiT."
        )
    if has_adapters(transformer):
        transformer = merge(transformer, unmoved_budgets=unmoved_budgets)
    return pipeline.with_transformer(transformer)(prompt, negative, **options)
