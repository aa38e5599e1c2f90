"""Published weights for ConvNeXt: files and folders as models, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from snella_jax.models.checkpoints import stages, torch_rules
from snella_jax.models.checkpoints.family import Family
from snella_jax.models.checkpoints.formats import (
    ExportFormat,
    TorchFormat,
    stacked,
)
from snella_jax.models.checkpoints.mapping import TensorRule, arrange
from snella_jax.models.checkpoints.read import Checkpoint, read
from snella_jax.models.checkpoints.rewrite import parts_of
from snella_jax.models.convnext.model import PRESETS, ConvNeXt, ConvNeXtConfig


def export_format(model: ConvNeXt, source: Checkpoint) -> ExportFormat:
    """Returns a model's numbers in the format of a checkpoint.

    Raises:
      CheckpointError: the checkpoint is of no known format.
    """
    checkpoint, rules, known = recognised(source)
    return ExportFormat(
        "convnext",
        "ConvNext",
        checkpoint,
        rules,
        parts_of(model, stacked(model, r"blocks/\d+")),
        config={"layer_norm_eps": model.config.norm_eps},
        known=known,
    )


def _down(stage: int) -> list[TensorRule]:
    """Returns the rules for what leads to a stage, behind the one before it."""
    names = (
        rf"(?:downsample_layers\.{stage}|encoder\.stages\.{stage}\.downsampling_layer)"
    )
    path = f"down/{stage - 1}"
    return [
        *torch_rules.affine(rf"{names}\.0", f"{path}/norm"),
        *torch_rules.convolution(rf"{names}\.1", f"{path}/conv"),
    ]


# The original's names, or Hugging Face's.
MARKS = (
    r"stages\.0\.0\.dwconv\.weight",
    r"encoder\.stages\.0\.layers\.0\.dwconv\.weight",
)


_BLOCK = r"(?:encoder\.)?stages\.(\d+)\.(?:layers\.)?(\d+)\."


_PLACE = "blocks/{0}/{1}/"


_STEM = r"downsample_layers\.0\."


RULES = [
    *torch_rules.convolution(_STEM + r"0|embeddings\.patch_embeddings", "patch_embed"),
    *torch_rules.affine(_STEM + r"1|embeddings\.layernorm", "embed_norm"),
    *torch_rules.convolution(_BLOCK + "dwconv", _PLACE + "dwconv"),
    *torch_rules.affine(_BLOCK + "(?:layer)?norm", _PLACE + "norm"),
    *torch_rules.linear(_BLOCK + "pwconv([12])", _PLACE + "mlp/fc{2}"),
    TensorRule(_BLOCK + "(?:gamma|layer_scale_parameter)", (_PLACE + "scale",)),
    *(rule for stage in range(1, 10) for rule in _down(stage)),
    *torch_rules.affine("(?:layer)?norm", "norm"),
    *torch_rules.linear("head|classifier", "head"),
]


def load(
    path: str | Path | Checkpoint,
    *,
    weights: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    **overrides: Any,
) -> ConvNeXt:
    """Loads a ConvNeXt: the original `.pth`, or a Hugging Face folder.

    Args:
      path: file or folder, or what `checkpoints.read` made of it.
      weights: as in `vit.load`.
      num_classes: None keeps the file's head, if it has one; a number makes a new head
        that starts at 0, and 0 none.
      image_size: size of the images, any. None is what a folder's config says, and
        224 for the original, which does not say.
      dtype: dtype of the computation.
      param_dtype: dtype of the weights.
      overrides: other fields of `ConvNeXtConfig`, such as `remat`.

    Raises:
      FileNotFoundError, CheckpointError, ModuleNotFoundError, ValueError, TypeError: as
        in `vit.load`.
    """
    checkpoint, rules, known = recognised(read(path, weights))
    arrays, problems = arrange(checkpoint, rules)
    given = {"image_size": image_size, "dtype": dtype, "param_dtype": param_dtype}
    return stages.load(
        (ConvNeXt, ConvNeXtConfig),
        checkpoint,
        arrays,
        problems,
        lambda: _shape(arrays),
        known,
        num_classes,
        given | overrides,
    )


def recognised(
    checkpoint: Checkpoint,
) -> tuple[Checkpoint, list[TensorRule], dict[str, Any]]:
    """Returns the tensors, the rules for them, and what the format says of the config.

    Raises:
      CheckpointError: no known format, or a ConvNeXt of another kind.
    """
    torch_rules.require(checkpoint, MARKS, "ConvNeXt")
    known = stages.fields(checkpoint)
    if any(name.endswith("embeddings.layernorm.weight") for name in checkpoint.tensors):
        # A lone .safetensors has no config: the default of transformers.
        known.setdefault("norm_eps", 1e-12)
    return checkpoint.unwrapped(*MARKS), RULES, known


def _shape(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Reads the shapes as fields of the config."""
    depths = stages.counts(arrays)
    firsts = [f"blocks/{stage}/0" for stage in range(len(depths))]
    return {
        "widths": tuple(arrays[f"{first}/norm/scale"].size for first in firsts),
        "depths": depths,
        "layer_scale": 1.0 if f"{firsts[0]}/scale" in arrays else None,
    }


def torch_format(config: ConvNeXtConfig) -> TorchFormat:
    """Returns the names of a `ConvNextModel`'s tensors, and where they go."""
    return TorchFormat(RULES, r"blocks/\d+" if config.stacked else "(?!)")


FAMILY = Family(
    ConvNeXtConfig,
    ConvNeXt,
    PRESETS,
    MARKS,
    load,
    torch_format,
    export_format,
)
