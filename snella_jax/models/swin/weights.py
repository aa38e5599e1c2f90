"""Published weights for the Swin Transformer: files and folders as models, and back."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints import position_grid, stages, torch_rules
from snella_jax.models.checkpoints.family import Family
from snella_jax.models.checkpoints.formats import (
    ExportFormat,
    TorchFormat,
    stacked,
)
from snella_jax.models.checkpoints.mapping import TensorRule, arrange
from snella_jax.models.checkpoints.read import Checkpoint, read
from snella_jax.models.checkpoints.rewrite import parts_of
from snella_jax.models.swin.model import EPS, PRESETS, Swin, SwinConfig, offsets


def export_format(model: Swin, source: Checkpoint) -> ExportFormat:
    """Returns a model's numbers in the format of a checkpoint.

    Raises:
      CheckpointError: the checkpoint is of no known format.
      ValueError: the last grid is smaller than a window, which others cannot run.
    """
    c = model.config
    coarse = 2 ** (len(c.depths) - 1)
    last = [
        math.ceil(pixels / (patch * coarse))
        for pixels, patch in zip(c.image_hw, c.patch_hw, strict=True)
    ]
    if min(last) < c.window:
        raise ValueError(
            f"image_size={c.image_size}: the last grid is {last[0]} x {last[1]}, and "
            f"other programs expect at least a window, {c.window} x {c.window}."
        )
    checkpoint, rules, known = recognised(source)
    parts = parts_of(model, stacked(model, r"blocks/\d+"))
    index = offsets(c.window, c.window)
    buffers = {
        name: index.astype(tensor.dtype)
        for name, tensor in checkpoint.tensors.items()
        if name.endswith("relative_position_index")
    }
    with_head = r"|(embeddings\.)?mask_token|decoder\..*" if c.num_classes else ""
    return ExportFormat(
        "swin",
        "Swin",
        checkpoint,
        rules,
        {_unpaired(path): part for path, part in parts.items()},
        free=r"blocks/.*/bias_table",
        left_out=r".*\.attn_mask" + with_head,  # a buffer, by the image size
        buffers=buffers,
        config={"window_size": c.window, "num_heads": list(c.heads)},
        known=known,
    )


def _unpaired(path: str) -> str:
    """Turns `blocks/2/2/shifted/norm1/scale` into `blocks/2/5/norm1/scale`."""
    match = re.fullmatch(r"(blocks/\d+)/(\d+)/(plain|shifted)/(.*)", path)
    if not match:
        return path
    stage, pair, which, rest = match.groups()
    return f"{stage}/{2 * int(pair) + (which == 'shifted')}/{rest}"


# The original's names, or Hugging Face's; `_paired` then makes pairs of the blocks.
MARKS = (
    r"layers\.0\.blocks\.\d+\.(?:norm|attn|mlp).*",
    r"encoder\.layers\.0\.blocks\.\d+\.(?:layernorm|attention|intermediate|output).*",
)


_STAGE = r"(?:encoder\.)?layers\.(\d+)\."


_BLOCK = _STAGE + r"blocks\.(\d+)\."


_PLACE = "blocks/{0}/{1}/"


_BIASES = r"(?:attn|attention\.self)\.relative_position_"


RULES = [
    *torch_rules.convolution(
        r"(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)", "patch_embed"
    ),
    *torch_rules.affine(r"(?:patch_embed|embeddings)\.norm", "embed_norm"),
    *torch_rules.affine(_BLOCK + "(?:norm1|layernorm_before)", _PLACE + "norm1"),
    *torch_rules.affine(_BLOCK + "(?:norm2|layernorm_after)", _PLACE + "norm2"),
    *torch_rules.fused(_BLOCK + r"attn\.qkv", _PLACE + "attn"),
    *torch_rules.linear(
        _BLOCK + r"attention\.self\.(query|key|value)", _PLACE + "attn/{2}"
    ),
    *torch_rules.linear(
        _BLOCK + r"(?:attn\.proj|attention\.output\.dense)", _PLACE + "attn/out"
    ),
    *torch_rules.linear(
        _BLOCK + r"(?:mlp\.fc1|intermediate\.dense)", _PLACE + "mlp/fc1"
    ),
    *torch_rules.linear(_BLOCK + r"(?:mlp\.fc2|output\.dense)", _PLACE + "mlp/fc2"),
    TensorRule(_BLOCK + _BIASES + "bias_table", (_PLACE + "attn/bias_table",)),
    TensorRule(_BLOCK + _BIASES + "index"),
    TensorRule(_BLOCK + "attn_mask"),
    *torch_rules.affine(_STAGE + r"downsample\.norm", "down/{0}/norm"),
    *torch_rules.linear(_STAGE + r"downsample\.reduction", "down/{0}/reduction"),
    *torch_rules.affine("(?:layer)?norm", "norm"),
    *torch_rules.linear("head|classifier", "head"),
    TensorRule(r"(?:embeddings\.)?mask_token|decoder\..*"),  # of SimMIM's pre-training
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
) -> Swin:
    """Loads a Swin: the original `.pth`, or a Hugging Face folder.

    Args:
      path: file or folder, or what `checkpoints.read` made of it.
      weights: as in `vit.load`.
      num_classes: None keeps the file's head, if it has one; a number makes a new head
        that starts at 0, and 0 none.
      image_size: size of the images, any. None is the file's own; the original does
        not say, and there it is the one whose last grid is one window. As in a model of
        transformers that is built for that size, which windows shift follows from it.
      dtype: dtype of the computation.
      param_dtype: dtype of the weights.
      overrides: other fields of `SwinConfig`, such as `remat`; with another `window`
        the tables of biases are resized.

    Raises:
      FileNotFoundError, CheckpointError, ModuleNotFoundError, ValueError, TypeError: as
        in `vit.load`.
    """
    checkpoint, rules, known = recognised(read(path, weights))
    blocks, problems = arrange(checkpoint, rules)
    arrays = {_paired(place): array for place, array in blocks.items()}
    given = {"image_size": image_size, "dtype": dtype, "param_dtype": param_dtype}
    return stages.load(
        (Swin, SwinConfig),
        checkpoint,
        arrays,
        problems,
        lambda: _shape(arrays),
        known,
        num_classes,
        given | overrides,
        resized_tables,
    )


def recognised(
    checkpoint: Checkpoint,
) -> tuple[Checkpoint, list[TensorRule], dict[str, Any]]:
    """Returns the tensors, the rules for them, and what the format says of the config.

    Raises:
      CheckpointError: no known format, or a Swin of another kind.
    """
    torch_rules.require(checkpoint, MARKS, "Swin")
    known = stages.fields(checkpoint)
    if known.pop("norm_eps", EPS) != EPS:
        raise CheckpointError(checkpoint.path, f"expected layer_norm_eps={EPS}")
    return checkpoint.unwrapped(*MARKS), RULES, known


def _paired(path: str) -> str:
    """Turns `blocks/2/5/norm1/scale` into `blocks/2/2/shifted/norm1/scale`."""
    match = re.fullmatch(r"(blocks/\d+)/(\d+)/(.*)", path)
    if not match:
        return path
    pair, second = divmod(int(match[2]), 2)
    return f"{match[1]}/{pair}/{'shifted' if second else 'plain'}/{match[3]}"


def _shape(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Reads the shapes as fields of the config."""
    pairs = stages.counts(arrays)
    firsts = [f"blocks/{stage}/0/plain" for stage in range(len(pairs))]
    rows, heads = zip(
        *(arrays[f"{f}/attn/bias_table"].shape for f in firsts), strict=True
    )
    if len(set(rows)) > 1:
        raise ValueError(f"tables of {rows} biases: expected one window for all stages")
    height, width, _, features = arrays["patch_embed/kernel"].shape
    window = (torch_rules.root(rows[0]) + 1) // 2
    last = window * 2 ** (len(pairs) - 1)  # in patches
    return {
        "width": features,
        "depths": tuple(2 * count for count in pairs),
        "heads": heads,
        "window": window,
        "mlp_ratio": arrays[f"{firsts[0]}/mlp/fc1/kernel"].shape[1] / features,
        "image_size": (height * last, width * last),
    }


