"""The quickstart's small ViT, pre-trained on Fashion-MNIST.

`python -m experiments.pretrained.pretrain` made its weights.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors.numpy import load_file, save_file

from experiments.data.transforms import Transform
from snella_jax.files.atomic import whole_file
from snella_jax.files.hosts import to_host
from snella_jax.models.vit import ViT, ViTConfig

# 0.68 million parameters: 2.7 MB of float32. A patch covers 2 x 2 pixels of a digit.
SMALL = ViTConfig(
    width=96, depth=6, heads=3, patch_size=7, image_size=28, channels=1, num_classes=10
)
NAME = "vit_fashion_mnist"
WEIGHTS = Path(__file__).with_name("vit_fashion_mnist.safetensors")
MEAN, STD = 0.286, 0.353  # of Fashion-MNIST's training pixels in [0, 1]
# Grey images of any size as the model was trained on them.
TRANSFORM = Transform(SMALL.image_hw, mean=(MEAN,), std=(STD,), resample="bilinear")


def load(seed: int, **options: Any) -> ViT:
    """Returns the pre-trained model with a new head.

    Args:
      seed: seed of the parameters that the file does not hold.
      options: other fields of the config, such as `num_classes` or `dtype`.
    """
    config = dataclasses.replace(SMALL, **options)
    model = ViT(config, rngs=nnx.Rngs(seed))
    fill(model, WEIGHTS, skip="head")
    return model


def normalise(
    pixels: Float[np.ndarray, "N 28 28 1"],
) -> Float[np.ndarray, "N 28 28 1"]:
    """Turns pixels in [0, 1] into the float32 that the model was trained on."""
    return ((pixels - MEAN) / STD).astype(np.float32)


def save(model: nnx.Module, path: Path) -> None:
    """Writes every `nnx.Param` of a model, by its path, into a safetensors file.

    The file appears whole or not at all.
    """
    with whole_file(path) as new:
        save_file({name: to_host(v[...]) for name, v in _named(model).items()}, new)


def fill(model: nnx.Module, path: Path, skip: str = "") -> None:
    """Fills a model in place from a file that `save` wrote.

    Args:
      skip: first name of the paths whose values stay, such as `head`; none by default.

    Raises:
      ValueError: a tensor or a parameter has no counterpart, or another shape; every
        one is listed.
    """
    tensors, places = (
        {name: value for name, value in found.items() if name.split("/")[0] != skip}
        for found in (load_file(path), _named(model))
    )
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


def _named(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Returns the parameters by their paths, joined with slashes."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, name)): value for name, value in state}
