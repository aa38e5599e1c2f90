"""Published weights for the MMDiT: single files and folders of diffusers as models."""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx
from jaxtyping import DTypeLike

from snella_jax.models.checkpoints.build import configured
from snella_jax.models.checkpoints.family import Family
from snella_jax.models.checkpoints.formats import TorchFormat, stacked
from snella_jax.models.checkpoints.mapping import arrange, fill
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.sd3.mmdit import fields, formats
from snella_jax.models.sd3.mmdit.config import PRESETS, MMDiTConfig
from snella_jax.models.sd3.mmdit.export import STEM, folder
from snella_jax.models.sd3.mmdit.model import MMDiT
from snella_jax.models.sd3.single_file import component


def load(
    path: str | Path | Checkpoint,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    **overrides: Any,
) -> MMDiT:
    """Loads an MMDiT with published weights; the format is recognised.

    Args:
      path: the folder `transformer` of a diffusers pipeline, or a single file such as
        `sd3_medium.safetensors`, or what `checkpoints.read` made of one.
      dtype: dtype of the computation; None for float32.
      param_dtype: dtype of the weights; None for float32.
      overrides: other fields of `MMDiTConfig`, such as `remat` or `stacked`; `heads`
        where the heads of a single file are not 64 wide.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      CheckpointError: a file is damaged or not whole, holds another architecture, such
        as Stable Diffusion 3.5, or does not fit; lists every tensor without a place and
        place without a tensor.
      ValueError, TypeError: an option that cannot be.
    """
    checkpoint, form = formats.recognised(component(path, "mmdit"))
    known = {field.name for field in dataclasses.fields(MMDiTConfig)}
    if unknown := sorted(overrides.keys() - known):
        raise ValueError(
            f"{checkpoint.path} is an MMDiT, which has no {', '.join(unknown)}."
        )
    parts, problems = arrange(
        checkpoint, formats.rules(form, formats.depth_of(checkpoint, form))
    )
    config = configured(
        MMDiTConfig,
        checkpoint,
        lambda: fields.of_checkpoint(checkpoint, form, overrides.get("heads")),
        problems,
    )
    given = {"dtype": dtype, "param_dtype": param_dtype}
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(config, **overrides | given)
    model = nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))
    blocks = stacked(model, "blocks")
    fill(checkpoint.path, parts, model, stacked=blocks, problems=problems)
    return model


def torch_format(config: MMDiTConfig) -> TorchFormat:
    """Returns the names of an `SD3Transformer2DModel`'s tensors, and where they go."""
    rules = formats.rules("diffusers", config.depth)
    return TorchFormat(rules, "blocks" if config.stacked else "(?!)")


FAMILY = Family(
    MMDiTConfig,
    MMDiT,
    PRESETS,
    formats.MARKS,
    load,
    torch_format,
    folder=folder,
    stem=STEM,
)