def resized_tables(
    arrays: Mapping[str, np.ndarray], config: SwinConfig
) -> dict[str, np.ndarray]:
    """Returns the arrays with tables of biases for the config's window."""
    side = 2 * config.window - 1
    fitted = dict(arrays)
    for path, table in arrays.items():
        if path.endswith("/bias_table") and len(table) != side * side:
            old = torch_rules.root(len(table))
            resized = position_grid.resize(table.reshape(old, old, -1), (side, side))
            fitted[path] = resized.reshape(side * side, -1)
    return fitted


RENAMED = (
    ("attention.self.query", "attention.q_proj"),
    ("attention.self.key", "attention.k_proj"),
    ("attention.self.value", "attention.v_proj"),
    (
        "attention.self.relative_position_bias_table",
        "attention.relative_position_bias.relative_position_bias_table",
    ),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


def torch_format(config: SwinConfig) -> TorchFormat:
    """Returns the names of a `SwinModel`'s tensors, and where they go.

    Source of the names in memory: `conversion_mapping` of transformers 5.24.
    """
    blocks = r"blocks/\d+" if config.stacked else "(?!)"
    return TorchFormat(RULES, blocks, RENAMED, _paired)


FAMILY = Family(SwinConfig, Swin, PRESETS, MARKS, load, torch_format, export_format)
