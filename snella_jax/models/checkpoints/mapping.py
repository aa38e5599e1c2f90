"""Gives every tensor of a published checkpoint its place in a model.

A table of `TensorRule`s says where the tensors of a format go. Loading is strict both
ways: a tensor without a place and a place without a tensor are errors, all of them
listed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from snella_jax.files.arrays import Stored, aligned, put
from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.layers.basic import Constant


@dataclass(frozen=True)
class TensorRule:
    """Rule for the tensors of a name: their places, and what is put there.

    Attributes:
      pattern: regex of the whole name.
      places: paths in the model, which take the pattern's groups (`blocks/{0}/norm1`);
        none for a tensor that is left out.
      make: the arrays for these places, from the tensor.
    """

    pattern: str
    places: tuple[str, ...] = ()
    make: Callable[[Any], Sequence[Any]] = lambda tensor: (tensor,)


def arrange(
    checkpoint: Checkpoint, rules: Sequence[TensorRule]
) -> tuple[dict[str, Any], list[str]]:
    """Puts every tensor at the places of the first rule that knows its name.

    Returns:
      Arrays by path in the model, and what is wrong, in words: tensors without a place,
      places with two tensors, tensors that cannot be brought into form.
    """
    parts: dict[str, Any] = {}
    problems: list[str] = []
    for name, tensor in checkpoint.tensors.items():
        try:
            for path, part in _parts(name, tensor, rules):
                if path in parts:
                    raise ValueError(f"another tensor went to {path}, too")
                parts[path] = part
        except (ValueError, IndexError) as error:
            problems.append(f"{name} {list(tensor.shape)}: {error}")
    return parts, problems


def fill(
    path: Path,
    parts: Mapping[str, Stored],
    model: nnx.Module,
    *,
    stacked: str = "(?!)",
    problems: Sequence[str] = (),
) -> None:
    """Gives all that is `stored` of a model its value, in place, in its own dtype.

    The largest parameters come first, each made row by row where it stays: beyond the
    model itself this takes the memory of one part.

    Args:
      path: path of the checkpoint, for errors.
      parts: arrays by path, perhaps to be made.
      model: may be abstract (`nnx.eval_shape`).
      stacked: regex of the modules whose variables have a leading axis of layers:
        with `blocks`, `blocks/3/norm1/scale` is row 3 of `blocks/norm1/scale`.
      problems: problems that `arrange` found; they stand first in the error.

    Raises:
      CheckpointError: lists `problems`, every part without a place, place without a
        part, and part that does not fit; then the model is as it was.
    """
    variables = stored(model)
    rooms = places(variables, stacked)
    found = [
        f"{name} {list(part.shape)}: this model has no such parameter"
        for name, part in parts.items()
        if name not in rooms
    ]
    for name, (_, _, shape) in rooms.items():
        if name not in parts:
            found.append(f"{name} {list(shape)}: there is no tensor for it")
        elif parts[name].shape != shape:
            given = list(parts[name].shape)
            found.append(f"{name} {list(shape)}: the tensor for it is {given}")
    if problems or found:
        lines = "\n  ".join([*problems, *sorted(found)])
        raise CheckpointError(path, f"it does not fit the model:\n  {lines}")
    rows: dict[str, list[str]] = {}
    for name, (variable, _, _) in rooms.items():
        rows.setdefault(variable, []).append(name)
    for name in sorted(rows, key=lambda name: -variables[name].size):
        variable, own = variables[name], rows[name]
        whole = own == [name]
        made = aligned(tuple(variable.shape), variable.dtype)
        for row, part in enumerate(own):
            put(parts[part], made if whole else made[row])
        variable.set_value(jax.device_put(made, may_alias=True))


def stored(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Returns what checkpoints have of a model by "/"-joined path, each once.

    The parameters, and constants that no training changes.
    """
    kinds, nodes = (nnx.Param, Constant), nnx.iter_graph(model)
    return {"/".join(map(str, p)): x for p, x in nodes if isinstance(x, kinds)}


Place = tuple[str, int | None, tuple[int, ...]]  # variable, row of it, shape


def places(variables: Mapping[str, Any], stacked: str) -> dict[str, Place]:
    """Returns where every part goes, by its path; `stacked` as in `fill`."""
    found: dict[str, Place] = {}
    for path, variable in variables.items():
        match = re.fullmatch(rf"({stacked})/(.*)", path)
        if not match:
            found[path] = path, None, tuple(variable.shape)
            continue
        for row in range(variable.shape[0]):
            name = f"{match[1]}/{row}/{match[match.re.groups]}"
            found[name] = path, row, tuple(variable.shape[1:])
    return found


def _parts(
    name: str, tensor: Stored, rules: Sequence[TensorRule]
) -> list[tuple[str, Any]]:
    rule, paths = place_of(name, rules)
    if not paths:
        return []
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"expected floating-point numbers, not {tensor.dtype}")
    return list(zip(paths, rule.make(tensor), strict=True))


def place_of(
    name: str, rules: Sequence[TensorRule]
) -> tuple[TensorRule, tuple[str, ...]]:
    """Returns the first rule that knows a tensor's name, and the paths of its places.

    Raises:
      ValueError: none does.
    """
    for rule in rules:
        if match := re.fullmatch(rule.pattern, name):
            return rule, tuple(path.format(*match.groups()) for path in rule.places)
    raise ValueError("there is no place for it")
