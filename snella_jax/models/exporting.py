"""Weights written back in the format they were published in.

A `Rule` of the loader only moves numbers: run on their places, it says where each came
from, and so the same table writes what it reads.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from snella_jax.hosts import to_host
from snella_jax.models.atomic import whole_file, whole_folder
from snella_jax.models.checkpoint_error import CheckpointError
from snella_jax.models.loading import Checkpoint, Rule, place_of, places
from snella_jax.rules import variables_of


def parts_of(model: nnx.Module, stacked: str) -> dict[str, np.ndarray]:
    """Every parameter by path, rows of stacked ones apart: what `fill` takes.

    Args:
      model: plain.
      stacked: regex as of `fill`.
    """
    variables = dict(variables_of(model, nnx.Param))
    arrays = {path: to_host(variable[...]) for path, variable in variables.items()}
    return {
        name: arrays[path] if row is None else arrays[path][row]
        for name, (path, row, _) in places(variables, stacked).items()
    }


def rewritten(
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    parts: Mapping[str, np.ndarray],
    free: str,
) -> tuple[dict[str, np.ndarray], set[str]]:
    """The tensors of a checkpoint with these numbers instead: `arrange` backwards.

    Args:
      checkpoint: gives names and shapes.
      rules: that it was read with.
      parts: arrays by path, in any dtype.
      free: regex of the paths whose part may have another shape, or be missing.

    Returns:
      Tensors by name, in the dtypes of the parts, without those for which no rule has a
      place; and the paths of the parts that went nowhere.

    Raises:
      CheckpointError: a part is missing or has another shape than what was read.
    """
    tensors: dict[str, np.ndarray] = {}
    left = set(parts)
    for name, tensor in checkpoint.tensors.items():
        rule, paths = place_of(name, rules)
        fixed = [path for path in paths if not re.fullmatch(free, path)]
        if missing := [path for path in fixed if path not in parts]:
            raise CheckpointError(
                checkpoint.path, f"{name}: the model has no {', '.join(missing)}"
            )
        if paths and set(paths) <= parts.keys():
            own = [parts[path] for path in paths]
            left -= set(paths)
            try:
                tensors[name] = unmade(rule, own, tensor.shape if fixed else None)
            except ValueError as error:
                raise CheckpointError(checkpoint.path, f"{name}: {error}") from error
    return tensors, left


def unmade(
    rule: Rule, parts: Sequence[np.ndarray], shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """The tensor that `rule.make` makes the parts from.

    Args:
      rule: whose `make` moves numbers and leaves none out.
      parts: what it should make.
      shape: of the tensor; None for the axes of its only part in some order (those of
        a new head).

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


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `.npz` or `.safetensors`, whole or not at all.

    Raises:
      FileExistsError: there is something at `path`.
    """
    if path.exists():
        raise FileExistsError(f"{path} is there: expected a new file.")
    with whole_file(path) as made:
        if path.suffix == ".npz":
            with made.open("wb") as file:
                np.savez(file, allow_pickle=False, **tensors)
        else:
            save_file(_in_order(tensors), made, {"format": "pt"})


def write_folder(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    files: Mapping[str, bytes],
    max_shard_bytes: int,
) -> None:
    """Writes `model.safetensors`, or its shards and their index, and other files.

    Raises:
      FileExistsError: the folder is there and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there: expected a new folder.")
    shards = list(_shards(tensors, max_shard_bytes))
    with whole_folder(folder) as new:
        for name, content in files.items():
            (new / name).write_bytes(content)
        if len(shards) == 1:
            save_file(shards[0], new / "model.safetensors", {"format": "pt"})
            return
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {},
        }
        for i, shard in enumerate(shards, 1):
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, new / name, {"format": "pt"})
            index["weight_map"] |= dict.fromkeys(shard, name)
        text = json.dumps(index, indent=2)
        (new / "model.safetensors.index.json").write_text(text + "\n")


def _shards(
    tensors: Mapping[str, np.ndarray], most: int
) -> Iterator[dict[str, np.ndarray]]:
    """In order, each as full as it gets; a larger tensor has one of its own."""
    shard: dict[str, np.ndarray] = {}
    for name, tensor in _in_order(tensors).items():
        size = sum(other.nbytes for other in shard.values())
        if shard and size + tensor.nbytes > most:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _in_order(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """In C order, which safetensors takes for granted."""
    return {name: to_host(tensor) for name, tensor in tensors.items()}
