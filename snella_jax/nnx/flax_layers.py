"""Flax's layers with an adapter: their own call, with `w0 + delta` as kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from snella_jax.core.dense import updated
from snella_jax.nnx.layers import STOCK, AdaptedLayer
from snella_jax.nnx.own_layers import adapted_methods, stand_in
from snella_jax.nnx.surgery import plain_class
from snella_jax.ops.matmul import dot_general
from snella_jax.ops.readers import kept_once


class Adapted(AdaptedLayer):
    """Base class of adapted layers of Flax, or of subclasses of these."""

    @staticmethod
    def methods(plain: Any, weights: tuple[str, ...]) -> dict[str, Any]:
        """Returns the methods of the layer's class, computing with `w0 + delta`."""
        own = adapted_methods(plain, weights)
        return own | {"__call__": _call} if plain.__call__ in STOCK else own


def _call(self: Any, inputs: Array, *args: Any, **kwargs: Any) -> Array:
    """Computes what the plain layer does, with the update; same arguments and results.

    Raises:
      ValueError: its kernel is that of a whole stack.
    """
    adapter = self.adapter
    call = plain_class(type(self)).__call__
    weight, bias = self.kernel[...], self.bias
    adapter.check_called(weight)
    usual = getattr(self, "dot_general", None) is jax.lax.dot_general
    ours = {"dot_general": dot_general} if usual else {}

    def op(x: Array, w: Array, **changes: Any) -> Array:
        # The layer's own call on a stand-in with another weight: its precision,
        # padding, bias and einsum stay its own business.
        layer = stand_in(self, kernel=nnx.Param(w), **ours, **changes)
        return call(layer, x, *args, **kwargs)

    operands = (inputs, weight) if bias is None else (inputs, weight, bias[...])
    dtype = self.dtype or jnp.result_type(*operands)
    without_bias = functools.partial(op, bias=None, use_bias=False)
    x, key, rows = inputs.astype(dtype), adapter.training_key(), None
    update = adapter.site.update
    if key is not None and update.sketches(x):
        axis = update.row_axis(x)
        key, rows = kept_once(update.sketch, key, inputs, x, axis)
    run = updated(op, update, without_bias)
    counts = adapter.factors(), adapter.budget[...]
    return run(x, weight, *counts, key, rows=rows)
