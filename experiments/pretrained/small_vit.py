"""The quickstart's small ViT, pre-trained on Fashion-MNIST by `pretrain.py`."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float

from experiments.data.transforms import Transform
from experiments.pretrained import weights
from snella_jax.models.vit import ViT, ViTConfig

# 0.68 million parameters: 2.7 MB of float32. A patch covers 2 x 2 pixels of a digit.
SMALL = ViTConfig(
    width=96, depth=6, heads=3, patch_size=7, image_size=28, channels=1, num_classes=10
)
NAME = "vit_fashion_mnist"
WEIGHTS = Path(__file__).with_name("vit_fashion_mnist.safetensors")
MEAN, STD = 0.286, 0.353  # of Fashion-MNIST's training pixels in [0, 1]


def load(seed: int, **options: Any) -> ViT:
    """The pre-trained model with a new head.

    Args:
      seed: of what the file does not hold.
      options: other fields of the config, such as `num_classes` or `dtype`.
    """
    config = dataclasses.replace(SMALL, **options)
    model = ViT(config, rngs=nnx.Rngs(seed))
    weights.load(model, WEIGHTS, skip="head")
    return model


# Grey images of any size as the model was trained on them.
TRANSFORM = Transform(SMALL.image_hw, mean=(MEAN,), std=(STD,), resample="bilinear")


def normalise(
    pixels: Float[np.ndarray, "N 28 28 1"],
) -> Float[np.ndarray, "N 28 28 1"]:
    """Pixels in [0, 1] to the float32 that the model was trained on."""
    return ((pixels - MEAN) / STD).astype(np.float32)
