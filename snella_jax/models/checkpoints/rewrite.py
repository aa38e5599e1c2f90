"""Writes a checkpoint's tensors with a model's numbers: the loader's tables backwards.

A `TensorRule` only moves numbers: run on their places, it says where each came from,
and so the same table writes what it reads.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

from snella_jax.files.errors import CheckpointError
from snella_jax.files.hosts import to_host
from snella_jax.models.checkpoints.mapping import (
    TensorRule,
    place_of,
    places,
    stored,
)
from snella_jax.models.checkpoints.read import Checkpoint


def parts_of(model: nnx.Module, stacked: str) -> dict[str, np.ndarray]:
    """Returns what is `stored` by path, rows of stacks apart: what `fill` takes.

    Args:
      model: plain.
      stacked: regex as in `fill`.
    """
    variables = stored(model)
    arrays = {path: to_host(variable[...]) for path, variable in variables.items()}
    return {
        name: arrays[path] if row is None else arrays[path][row]
        for name, (path, row, _) in places(variables, stacked).items()
    }


def rewritten(
    checkpoint: Checkpoint,
    rules: Sequence[TensorRule],
    parts: Mapping[str, np.ndarray],
    free: str,
) -> tuple[dict[str, np.ndarray], set[str]]:
    """Replaces the numbers in a checkpoint's tensors: `arrange` backwards.

    Args:
      checkpoint: gives names and shapes.
      rules: rules that it was read with.
      parts: arrays by path, in any dtype.
      free: regex of the paths whose part may have another shape, or be missing.

    Returns:
      Tensors by name, in the dtypes of the parts, without those for which no rule has a
      place; and the paths of the parts that went nowhere.

    Raises:
      CheckpointError: no rule knows a tensor, or a part is missing or has another shape
        than what was read.
    """
    tensors: dict[str, np.ndarray] = {}
    left = set(parts)
    for name, tensor in checkpoint.tensors.items():
        try:
            rule, paths = place_of(name, rules)
            fixed = [path for path in paths if not re.fullmatch(free, path)]
            if missing := [path for path in fixed if path not in parts]:
                raise ValueError(f"the model has no {', '.join(missing)}")
            if paths and set(paths) <= parts.keys():
                own = [parts[path] for path in paths]
                left -= set(paths)
                tensors[name] = unmade(rule, own, tensor.shape if fixed else None)
        except ValueError as error:
            raise CheckpointError(checkpoint.path, f"{name}: {error}") from error
    return tensors, left


def unmade(
    rule: TensorRule, parts: Sequence[np.ndarray], shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Returns the tensor that `rule.make` makes the parts from.

    Args:
      rule: whose `make` moves numbers and leaves none out.
      parts: arrays that it should make.
      shape: shape of the tensor; None for the axes of its only part in some order
        (those of a new head).

    Raises:
      ValueError: there is no such tensor.
    """
    shapes = [part.shape for part in parts]
    candidates = itertools.permutations(shapes[0]) if shape is None else [shape]
    for candidate in candidates:
        index = np.arange(math.prod(candidate)).reshape(candidate)
        made = rule.make(index)
        if [where.shape for where in made] == shapes:
            tensor = np.empty(index.size, parts[0].dtype)
            for where, part in zip(made, parts, strict=True):
                tensor[where.ravel()] = part.ravel()
            return tensor.reshape(candidate)
    raise ValueError(f"the model has {shapes}, the file {shape}")
