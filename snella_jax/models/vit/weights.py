"""Published weights for the ViT: files and folders as models."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints import position_grid
from snella_jax.models.checkpoints.build import check_known, filled
from snella_jax.models.checkpoints.config_fields import check_agreement, weak_size
from snella_jax.models.checkpoints.family import Family
from snella_jax.models.checkpoints.formats import (
    ExportFormat,
    TorchFormat,
    is_hugging_face,
    stacked,
)
from snella_jax.models.checkpoints.mapping import arrange
from snella_jax.models.checkpoints.read import Checkpoint, read
from snella_jax.models.checkpoints.rewrite import parts_of
from snella_jax.models.checkpoints.torch_rules import check_numbers
from snella_jax.models.layers import images
from snella_jax.models.vit import formats
from snella_jax.models.vit.config import PRESETS, ViTConfig
from snella_jax.models.vit.formats import recognised
from snella_jax.models.vit.model import ViT

# Heads by width, where no file says it. MoCo v3's ViT-S has 12 narrower ones: where
# names begin as in its files, that width says nothing.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
MOCO_WIDTH, MOCO = 384, {"module", "base_encoder", "momentum_encoder"}
NUMBERS = ("norm_eps", "pixel_mean", "pixel_std", "heads", "image_size")


def load(
    path: str | Path | Checkpoint,
    *,
    weights: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    **overrides: Any,
) -> ViT:
    """Loads a ViT with published weights; the format is recognised.

    Heads, eps and the pixels' mean and deviation are taken from the file's own config
    where it has one, else from what the format's published models have: 0.5 for the
    original and Hugging Face's ViT, ImageNet's for DINOv2, MAE and timm's names. timm's
    augreg weights, as a lone file, need `pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3`.
    What names begin with (`module.`, `_orig_mod.`, `model.backbone.`) is passed over.

    Args:
      path: a file or a Hugging Face folder, see the table of `vit.formats`,
        or what `checkpoints.read` made of one.
      weights: set of weights, if a file holds several: what their names begin with
        (`teacher.backbone`), or where a PyTorch file keeps them (`model_ema`). None
        takes the only ones, or those under `model` or `state_dict`, and logs others.
      num_classes: None keeps the file's head, if it has one; a number makes a new head
        that starts at 0 (Dosovitskiy et al., Section 4.1), and 0 none.
      image_size: size of the images; the position grid is resized to it. None keeps the
        file's. A grid whose size no config says is a square; where the positions make
        none, this is the size that they were made for.
      dtype: dtype of the computation.
      param_dtype: dtype of the weights.
      overrides: other fields of `ViTConfig`, such as `remat` or `stacked`.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      CheckpointError: the file is damaged, holds another architecture, or does not fit;
        lists every tensor without a place and place without a tensor.
      ModuleNotFoundError: reading it needs a package; says which.
      ValueError, TypeError: an option that cannot be, such as an `image_size` that is
        no multiple of the patch.
    """
    check_known(ViTConfig, overrides)
    checkpoint, rules, config = recognised(read(path, weights), num_classes)
    parts, problems = arrange(checkpoint, rules)
    parts = _positions_joined(checkpoint.path, parts)
    config |= overrides | {"dtype": dtype, "param_dtype": param_dtype}
    kept_head = num_classes is None
    config = _shaped(checkpoint, parts, config, problems, image_size, kept_head)
    if image_size is not None:
        config, old = dataclasses.replace(config, image_size=image_size), config.grid
        parts["pos_embed"] = _resized(parts["pos_embed"], old, config.grid)
    return filled(
        ViT,
        config,
        checkpoint,
        parts,
        num_classes=num_classes,
        width=config.width,
        stacked="blocks",
        problems=problems,
    )


def _shaped(
    checkpoint: Checkpoint,
    parts: dict[str, np.ndarray],
    known: dict[str, Any],
    problems: Sequence[str],
    image_size: int | tuple[int, int] | None,
    kept_head: bool,
) -> ViTConfig:
    """Makes the config of what the shapes say, and what is known besides."""

    def error(reason: str) -> CheckpointError:
        return CheckpointError(checkpoint.path, "\n  ".join([reason, *problems]))

    needed = ("patch_embed/kernel", "pos_embed", "blocks/0/mlp/fc1/kernel")
    if missing := [name for name in needed if name not in parts]:
        raise error(f"there is no tensor for {', '.join(missing)}")
    kernel, positions, fc1 = (parts[name] for name in needed)
    if (kernel.ndim, positions.ndim, fc1.ndim) != (4, 3, 2):
        raise error(
            f"unexpected shapes { ({name: parts[name].shape for name in needed}) }"
        )
    height, width, channels, features = kernel.shape
    class_token = "cls_token" in parts
    # Counted, not the largest: a number that leaves a gap is a tensor without a place.
    blocks = {match[1] for name in parts if (match := re.match(r"blocks/(\d+)/", name))}
    shape = {
        "width": features,
        "depth": len(blocks),
        "mlp_dim": fc1.shape[1],
        "patch_size": (height, width),
        "channels": channels,
        "num_classes": parts["head/bias"].size if "head/bias" in parts else 0,
        "class_token": class_token,
        "pool": "cls" if class_token else "mean",
        "layer_scale": 1.0 if "blocks/0/scale1" in parts else None,
    }
    config = shape | known
    try:
        _agree(checkpoint, shape, kept_head)
        if "heads" not in config:
            config["heads"] = _heads(checkpoint, features)
        count = positions.shape[1] - class_token
        config["image_size"] = _image_size(checkpoint, config, count, image_size)
        check_numbers(config, *NUMBERS)
        shaped = ViTConfig(**config)
        if shaped.grid[0] * shaped.grid[1] != count:
            raise ValueError(
                f"{count} positions of patches, expected a grid of "
                f"{shaped.grid[0]} x {shaped.grid[1]}"
            )
    except (ValueError, TypeError, ZeroDivisionError) as wrong:
        raise error(str(wrong).rstrip(".")) from wrong
    return shaped


def _agree(checkpoint: Checkpoint, shape: Mapping[str, Any], kept_head: bool) -> None:
    """Raises a `ValueError` if the folder's config is of other weights."""
    width, hidden = shape["width"], shape["mlp_dim"]
    has = {
        "hidden_size": width,
        "embed_dim": width,
        "num_hidden_layers": shape["depth"],
        "depth": shape["depth"],
        "intermediate_size": hidden,
        "mlp_ratio": hidden / width,
        "patch_size": shape["patch_size"],
        "num_channels": shape["channels"],
        "in_chans": shape["channels"],
        "class_token": shape["class_token"],
        "init_values": shape["layer_scale"] is not None,
    }
    if kept_head and shape["num_classes"]:
        has |= {"num_classes": shape["num_classes"], "label_offset": 0}
    check_agreement(checkpoint, **has)


