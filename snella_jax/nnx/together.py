"""Merges the adapted layers of a block inside a step, their thresholds in one search.

For blocks that are recomputed in the backward pass, on several devices: a merged weight
is there from the recomputed forward pass to the gradient of its input, so it is
gathered once for both, and the counts of all thresholds cross devices together.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from snella_jax.core.delta import found_together
from snella_jax.core.dense import summed
from snella_jax.nnx.layers import Adapter, adapter_of, adapters_of
from snella_jax.nnx.selection import adapted_layers
from snella_jax.nnx.surgery import become, plain_class
from snella_jax.ops.threshold import thresholds

Place = Callable[[str, Array], Array]
Search = Callable[[list[str], list[Array], list[Array]], list[Array]]


def merge_together(
    block: nnx.Module, place: Place, search: Search | None = None
) -> None:
    """Makes the adapted layers of a block plain ones with merged weights, in place.

    Call it on a block that was merged from its states for this call alone; the
    gradients of the factors pass. Layers whose update is added in parallel, or that
    draw or keep a sketch, stay as they are, and so do those whose input decides in
    which dtype they compute (no dtype of their own, a weight in 16 bits).

    Args:
      block: module with adapters, none of them of a stack.
      place: puts a weight, given with the path of its layer in the block, where the
        layer needs it.
      search: finds the thresholds of layers, given their paths, dense updates and
        budgets; None for `ops.threshold.thresholds`.
    """
    layers = [
        (path, layer)
        for path, layer in adapted_layers(block)
        if all(
            _is_merged(adapter) and _dtype(layer, name) is not None
            for name, adapter in adapters_of(layer).items()
        )
    ]
    weights = [
        (path, layer, name, adapter)
        for path, layer in layers
        for name, adapter in adapters_of(layer).items()
    ]
    updates = [adapter.site.update for *_, adapter in weights]
    factors = [adapter.factors() for *_, adapter in weights]
    budgets = [adapter.budget[...] for *_, adapter in weights]
    parts = [(update.kernel, update.gate, update.layout) for update in updates]

    def searched(places: list[int], dense: list[Array], own: list[Array]) -> Any:
        if search is None:
            return thresholds(dense, own)
        return search([weights[i][0] for i in places], dense, own)

    found = found_together(parts, factors, budgets, searched) if parts else []
    for index, (path, layer, name, _) in enumerate(weights):
        variable = getattr(layer, name)
        delta, _ = updates[index].delta(factors[index], budgets[index], found[index])
        merged = summed(variable[...], delta).astype(_dtype(layer, name))
        variable.set_value(place(path, merged))
    for _, layer in layers:
        for name in adapters_of(layer):
            delattr(layer, adapter_of(name))
        become(layer, plain_class(type(layer)))


def _dtype(layer: nnx.Module, name: str) -> DTypeLike | None:
    """Returns what a layer computes in, None where its input may be wider than that."""
    own = getattr(layer, "dtype", None)
    stored = getattr(layer, name).dtype
    return stored if own is None and stored.itemsize >= 4 else own


def _is_merged(adapter: Adapter) -> bool:
    update = adapter.site.update
    plain = update.path == "merged" and update.implementation != "pallas"
    return plain and not adapter.needs_key and not adapter.stack
