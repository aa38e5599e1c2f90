"""Blocks of a model on a mesh: what lies how inside a training step.

Left to choose, XLA may split the features between blocks as an embedding's, and move
activations to where the rows of split factors are.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from experiments.training import sharding
from experiments.training.sharding import Factors
from snella_jax.nnx.layers import adapters_of
from snella_jax.nnx.selection import adapted_layers
from snella_jax.nnx.surgery import become, mixed_class
from snella_jax.nnx.together import merge_together
from snella_jax.nnx.variables import Factor, variables_of
from snella_jax.ops.threshold import thresholds


def pin(model: nnx.Module, mesh: Mesh, factors: Factors = "split") -> None:
    """Fixes what lies how inside the blocks of a model, in place.

    Args:
      model: any of `snella_jax.models`, perhaps adapted.
      mesh: the devices.
      factors: as in `sharding.of_parameter`.
    """
    config = getattr(model, "config", None)
    remat = getattr(config, "remat", "none") == "blocks"
    lies = Lies(mesh, factors, together=remat and mesh.shape["fsdp"] > 1)
    for node in [*_blocks(model)]:
        become(node, mixed_class(Pinned, type(node)))
        vars(node)["lies"] = lies


@dataclasses.dataclass(frozen=True)
class Lies:
    """How a block lies on a mesh.

    Attributes:
      mesh: the devices.
      factors: as in `sharding.of_parameter`.
      together: True if its adapted matrices are merged before it is called, see
        `snella_jax.nnx.together`.
    """

    mesh: Mesh
    factors: Factors
    together: bool


class Pinned(nnx.Module):
    """Mixed into an embedding or a block: its output is split by examples alone.

    Factors of layout "split" are whole where it uses them. On TPUs those of a kernel
    lie as their matrix, or XLA moves slices of their columns (LLaMA-2-7B on 16 v5e: 98
    permutations instead of 2,306; on 16 H100 2 either way, and 192 sums more). Their
    gradient is summed as their matrix lies, or XLA moves that of the matrix instead (16
    H100: 2.1 GiB more).
    Of layout "local" every device works on whole matrices, see `Local`.
    """

    lies: Lies

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mesh = self.lies.mesh
        if self.lies.factors == "split":
            for path, factor in variables_of(self, Factor):
                names = path.split("/")
                following = sharding.of_parameter(names, factor.shape, mesh, "follow")
                split = sharding.of_parameter(names, factor.shape, mesh, "split")
                of_kernel = any(map(sharding.is_adapter, names[-2:-1]))
                follows = on_tpus(mesh) and of_kernel
                used = following if follows else sharding.whole(mesh)
                gather = functools.partial(_laid_out, mesh, split.spec, used)
                factor.set_value(_gathered(gather, factor[...], following))
        if self.lies.factors == "local":
            _localise(self, mesh)
        elif self.lies.together:
            how = functools.partial(_in_use, mesh), functools.partial(_search, mesh)
            merge_together(self, *how)
        y: Any = super().__call__(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return jax.lax.with_sharding_constraint(y, sharding.of_batches(mesh))


def on_tpus(mesh: Mesh) -> bool:
    """Returns True if a mesh is one of TPUs."""
    return mesh.devices.flat[0].platform == "tpu"


class Local(nnx.Module):
    """Mixed into an adapted layer: every device works on its examples and whole matrix.

    So counts of thresholds and gradients of a matrix never cross devices, but those of
    the factors; every device makes the whole update.

    Attributes:
      own: class of the adapted layer.
      mesh: devices, all along `data` and `fsdp`.
      kernel_lies: spec of its kernel.
    """

    own: type
    mesh: Mesh
    kernel_lies: PartitionSpec

    def __call__(self, x: Array) -> Array:
        graphdef, state = nnx.split(self)

        def spec(key_path, _):
            is_kernel = sharding.names_of(key_path) == ["kernel"]
            return self.kernel_lies if is_kernel else PartitionSpec()

        def run(state: nnx.State, x: Array) -> Array:
            layer: Any = nnx.merge(graphdef, state)
            become(layer, self.own)
            if "fsdp" in self.kernel_lies:
                axis = self.kernel_lies.index("fsdp")
                whole = jax.lax.all_gather(
                    layer.kernel[...], "fsdp", axis=axis, tiled=True
                )
                layer.kernel.set_value(whole)
            return layer(x)

        specs = jax.tree_util.tree_map_with_path(spec, state)
        rows = PartitionSpec(sharding.EXAMPLES)
        spread = jax.shard_map(
            run, mesh=self.mesh, in_specs=(specs, rows), out_specs=rows
        )
        return spread(state, x)


def _localise(block: nnx.Module, mesh: Mesh) -> None:
    """Makes the adapted layers of a block `Local`, in place.

    Not those that draw, or have a weight that is no kernel.
    """
    for path, layer in list(adapted_layers(block)):
        own = adapters_of(layer)
        if [*own] != ["kernel"] or own["kernel"].needs_key:
            continue
        names = [*path.split("/"), "kernel"]
        lies = sharding.of_parameter(names, layer.kernel.shape, mesh)
        vars(layer).update(own=type(layer), mesh=mesh, kernel_lies=lies.spec)
        become(layer, mixed_class(Local, type(layer)))


def _blocks(model: nnx.Module) -> Iterator[nnx.Module]:
    """Yields the blocks of a model, or stacks of them, and an embedding of tokens."""
    if isinstance(embed := getattr(model, "embed", None), nnx.Module):
        yield embed
    owners = (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module))
    for owner in owners:
        if isinstance(blocks := vars(owner).get("blocks"), nnx.Module):
            yield from _modules(blocks)


def _modules(blocks: Any) -> Iterator[nnx.Module]:
    """Yields what lists and dictionaries hold."""
    if isinstance(blocks, nnx.List):
        for each in blocks:
            yield from _modules(each)
    elif isinstance(blocks, nnx.Dict):
        for each in vars(blocks).values():
            if isinstance(each, nnx.Module):
                yield from _modules(each)
    else:
        yield blocks


def _in_use(mesh: Mesh, layer: str, weight: Array) -> Array:
    """Gathers a merged matrix along `fsdp`; its gradient is scattered."""
    lying = sharding.of_parameter([*layer.split("/"), "kernel"], weight.shape, mesh)
    used = (None if axis == "fsdp" else axis for axis in lying.spec)
    lies = NamedSharding(mesh, PartitionSpec(*used))
    return _gathered(
        lambda weight: jax.lax.with_sharding_constraint(weight, lies), weight, lying
    )


def _search(
    mesh: Mesh, layers: list[str], deltas: list[Array], budgets: list[Array]
) -> list[Array]:
    """Finds thresholds; the counts of all matrices cross devices as one array."""
    specs = [
        sharding.of_parameter([*layer.split("/"), "kernel"], delta.shape, mesh).spec
        for layer, delta in zip(layers, deltas, strict=True)
    ]
    split = {axis for spec in specs for axis in spec} - {None}
    axes = tuple(axis for axis in mesh.axis_names if axis in split)
    if not axes or any(budget.ndim for budget in budgets):
        return thresholds(deltas, budgets)

    def total(counts: list[Array]) -> list[Array]:
        parts = []
        for spec, own in zip(specs, counts, strict=True):
            # Of a matrix that an axis leaves whole the axis's first device counts.
            others = [axis for axis in axes if axis not in spec]
            for axis in others:
                own = jnp.where(jax.lax.axis_index(axis) == 0, own, 0)
            parts.append(own)
        ends = np.cumsum([own.size for own in counts])[:-1]
        return jnp.split(jax.lax.psum(jnp.concatenate(parts), axes), ends)

    whole = [PartitionSpec()] * len(deltas)
    run = jax.shard_map(
        lambda deltas, budgets: thresholds(deltas, budgets, total),
        mesh=mesh,
        in_specs=(specs, whole),
        out_specs=whole,
        check_vma=False,
    )
    return run(deltas, budgets)


def _laid_out(mesh: Mesh, lying: PartitionSpec, used: NamedSharding, x: Array) -> Array:
    """Gathers a factor until it lies as `used`.

    Its parts become leading axes first. To gather along its rows XLA lays out the whole
    stack of factors with the few columns of each last, padded to 128.
    """
    for axis, names in enumerate(lying):
        names = names if isinstance(names, tuple) else (names,)
        own = [name for name in names if name in used.spec[axis : axis + 1]]
        others = tuple(name for name in names if name not in (None, *own))
        if not others:
            continue
        counts = [mesh.shape[name] for name in own]
        counts.append(math.prod(mesh.shape[name] for name in others))
        lead = range(len(counts))
        inside = [axis + i for i in lead]
        parts = x.reshape(*x.shape[:axis], *counts, -1, *x.shape[axis + 1 :])
        parts = jnp.moveaxis(parts, inside, lead)
        for spec in (PartitionSpec(*own, others), PartitionSpec(*own)):
            here = NamedSharding(mesh, spec)
            parts = jax.lax.with_sharding_constraint(parts, here)
        x = jnp.moveaxis(parts, lead, inside).reshape(x.shape)
        if not own:  # said again, it takes 3 MiB more of LoRA's step on 16 H100
            return x
    return jax.lax.with_sharding_constraint(x, used)


Gather = Callable[[Array], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def _gathered(gather: Gather, x: Array, of_gradient: NamedSharding) -> Array:
    """Lays out an array by a function, and its gradient in another way."""
    return gather(x)


def _gathered_forward(gather, x, of_gradient):
    return gather(x), None


def _gathered_backward(gather, of_gradient, residuals, cotangent):
    return (jax.lax.with_sharding_constraint(cotangent, of_gradient),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
