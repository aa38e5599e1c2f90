"""Image classifiers: what all of them share, and the fields of their configs."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from snella_jax.models.layers.activations import Gelu, check_activation
from snella_jax.models.layers.memory import check_remat, kept_names

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns height and width.

    >>> pair(224), pair((192, 256))
    ((224, 224), (192, 256))
    """
    height, width = size if isinstance(size, Sequence) else (size, size)
    return operator.index(height), operator.index(width)


class ImageSizes:
    """Sizes in pixels, for configs with an `image_size` and a `patch_size`."""

    image_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return pair(self.patch_size)


class PatchGrid(ImageSizes):
    """Sizes of images that patches divide."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row of an image."""
        (height, width), (ph, pw) = self.image_hw, self.patch_hw
        return height // ph, width // pw

    def check_patches(self) -> None:
        """Raises a `ValueError` for images that patches do not divide."""
        if any(s % p for s, p in zip(self.image_hw, self.patch_hw, strict=True)):
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of "
                f"patch_size={self.patch_size}."
            )


class Classifier(nnx.Module):
    """An image classifier: features, pooled, and a head.

    Attributes:
      config: has `num_classes`, `image_hw`, `channels`, `pixel_mean` and `pixel_std`.
      head: only there if `config.num_classes` is not 0.
    """

    config: Any
    head: nnx.Linear

    def __call__(
        self, images: Float[Array, "B height width C"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "B classes"]:
        """Returns logits of normalised images, or pooled features if there is no head.

        Args:
          images: pixels, already normalised as the weights expect.
          key: switches stochastic depth on (training); None is deterministic.

        Raises:
          ValueError: the images do not have the configured height, width or channels.
        """
        pooled = self.pooled(images, key)
        return self.head(pooled) if self.config.num_classes else pooled

    def pooled(
        self, images: Float[Array, "B height width C"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "B D"]:
        """Returns the input of the head; arguments and errors as in the call."""
        raise NotImplementedError

    def normalise(
        self, pixels: Float[Array, "B height width C"]
    ) -> Float[Array, "B height width C"]:
        """Returns images as the weights expect them, from pixels in [0, 1].

        Raises:
          TypeError: the pixels are integers, which would be 0 to 255.
        """
        return normalise(pixels, self.config)


def check_fields(config: Any) -> None:
    """Raises a `ValueError` for a classifier's field that cannot be."""
    check_input(config)
    check_kept(config)
    if config.num_classes < 0:
        raise ValueError(f"num_classes={config.num_classes}: expected at least 0.")
    for name in ("pixel_mean", "pixel_std"):
        numbers = getattr(config, name)
        if len(numbers) not in (1, config.channels):
            raise ValueError(f"{name}={numbers}: expected {config.channels} numbers.")
        known = all(map(math.isfinite, numbers))
        if not known or (name == "pixel_std" and min(numbers) <= 0):
            raise ValueError(f"{name}={numbers}: expected finite numbers, std above 0.")
    if not 0 <= config.drop_path < 1:
        raise ValueError(f"drop_path={config.drop_path}: expected 0 <= rate < 1.")


def check_kept(config: Any) -> None:
    """Raises a `ValueError` for a `memory` or an `activation` that cannot be."""
    kept_names(config.memory)
    check_activation(config.activation, Gelu)


def check_input(config: Any) -> None:
    """Raises a `ValueError` for channels, sizes, eps or `remat` that cannot be."""
    if config.channels < 1:
        raise ValueError(f"channels={config.channels}: expected at least 1.")
    if min(*config.image_hw, *config.patch_hw) < 1:
        raise ValueError(
            f"image_size={config.image_size}, patch_size={config.patch_size}: expected "
            "positive numbers of pixels."
        )
    epsilon = getattr(config, "norm_eps", 1e-5)  # Swin has no other
    if not 0 < epsilon < math.inf:
        raise ValueError(f"norm_eps={epsilon}: expected a positive number.")
    check_remat(config.remat)


def check_batch(images: Array, config: Any) -> None:
    """Raises a `ValueError` for images that do not have the config's shape."""
    expected = (*config.image_hw, config.channels)
    if images.ndim != 4 or images.shape[1:] != expected:
        raise ValueError(
            f"images have shape {images.shape}; this model takes "
            f"[B, {', '.join(map(str, expected))}]."
        )


def normalise(
    pixels: Float[Array, "B height width C"], config: Any
) -> Float[Array, "B height width C"]:
    """Normalises pixels in [0, 1] as a model's weights expect them.

    Raises:
      TypeError: integers, which would be 0 to 255.
    """
    if not jnp.issubdtype(jnp.result_type(pixels), jnp.floating):
        raise TypeError(
            f"pixels are {jnp.result_type(pixels)}: expected floats in [0, 1]; "
            "divide by 255."
        )
    mean, std = jnp.array(config.pixel_mean), jnp.array(config.pixel_std)
    return (pixels - mean) / std
