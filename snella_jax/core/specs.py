"""Mesh axes of the parameters of an adapted tree, by names of the base's.

An adapter follows its weight: factors are split as the weight's inputs and outputs are,
and along its stack and slices; the rest of them is small.
"""

from collections.abc import Mapping
from typing import Any

from flax.core import meta
from jax.sharding import PartitionSpec

from snella_jax.core.layout import Layout
from snella_jax.core.weight import Site

Names = tuple[Any, ...]


def names_in(leaves: Mapping[Any, Any]) -> dict[Any, PartitionSpec]:
    """Returns the specs of leaves that are boxes with names (`nn.Partitioned`)."""
    specs = {
        key: getattr(box, "get_partition_spec", None)
        for key, box in leaves.items()
        if isinstance(box, meta.AxisMetadata)
    }
    return {key: spec() for key, spec in specs.items() if spec is not None}


def adapter_spec(site: Site, weight: PartitionSpec, name: str) -> PartitionSpec:
    """Returns the spec of a leaf of an adapter, from that of its weight.

    >>> from snella_jax import SnellaConfig
    >>> rule = SnellaConfig().rule("fc")
    >>> site = Site(rule, Layout((8,), (4, 2)), (3,), axes=(1,))
    >>> weight = PartitionSpec("fsdp", "layers", "heads", None)
    >>> adapter_spec(site, weight, "a"), adapter_spec(site, weight, "b")
    (P('layers', None, 'fsdp', None), P('layers', None, 'heads', None))
    >>> adapter_spec(site, weight, "budget")
    P('layers',)
    """
    missing = len(site.shape) - len(weight)
    names = (*weight, *(None,) * missing)
    stack = tuple(names[axis] for axis in site.axes)
    rest = tuple(name for i, name in enumerate(names) if i not in site.axes)
    slices, inputs, outputs = _parted(site.layout, rest)
    lead = stack + slices
    match name:
        case "a":
            return PartitionSpec(*lead, None, inputs, None)
        case "b":
            return PartitionSpec(*lead, None, outputs, None)
    return PartitionSpec(*lead)


def _parted(layout: Layout, names: Names) -> tuple[Names, Any, Any]:
    """Returns the names of the slices, of `n` and of `m`."""
    if layout.fused:  # the parts lie side by side, across what is split
        inputs = names[: len(layout.inputs)]
        return (None,) * len(layout.slices), _first(inputs), None
    own = dict(zip(layout.order or range(len(names)), names, strict=True))
    named = tuple(own[i] for i in range(len(names)))
    k, n = len(layout.slices), len(layout.slices) + len(layout.inputs)
    return named[:k], _first(named[k:n]), _first(named[n:])


def _first(names: Names) -> Any:
    """Returns the name of axes read as one, split only as the first of them is."""
    return None if any(names[1:]) else names[0]
