"""A model's weights as one safetensors file, a tensor for every parameter's path."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from safetensors.numpy import load_file, save_file

from snella_jax.files.hosts import to_host


def save(model: nnx.Module, path: Path) -> None:
    """Writes every `nnx.Param` of `model`; the file appears whole or not at all."""
    tensors = {
        "/".join(map(str, name)): to_host(value[...])
        for name, value in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def load(model: nnx.Module, path: Path, skip: str = "") -> None:
    """Fills `model` in place from a file that `save` wrote.

    Variables under the path `skip` (a replaced head) keep their values.

    Raises:
      ValueError: a tensor without a place, a place without a tensor, or another shape;
        every one is listed.
    """
    tensors = load_file(path)
    places = {
        "/".join(map(str, name)): value
        for name, value in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    if skip:
        tensors = {k: v for k, v in tensors.items() if k.split("/")[0] != skip}
        places = {k: v for k, v in places.items() if k.split("/")[0] != skip}
    problems = [f"no place for {k}" for k in sorted(tensors.keys() - places.keys())]
    problems += [f"no tensor for {k}" for k in sorted(places.keys() - tensors.keys())]
    problems += [
        f"{k}: the file has {tensors[k].shape}, the model {places[k].shape}"
        for k in sorted(tensors.keys() & places.keys())
        if tensors[k].shape != places[k].shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit the model:\n  " + "\n  ".join(problems))
    for name, value in places.items():
        value[...] = jnp.asarray(tensors[name], value.dtype)
