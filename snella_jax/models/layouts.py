"""How the numbers of each family lie in the formats that it was published in."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import nnx

from snella_jax.models import convnext, swin
from snella_jax.models.loading import Checkpoint, Rule
from snella_jax.models.rewriting import parts_of
from snella_jax.models.vit import ViT, formats


@dataclass(frozen=True)
class Layout:
    """A model's numbers, and what the format of a checkpoint says of them.

    Attributes:
      family: `model_type` in transformers.
      kind: what the names of its classes begin with there.
      checkpoint: names as the rules know them, without a prefix.
      rules: where its tensors go.
      parts: the model's arrays by the rules' paths.
      free: regex of the paths, beside the head's, whose shape may have changed.
      left_out: regex of the tensors without a place that are not written.
      buffers: what others of these are now, by name.
      config: what `config.json` of transformers says of this family alone.
      known: fields of our config that the checkpoint says, or its format.
    """

    family: str
    kind: str
    checkpoint: Checkpoint
    rules: Sequence[Rule]
    parts: Mapping[str, np.ndarray]
    free: str = "(?!)"
    left_out: str = "(?!)"
    buffers: Mapping[str, np.ndarray] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hugging_face(self) -> bool:
        """Whether the names are those of transformers."""
        return _hugging_face(self.checkpoint)

    @property
    def head(self) -> dict[str, str]:
        """Names of the head's tensors, by path."""
        if "embedding/kernel" in self.checkpoint.tensors:  # the original .npz
            return {path: path for path in ("head/kernel", "head/bias")}
        name = "classifier" if self.hugging_face else "head"
        return {"head/kernel": f"{name}.weight", "head/bias": f"{name}.bias"}


def layout(model: nnx.Module, source: Checkpoint) -> Layout:
    """That of a model in the format of a checkpoint.

    Args:
      model: plain, of `snella_jax.models`.
      source: of its family.

    Raises:
      CheckpointError: it is of another family, or of no known format.
      ValueError: other programs could not run it.
      TypeError: no model of `snella_jax.models`.
    """
    match model:
        case ViT():
            return _vit(model, source)
        case swin.Swin():
            return _swin(model, source)
        case convnext.ConvNeXt():
            return _convnext(model, source)
    raise TypeError(f"{type(model).__name__} is no model of snella_jax.models.")


def _hugging_face(checkpoint: Checkpoint) -> bool:
    return any(name.startswith("embeddings.") for name in checkpoint.tensors)


def _vit(model: ViT, source: Checkpoint) -> Layout:
    c = model.config
    checkpoint, rules, known = formats.recognised(source, c.num_classes)
    dinov2 = any(name.endswith("lambda1") for name in checkpoint.tensors)
    parts = parts_of(model, _stacked(model, "blocks"))
    if _hugging_face(checkpoint) and c.num_classes:
        parts["head/kernel"] = _seen(parts["head/kernel"], c.pool, dinov2)
    with_head = r"(pooler|decoder)\..*|" if c.num_classes else ""
    return Layout(
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
    """The head's rows by what transformers' sees: DINOv2's both tokens and their mean.

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


def _swin(model: swin.Swin, source: Checkpoint) -> Layout:
    """`ValueError`: the last grid is smaller than a window, which others cannot run."""
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
    checkpoint, rules, known = swin.recognised(source)
    parts = parts_of(model, _stacked(model, r"blocks/\d+"))
    index = swin.offsets(c.window, c.window)
    buffers = {
        name: index.astype(tensor.dtype)
        for name, tensor in checkpoint.tensors.items()
        if name.endswith("relative_position_index")
    }
    with_head = r"|(embeddings\.)?mask_token|decoder\..*" if c.num_classes else ""
    return Layout(
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
    """`blocks/2/2/shifted/norm1/scale` as `blocks/2/5/norm1/scale`."""
    match = re.fullmatch(r"(blocks/\d+)/(\d+)/(plain|shifted)/(.*)", path)
    if not match:
        return path
    stage, pair, which, rest = match.groups()
    return f"{stage}/{2 * int(pair) + (which == 'shifted')}/{rest}"


def _convnext(model: convnext.ConvNeXt, source: Checkpoint) -> Layout:
    checkpoint, rules, known = convnext.recognised(source)
    return Layout(
        "convnext",
        "ConvNext",
        checkpoint,
        rules,
        parts_of(model, _stacked(model, r"blocks/\d+")),
        config={"layer_norm_eps": model.config.norm_eps},
        known=known,
    )


def _stacked(model: Any, blocks: str) -> str:
    return blocks if model.config.stacked else "(?!)"
