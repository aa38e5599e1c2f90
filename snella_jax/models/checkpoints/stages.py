"""Loads published weights of models with stages: Swin and ConvNeXt."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.build import configured, filled, given
from snella_jax.models.checkpoints.config_fields import check_agreement, config_fields
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.checkpoints.torch_rules import check_numbers

Arrays = Mapping[str, np.ndarray]
Prepare = Callable[[Arrays, Any], Arrays]


def fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads what config files say of the config and shapes do not.

    Raises:
      CheckpointError: as `config_fields`, or a head that sees no mean.
    """
    known = config_fields(checkpoint)
    if (pool := known.pop("pool", "mean")) != "mean":
        raise CheckpointError(checkpoint.path, f'global_pool={pool!r}: expected "avg"')
    known.pop("heads", None)  # in the tables of biases, if there are any
    return known


def load(
    kinds: tuple[Callable[..., Any], type],
    checkpoint: Checkpoint,
    arrays: Mapping[str, np.ndarray],
    problems: Sequence[str],
    shape: Callable[[], dict[str, Any]],
    known: Mapping[str, Any],
    num_classes: int | None,
    options: Mapping[str, Any],
    prepare: Prepare = lambda arrays, config: arrays,
) -> Any:
    """Makes a model with published weights.

    Args:
      kinds: classes of the model and its config.
      checkpoint: for errors.
      arrays: by path, as `arrange` gave them, and the `problems` that it found.
      shape: fields of the config, what shapes say.
      known: fields that config files and the format say.
      num_classes: as in `filled`.
      options: fields that the caller gives; None leaves what the file says.
      prepare: the arrays as the config needs them.

    Raises:
      CheckpointError: as `configured` and `filled`.
      ValueError, TypeError: an option that cannot be.
    """
    kind, config_kind = kinds

    def of_the_file() -> dict[str, Any]:
        height, width, channels, _ = arrays["patch_embed/kernel"].shape
        classes = arrays["head/bias"].size if "head/bias" in arrays else 0
        patches = {"patch_size": (height, width), "channels": channels}
        shapes = patches | {"num_classes": classes} | shape()
        _agree(checkpoint, shapes, num_classes is None)
        found = {**shapes, **known}
        check_numbers(found, "pixel_mean", "pixel_std", "norm_eps", "image_size")
        return found

    config = configured(config_kind, checkpoint, of_the_file, problems)
    config = dataclasses.replace(config, **given(config_kind, options))
    return filled(
        kind,
        config,
        checkpoint,
        prepare(arrays, config),
        num_classes=num_classes,
        width=config.widths[-1],
        stacked=r"blocks/\d+",
        problems=problems,
    )


THEIRS = {  # what configs of timm and transformers call fields of ours
    "width": ("embed_dim",),
    "widths": ("hidden_sizes", "dims"),
    "depths": ("depths",),
    "heads": ("num_heads",),
    "window": ("window_size",),
    "mlp_ratio": ("mlp_ratio",),
    "patch_size": ("patch_size",),
    "channels": ("num_channels", "in_chans"),
}


def _agree(checkpoint: Checkpoint, shapes: Mapping[str, Any], kept_head: bool) -> None:
    """Raises a `ValueError` if the folder's config is of other weights."""
    has = {
        theirs: shapes[ours]
        for ours, names in THEIRS.items()
        for theirs in names
        if ours in shapes
    }
    stages = len(shapes["depths"])
    has |= {"num_layers": stages, "num_stages": stages}
    if kept_head and shapes["num_classes"]:
        has |= {"num_classes": shapes["num_classes"], "label_offset": 0}
    check_agreement(checkpoint, **has)


def counts(arrays: Mapping[str, Any]) -> tuple[int, ...]:
    """Counts the blocks of each stage, by the paths of their arrays.

    Counted, not the largest: a number that leaves a gap is a tensor without a place.
    """
    found = (re.match(r"blocks/(\d+)/(\d+)/", path) for path in arrays)
    blocks = {match.groups() for match in found if match}
    stages = [stage for stage, _ in blocks]
    return tuple(stages.count(str(i)) for i in range(len(set(stages))))
