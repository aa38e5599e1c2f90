"""The adapted layers and weights of a model."""

from collections.abc import Iterator
from typing import Any

from flax import nnx

from snella_jax.core.paths import join
from snella_jax.core.weight import AdaptedWeight
from snella_jax.nnx.layers import AdaptedLayer, Adapter, Seeded, adapters_of


def adapted_layers(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Yields path and layer of every adapted layer, each once, in a fixed order."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, AdaptedLayer):
            yield join(path), node


def adapted_variables(
    model: nnx.Module,
) -> Iterator[tuple[str, Adapter, nnx.Variable]]:
    """Yields path, adapter and variable of every adapted weight, layer by layer.

    The path of a weight that is called `kernel` is that of its layer.
    """
    for path, layer in adapted_layers(model):
        for name, adapter in adapters_of(layer).items():
            whole = path if name == "kernel" else f"{path}/{name}".lstrip("/")
            yield whole, adapter, getattr(layer, name)


def seeded_parts(model: nnx.Module) -> list[Seeded]:
    """Lists what draws with a key of its own: adapters first, in their order."""
    adapters = [adapter for _, adapter, _ in adapted_variables(model)]
    parts = [node for _, node in nnx.iter_graph(model) if isinstance(node, Seeded)]
    return [*adapters, *(node for node in parts if not isinstance(node, Adapter))]


def weights_of(model: nnx.Module) -> list[AdaptedWeight]:
    """Lists every adapted weight, in the order of `adapted_variables`.

    Raises:
      ValueError: the model has no adapters.
    """
    require_adapters(model)
    weights = adapted_variables(model)
    return [adapter.on(path, weight[...]) for path, adapter, weight in weights]


def has_adapters(model: nnx.Module) -> bool:
    """Returns True if any layer is adapted; the model may be abstract."""
    return any(True for _ in adapted_layers(model))


def require_adapters(model: nnx.Module) -> None:
    """Raises a `ValueError` if the model has no adapters; it may be abstract.

    Raises:
      TypeError: it is no module.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__}: expected an NNX module. Of a Tuning "
            "take state.model, or call the state's own method."
        )
    if not has_adapters(model):
        raise ValueError(
            "The model has no adapters: call snella.adapt(model, ...) first."
        )
