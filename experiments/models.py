"""The pre-trained models that runs start from."""

from typing import Any

import jax.numpy as jnp

from experiments import dinov2_saliency, small_vit
from experiments.config import RunConfig
from experiments.data.transforms import Transform
from snella_jax.models import vit


def load(config: RunConfig, classes: int) -> vit.ViT:
    """The model that `config.model` names, with a new head that starts at 0.

    Raises:
      ModuleNotFoundError, FileNotFoundError, ValueError: it is not there, or does not
        fit; says what to do.
    """
    options: dict[str, Any] = {"dtype": jnp.dtype(config.dtype)}
    options["drop_path"] = config.drop_path
    if config.model == small_vit.NAME:
        if config.image_size is not None:
            raise ValueError(f"image_size: {small_vit.NAME} takes 28 x 28 alone.")
        return small_vit.load(config.seed, num_classes=classes, **options)
    options |= {"num_classes": classes, "image_size": config.image_size}
    if config.model == "dinov2_saliency":
        return dinov2_saliency.load(**options)
    return vit.load(config.model, **options)


def transform(config: RunConfig, model: vit.ViT) -> Transform:
    """Images as the model's weights expect them: VTAB's resize, their constants."""
    if config.model == small_vit.NAME:
        return small_vit.TRANSFORM
    given = model.config
    mean, std = (
        tuple(numbers) * (given.channels // len(numbers))
        for numbers in (given.pixel_mean, given.pixel_std)
    )
    return Transform(given.image_hw, mean=mean, std=std)
