"""The pre-trained models that runs start from."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx

from experiments.data.transforms import Transform
from experiments.names import unknown
from experiments.paths import at_home
from experiments.pretrained import dinov2_saliency, small_vit
from snella_jax import models

HELP = "python -m experiments.vtab --help"
SHOWN = 5
URL = "https://storage.googleapis.com/vit_models/imagenet21k"
GITHUB = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0"
# Of the presets with published ImageNet-21k weights: file, where it is, its licence.
PUBLISHED = {
    "vit_b16": ("ViT-B_16.npz", URL, "Apache-2.0"),
    "vit_l16": ("ViT-L_16.npz", URL, "Apache-2.0"),
    "vit_h14": ("ViT-H_14.npz", URL, "Apache-2.0"),
    "swin_b": ("swin_base_patch4_window7_224_22k.pth", GITHUB, "MIT"),
    "convnext_b": (
        "convnext_base_22k_224.pth",
        "https://dl.fbaipublicfiles.com/convnext",
        "MIT",
    ),
}
SUFFIXES = (".json", ".safetensors", ".bin")  # of a Hugging Face folder's files


class Choice(Protocol):
    """A base model as a run's config names it."""

    @property
    def model(self) -> str: ...
    @property
    def random_weights(self) -> bool: ...
    @property
    def image_size(self) -> int | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def drop_path(self) -> float: ...
    @property
    def memory(self) -> str: ...
    @property
    def activation(self) -> str: ...
    @property
    def crop(self) -> str: ...
    @property
    def seed(self) -> int: ...


def load(config: Choice, classes: int) -> models.ImageModel:
    """Loads the model that `config.model` names, with a new head that starts at 0.

    Raises:
      ModuleNotFoundError, FileNotFoundError, ValueError: the model is missing, does not
        fit, or has weights that are not finite; says what to do.
    """
    options: dict[str, Any] = {"dtype": jnp.dtype(config.dtype)}
    options |= {"drop_path": config.drop_path, "num_classes": classes}
    options |= {"memory": config.memory, "activation": config.activation}
    if config.model == small_vit.NAME:
        if config.image_size is not None:
            raise ValueError(f"image_size: {small_vit.NAME} takes 28 x 28 alone.")
        model = small_vit.load(config.seed, **options)
    elif config.random_weights and config.model in models.IMAGE_PRESETS:
        size = config.image_size
        options |= {} if size is None else {"image_size": size}
        preset = dataclasses.replace(models.IMAGE_PRESETS[config.model], **options)
        return _of(preset, config)
    else:
        model = _pretrained(config.model, options | {"image_size": config.image_size})
    if config.random_weights:
        return _of(model.config, config)
    check_finite(model, config.model)
    return model


def taken(config: Choice) -> str | None:
    """Returns a warning if `config.model` names both a model and a file."""
    names = {small_vit.NAME, "dinov2_saliency", *PUBLISHED}
    if config.random_weights:
        names |= set(models.IMAGE_PRESETS)
    path = Path(config.model)
    if config.model not in names or not path.exists():
        return None
    return (
        f"{config.model}: the model of that name is taken, not {path.absolute()}; "
        f"--model ./{config.model} takes that"
    )


def check_finite(model: models.Model, name: str) -> None:
    """Raises a `ValueError` that names the weights that are not finite."""
    wrong = [
        "/".join(map(str, path))
        for path, weight in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if not jnp.isfinite(weight[...]).all()
    ]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"{name} has weights that are not finite (NaN, inf), with which nothing "
            f"can be trained: {', '.join(wrong[:SHOWN])}{more}."
        )


def _of(config: Any, choice: Choice) -> models.ImageModel:
    """Makes the randomly initialised image model of a config."""
    return _of_images(models.of(config, nnx.Rngs(choice.seed)), choice.model)


def _of_images(model: models.Model, name: str) -> models.ImageModel:
    """Returns the model; raises a `ValueError` if it takes no images."""
    if not isinstance(model, models.ImageModel):
        raise ValueError(f"--model {name} is a {type(model).__name__}: expected images")
    return model


def _pretrained(name: str, options: dict[str, Any]) -> models.ImageModel:
    if name == "dinov2_saliency":
        return dinov2_saliency.load(**options)
    if name in models.PRESETS and name not in PUBLISHED:
        known = ", ".join(PUBLISHED)
        raise ValueError(
            f"--model {name}: published weights are known of {known}; give a path, or "
            "--random_weights."
        )
    file = given(name)
    for expected, folder, licence in PUBLISHED.values():
        if file == Path(expected) and not file.exists():
            raise FileNotFoundError(
                f"There is no {file} here: get it from {folder}/{file} ({licence}), or "
                "give other weights with --model."
            )
    if file == Path(file.name) and not file.suffix and not file.exists():
        known = [small_vit.NAME, "dinov2_saliency", *PUBLISHED]
        raise ValueError(unknown("model or file", name, known, HELP))
    return _of_images(models.load(file, **options), name)


def given(name: str) -> Path:
    """Returns the file or folder that `--model` names; not for the two demo models."""
    return at_home(PUBLISHED[name][0] if name in PUBLISHED else name)


def files(config: Choice) -> list[Path]:
    """Returns the files that `load` reads; none if all weights are random."""
    if config.model == small_vit.NAME:
        return [small_vit.WEIGHTS]
    if config.random_weights and config.model in models.IMAGE_PRESETS:
        return []
    if config.model == "dinov2_saliency":
        return [dinov2_saliency.path()]
    return files_at(given(config.model))


def files_at(path: Path, *others: str) -> list[Path]:
    """Returns the file of a model's weights, or what a folder has of a model.

    Args:
      others: suffixes of files that count besides those of Hugging Face's folders.
    """
    if not path.is_dir():
        return [path]
    suffixes = (*SUFFIXES, *others)
    return sorted(file for file in path.iterdir() if file.suffix in suffixes)


def transforms(config: Choice, model: models.ImageModel) -> tuple[Transform, Transform]:
    """Returns the transforms of training images and of all others.

    Their means and deviations are those that the weights were trained with.
    """
    given = model.config
    if config.model == small_vit.NAME:
        whole = small_vit.TRANSFORM
    else:
        mean, std = (
            tuple(numbers) * (given.channels // len(numbers))
            for numbers in (given.pixel_mean, given.pixel_std)
        )
        whole = Transform(given.image_hw, mean=mean, std=std)
    if config.crop == "resize":
        return whole, whole
    return (
        dataclasses.replace(whole, crop="random"),
        dataclasses.replace(whole, crop="centre"),
    )
