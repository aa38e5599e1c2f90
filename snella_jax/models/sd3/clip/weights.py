"""Published weights for CLIP's towers: files and folders as models."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from snella_jax.files.arrays import Stored
from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.build import configured
from snella_jax.models.checkpoints.formats import stacked
from snella_jax.models.checkpoints.mapping import TensorRule, arrange, fill
from snella_jax.models.checkpoints.read import Checkpoint, read
from snella_jax.models.checkpoints.torch_rules import root
from snella_jax.models.sd3.clip import fields, formats
from snella_jax.models.sd3.clip.config import (
    PRESETS,
    ClipImageConfig,
    ClipTextConfig,
)
from snella_jax.models.sd3.clip.model import ClipImage, ClipText
from snella_jax.models.sd3.single_file import component, parts_in

Part = Literal["clip_l", "clip_g"]
NO_PROJECTION = TensorRule(r"text_projection(\.weight)?")
M = TypeVar("M", ClipText, ClipImage)


def load(
    path: str | Path | Checkpoint,
    *,
    part: Part | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    **overrides: Any,
) -> ClipText:
    """Loads a tower of texts with published weights; the format is recognised.

    Without a projection in the file the pooled state is not projected. Neither is that
    of `part="clip_l"` from a file without a config, whatever projection stands there:
    Stable Diffusion 3 uses it so.

    Args:
      path: folder of transformers (`CLIPTextModelWithProjection`, `CLIPTextModel`,
        `CLIPModel`), OpenAI's archive (`.pt`), a single file of Stable Diffusion 3,
        `clip_l.safetensors` or `clip_g.safetensors`, or what `checkpoints.read` made
        of one.
      part: part of Stable Diffusion 3 that is meant, for files without a config.
      dtype: dtype of the computation; None for float32.
      param_dtype: dtype of the weights; None for float32.
      overrides: other fields of `ClipTextConfig`, such as `remat` or `stacked`.

    Raises:
      FileNotFoundError: there is nothing at `path`, or no weights in the folder.
      CheckpointError: a file is damaged, holds another architecture or part, or does
        not fit; lists every tensor without a place and place without a tensor.
      ValueError, TypeError: an option that cannot be.
    """
    if part is not None and part not in get_args(Part):
        raise ValueError(f"part={part!r}: expected {' or '.join(get_args(Part))}.")
    checkpoint = read(path) if part is None else component(path, part)
    if part is None and (parts := parts_in(checkpoint)):
        clips = [name for name in parts if name in get_args(Part)]
        which = f"say which with part={' or '.join(clips)}" if clips else "no CLIP"
        raise CheckpointError(checkpoint.path, f"it holds {', '.join(parts)}: {which}")
    checkpoint, form = formats.recognised(checkpoint, "text")
    rules = formats.RULES["text"][form]
    lone = part is not None and not checkpoint.config
    if lone and part == "clip_l":
        rules = [NO_PROJECTION, *rules]
    parts, problems = arrange(checkpoint, rules)

    def said() -> dict[str, Any]:
        shape = _shape(parts)
        shape["vocab_size"] = len(_array(parts, "embed/embedding", 2))
        shape["positions"] = len(_array(parts, "pos_embed", 2))
        if part is not None:
            _check_part(part, shape["width"])
        if lone and form == "transformers" and part is not None:
            activation = PRESETS[part].activation
            return shape | fields.of_part(shape["width"], activation)
        return shape | fields.known(checkpoint, form, "text", shape)

    given = overrides | {"dtype": dtype, "param_dtype": param_dtype}
    config = _configured(ClipTextConfig, checkpoint, said, given, problems)
    return _filled(ClipText, config, checkpoint, parts, problems)


def load_image(
    path: str | Path | Checkpoint,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    **overrides: Any,
) -> ClipImage:
    """Loads a tower of images with published weights; the format is recognised.

    Args:
      path: folder of transformers (`CLIPModel`, `CLIPVisionModelWithProjection`,
        `CLIPVisionModel`), OpenAI's archive (`.pt`), or what `checkpoints.read` made of
        one.
      dtype: dtype of the computation; None for float32.
      param_dtype: dtype of the weights; None for float32.
      overrides: other fields of `ClipImageConfig`, such as `remat` or `stacked`.

    Raises:
      FileNotFoundError, CheckpointError, ValueError, TypeError: as in `load`.
    """
    checkpoint, form = formats.recognised(read(path), "image")
    parts, problems = arrange(checkpoint, formats.RULES["image"][form])

    def said() -> dict[str, Any]:
        height, width, channels, _ = _array(parts, "patch_embed/kernel", 4).shape
        shape = _shape(parts) | {"patch_size": (height, width), "channels": channels}
        known = fields.known(checkpoint, form, "image", shape)
        count = len(_array(parts, "pos_embed", 2)) - 1
        if "image_size" not in known and "image_size" not in overrides:
            side = root(count)
            known["image_size"] = (side * height, side * width)
        return shape | known

    given = overrides | {"dtype": dtype, "param_dtype": param_dtype}
    config = _configured(ClipImageConfig, checkpoint, said, given, problems)
    return _filled(ClipImage, config, checkpoint, parts, problems)


def _shape(parts: Mapping[str, Stored]) -> dict[str, Any]:
    """Returns the fields of both towers that the shapes say.

    Raises:
      KeyError: there is no tensor for one of them.
      ValueError: one has another number of axes.
    """
    # Counted, not the largest: a number that leaves a gap is a tensor without a place.
    blocks = {match[1] for name in parts if (match := re.match(r"blocks/(\d+)/", name))}
    kernel = parts.get("projection/kernel")
    width, hidden = _array(parts, "blocks/0/mlp/fc1/kernel", 2).shape
    return {
        "width": width,
        "depth": len(blocks),
        "mlp_dim": hidden,
        "projection": None if kernel is None else kernel.shape[-1],
    }


def _array(parts: Mapping[str, Stored], name: str, axes: int) -> Any:
    array = parts[name]
    if len(array.shape) != axes:
        raise ValueError(f"{name} {list(array.shape)}: expected {axes} axes")
    return array


def _check_part(part: Part, width: int) -> None:
    """Raises a `ValueError` if a width is that of another part."""
    for other in get_args(Part):
        if other != part and width == PRESETS[other].width:
            raise ValueError(f"it is {width} wide, as {other}: expected {part}")


def _configured(
    kind: Any,
    checkpoint: Checkpoint,
    said: Any,
    given: dict[str, Any],
    problems: list[str],
) -> Any:
    """Makes a config of what a file says, and of what was given.

    Raises:
      CheckpointError: the file says too little, or what cannot be.
      ValueError: there is no such field.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}.")
    dtypes = {
        name: jnp.dtype(jnp.float32 if given[name] is None else given[name])
        for name in ("dtype", "param_dtype")
    }

    def all_fields() -> dict[str, Any]:
        found = said() | given | dtypes
        if missing := sorted({"activation", "heads"} - found.keys()):
            raise ValueError(
                f"no config.json says its {' and '.join(missing)}: give the folder "
                f"with it, or {', '.join(f'{name}=' for name in missing)}"
            )
        return found

    return configured(kind, checkpoint, all_fields, problems)


def _filled(
    kind: type[M],
    config: Any,
    checkpoint: Checkpoint,
    parts: Mapping[str, Stored],
    problems: list[str],
) -> M:
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    blocks = stacked(model, "blocks")
    fill(checkpoint.path, parts, model, stacked=blocks, problems=problems)
    return model