def _image_size(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    count: int,
    given: int | tuple[int, int] | None,
) -> Any:
    """Returns the size of the images that so many positions were made for."""
    height, width = config["patch_size"]

    def fits(size: Any) -> bool:
        return math.prod(images.pair(size)) == count * height * width

    if "image_size" in config:
        size = config["image_size"]
        if not weak_size(checkpoint, given is not None) or fits(size):
            return size
    side = math.isqrt(max(count, 0))
    if side * side == count:
        return side * height, side * width
    if given is not None and fits(given):
        return given
    without = " (or of a class token without a position)"
    raise ValueError(
        f"{count} positions of patches{without if config['class_token'] else ''}, "
        "which are no square: give image_size=(height, width), of the images that they "
        "were made for"
    )


def _positions_joined(
    path: Path, parts: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Joins the class token's position, which an export keeps apart, and the others."""
    names = ("pos_embed/class", "pos_embed/patches")
    if not all(name in parts for name in names):
        return parts
    try:
        joined = np.concatenate([parts[name] for name in names], 1)
    except ValueError as error:
        raise CheckpointError(path, f"its positions do not fit: {error}") from error
    rest = {name: part for name, part in parts.items() if name not in names}
    return rest | {"pos_embed": joined}


def _heads(checkpoint: Checkpoint, width: int) -> int:
    named = {
        tensor.shape[1]
        for name, tensor in checkpoint.tensors.items()
        if name.endswith("MultiHeadDotProductAttention_1/query/kernel")
        and tensor.ndim == 3
    }
    if len(named) > 1:
        raise ValueError(f"its blocks have different numbers of heads: {named}")
    if named:
        return named.pop()
    if width == MOCO_WIDTH and MOCO & set(checkpoint.prefix.split(".")):
        raise ValueError(
            f"names begin with {checkpoint.prefix!r} and the width is {width}: MoCo "
            f"v3's ViT-S has 12 heads, others have {HEADS[width]}: give heads"
        )
    if width not in HEADS:
        raise ValueError(
            f"width {width} is none of {list(HEADS)}, so the number of heads is not "
            "known: give heads"
        )
    return HEADS[width]


def _resized(
    positions: np.ndarray, old: tuple[int, int], new: tuple[int, int]
) -> np.ndarray:
    extra = positions.shape[1] - old[0] * old[1]
    patches = positions[0, extra:].reshape(*old, -1)
    resized = position_grid.resize(patches, new).reshape(1, new[0] * new[1], -1)
    return np.concatenate([positions[:, :extra], resized], 1)


def export_format(model: ViT, source: Checkpoint) -> ExportFormat:
    """Returns a model's numbers in the format of a checkpoint.

    Raises:
      CheckpointError: the checkpoint is of no known format.
      ValueError: transformers has no head like the model's.
    """
    c = model.config
    checkpoint, rules, known = formats.recognised(source, c.num_classes)
    dinov2 = any(name.endswith("lambda1") for name in checkpoint.tensors)
    parts = parts_of(model, stacked(model, "blocks"))
    if is_hugging_face(checkpoint) and c.num_classes:
        parts["head/kernel"] = _seen(parts["head/kernel"], c.pool, dinov2)
    with_head = r"(pooler|decoder)\..*|" if c.num_classes else ""
    return ExportFormat(
        "dinov2" if dinov2 else "vit",
        "Dinov2" if dinov2 else "ViT",
        checkpoint,
        rules,
        parts,
        free="pos_embed",
        left_out=with_head + formats.PRE_LOGITS,
        config={"num_attention_heads": c.heads, "layer_norm_eps": c.norm_eps},
        known=known,
    )


def _seen(kernel: np.ndarray, pool: str, dinov2: bool) -> np.ndarray:
    """Orders a head's rows as transformers' sees tokens: DINOv2's both, and their mean.

    Raises:
      ValueError: it does not see what the model's does.
    """
    if dinov2:
        halves = [kernel, np.zeros_like(kernel)]
        return np.concatenate(halves[:: 1 if pool == "cls" else -1])
    if pool != "cls":
        raise ValueError(
            'transformers has no ViT with a head on the mean of the tokens: pool="mean"'
        )
    return kernel


def torch_format(config: ViTConfig) -> TorchFormat:
    """Returns the names of a `ViTModel`'s, a `Dinov2Model`'s or timm's tensors.

    Source of the names in memory: `conversion_mapping` of transformers 5.24.
    """
    dinov2 = config.layer_scale is not None
    return TorchFormat(
        [*formats.HUGGING_FACE, *formats.TIMM],
        "blocks" if config.stacked else "(?!)",
        formats.RENAMED[1:] if dinov2 else formats.RENAMED,
    )


FAMILY = Family(
    ViTConfig, ViT, PRESETS, formats.MARKS, load, torch_format, export_format
)
