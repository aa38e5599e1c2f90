"""Modules of PyTorch for the weights of a model: of `snella_jax.models`, or of any.

For a model of `snella_jax.models` the names are known. For another a dict gives them,
`{regex of a path: name of the module}`: its linear layers are `[out, in]` there, its
convolutions `[out, in, height, width]`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from snella_jax.adapters.base import variables_at
from snella_jax.core.config import Rule
from snella_jax.core.paths import listed, renamed
from snella_jax.core.weight import indexed
from snella_jax.files.errors import CheckpointError
from snella_jax.models import Model, torch_names
from snella_jax.models.checkpoints.mapping import TensorRule
from snella_jax.models.checkpoints.torch_tensor import Row, TorchTensor
from snella_jax.nnx.targets import Target, targets_of
from snella_jax.nnx.variables import variables_of

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
Names = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Modules:
    """Tensors of a PyTorch model by name, and where they lie in ours.

    Attributes:
      weights: weights of layers, whose rows are matrices.
      whole: all tensors, whose rows are variables.
      shapes: their shapes; empty where only the names were known.
      complete: True if these are all tensors of the model.
    """

    weights: Mapping[str, TorchTensor]
    whole: Mapping[str, TorchTensor]
    shapes: Mapping[str, tuple[int, ...]]
    complete: bool


def require_names(model: nnx.Module, names: Names | None) -> None:
    """Raises a `ValueError` where only a user can know the names."""
    if names is None and not isinstance(model, Model):
        raise ValueError(
            f"{type(model).__name__} is no model of snella_jax.models: expected "
            "names=, the name of the PyTorch module for a regex of paths, such as "
            r'{r"blocks/(\d+)/fc1": r"layers.\1.fc1"}.'
        )


def by_names(model: nnx.Module, names: Names) -> Modules:
    """Finds the tensors for what a user's regexes match of a plain model.

    Raises:
      ValueError: a regex matches nothing or does not compile, a name stands for two
        weights, or a convolution in groups.
    """
    targets = targets_of(model)
    weights: dict[str, TorchTensor] = {}
    whole: dict[str, TorchTensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    used: set[str] = set()
    seen: dict[str, None] = {}

    def named(path: str) -> str | None:
        seen[path] = None
        found = renamed(path, names)
        if found is None:
            return None
        used.add(found[0])
        return found[1]

    def put(found: dict[str, TorchTensor], name: str, tensor: TorchTensor) -> None:
        if name in found:
            raise ValueError(
                f"names: {name} stands for {found[name].rows[0].path} and for "
                f"{tensor.rows[0].path}, rows of a stack perhaps: expected one name "
                r'for each row, as in {r"blocks/fc1\[(\d+)\]": r"layers.\1.fc1"}.'
            )
        found[name] = tensor

    for path, target in targets.items():
        site = target.site(path, Rule(), must_move=False)
        variable = target.variable(path)
        for index in np.ndindex(site.stack):
            if (module := named(indexed(path, index))) is not None:
                name, row = f"{module}.weight", Row(variable, index)
                make, shapes[name] = _of_layer(path, target)
                put(weights, name, TorchTensor(TensorRule("", (), make), [row]))
    for path, variable in variables_of(model, nnx.Param):
        parent, _, leaf = path.rpartition("/")
        tensor, module = named(path), named(parent)
        if tensor is None and module is not None:
            tensor = f"{module}.{LEAVES.get(leaf, leaf)}"
        if tensor is not None:
            make, shapes[tensor] = _of_variable(parent, variable, targets)
            put(whole, tensor, TorchTensor(TensorRule("", (), make), [Row(path)]))
    if unused := sorted(names.keys() - used):
        raise ValueError(
            f"names: {', '.join(map(repr, unused))} matches no path in full. There "
            f"are: {listed(sorted(filter(None, seen)))}"
        )
    return Modules(weights, whole, shapes, complete=False)


Make = Callable[[Any], Sequence[Any]]


def _of_layer(path: str, target: Target) -> tuple[Make, tuple[int, ...]]:
    """Returns how a layer's matrix is made of PyTorch's weight, and its shape."""
    layer = target.layer
    if isinstance(layer, nnx.Conv):
        if layer.feature_group_count != 1:
            raise ValueError(f"{path} is a convolution in groups: expected one group.")
        *window, n, m = layer.kernel_shape
        axes = (*range(2, 2 + len(window)), 1, 0)
        return lambda x: (x.transpose(axes),), (m, n, *window)
    layout = target.site(path, Rule(), must_move=False).layout
    parts = int(np.prod(layout.slices))
    if parts > 1:
        raise ValueError(f"{path} has matrices for a batch, which no nn.Linear has.")
    return lambda x: (x.T,), (layout.m, layout.n)


def _of_variable(
    parent: str, variable: Any, targets: Mapping[str, Target]
) -> tuple[Make, tuple[int, ...]]:
    """Returns how a variable is made of PyTorch's tensor, and its shape."""
    own, target = tuple(variable.shape), targets.get(parent)
    if target is None or target.weight is not variable:
        return lambda x: (x,), own
    make, shape = _of_layer(parent, target)
    return lambda x: [part.reshape(own) for part in make(x)], shape


def of_model(model: Model, names: Iterable[str]) -> Modules:
    """Finds a known model's rows for tensors of which only the names are known."""
    found = torch_names.located(model, names)
    return Modules(found, found, {}, complete=False)


def matrix_path(row: Row, targets: Mapping[str, Target]) -> str:
    """Returns the path of the target whose matrix is in a row.

    Raises:
      ValueError: it is no target.
    """
    for path in (row.path.removesuffix("/kernel"), row.path):
        if path in targets:
            return path
    raise ValueError(f"{row.path} is no weight that can be adapted")


def row_of(path: str, index: tuple[int, ...], paths: Iterable[str]) -> Row:
    """Returns the row of an adapted weight, given the paths of all variables."""
    known = set(paths)
    return Row(next(name for name in variables_at(path) if name in known), index)


def require(found: Mapping[str, TorchTensor], names: Iterable[str], where: Any) -> None:
    """Raises a `CheckpointError` for names that stand for nothing in the model."""
    if unknown := sorted(set(names) - found.keys()):
        listed = "\n  ".join(["", *unknown])
        raise CheckpointError(
            where,
            f"this model has no weights for {listed}\nexpected the names of its "
            "modules in transformers or diffusers; others go into names=",
        )
