"""Writes weights as one file, or as a folder with shards and their index.

Whole or not at all.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from snella_jax.files.arrays import Stored
from snella_jax.files.atomic import whole_file, whole_folder
from snella_jax.files.hosts import to_host
from snella_jax.files.tensors import write_tensors


def write_file(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes `.npz`, or `.safetensors` with metadata, whole or not at all.

    Raises:
      FileExistsError: there is something at `path`.
    """
    if path.exists():
        raise FileExistsError(f"{path} is there: expected a new file.")
    with whole_file(path) as made:
        if path.suffix == ".npz":
            with made.open("wb") as file:
                np.savez(file, **tensors)  # pyright: ignore[reportArgumentType]
        else:
            write_tensors(_in_order(tensors), made, {"format": "pt", **metadata})


def write_folder(
    folder: Path,
    tensors: Mapping[str, Stored],
    files: Mapping[str, bytes],
    metadata: Mapping[str, str],
    max_shard_bytes: int,
    stem: str = "model",
) -> None:
    """Writes `model.safetensors`, or its shards and their index, and other files.

    With another `stem`, `stem.safetensors` and so on.

    Raises:
      FileExistsError: the folder is there and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there: expected a new folder.")
    metadata = {"format": "pt", **metadata}
    shards = list(_shards(tensors, max_shard_bytes))  # made one after the other
    with whole_folder(folder) as new:
        for name, content in files.items():
            (new / name).write_bytes(content)
        if len(shards) == 1:
            write_tensors(_in_order(shards[0]), new / f"{stem}.safetensors", metadata)
            return
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {},
        }
        for i, shard in enumerate(shards, 1):
            name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(_in_order(shard), new / name, metadata)
            index["weight_map"] |= dict.fromkeys(shard, name)
        text = json.dumps(index, indent=2)
        (new / f"{stem}.safetensors.index.json").write_text(text + "\n", "utf-8")


def _shards(tensors: Mapping[str, Stored], most: int) -> Iterator[dict[str, Stored]]:
    """Yields shards in order, each as full as it gets; a larger tensor has its own."""
    shard: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        size = sum(other.nbytes for other in shard.values())
        if shard and size + tensor.nbytes > most:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _in_order(tensors: Mapping[str, Stored]) -> dict[str, np.ndarray]:
    """Returns the tensors in C order, which safetensors takes for granted."""
    return {name: to_host(tensor) for name, tensor in tensors.items()}
