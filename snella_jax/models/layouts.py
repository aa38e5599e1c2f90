"""How the numbers of each family lie in the formats that it was published in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import nnx

from snella_jax.models import convnext, swin
from snella_jax.models.loading import Checkpoint, Rule
from snella_jax.models.rewriting import parts_of
from snella_jax.models.vit import ViT, checkpoints


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
      config: what `config.json` says of this family alone.
    """

    family: str
    kind: str
    checkpoint: Checkpoint
    rules: Sequence[Rule]
    parts: Mapping[str, np.ndarray]
    free: str = "(?!)"
    left_out: str = "(?!)"
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hugging_face(self) -> bool:
        """Whether the names are those of transformers."""
        return any(name.startswith("embeddings.") for name in self.checkpoint.tensors)

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
      ValueError: a head that transformers' model does not have.
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


def _vit(model: ViT, source: Checkpoint) -> Layout:
    c = model.config
    checkpoint, rules, _ = checkpoints.recognised(source, c.num_classes)
    dinov2 = any(name.endswith("lambda1") for name in checkpoint.tensors)
    parts = parts_of(model, _stacked(model, "blocks"))
    if rules is checkpoints.HUGGING_FACE and c.num_classes:
        parts["head/kernel"] = _seen(parts["head/kernel"], c.pool, dinov2)
    with_head = r"(pooler|decoder)\..*|" if c.num_classes else ""
    return Layout(
        "dinov2" if dinov2 else "vit",
        "Dinov2" if dinov2 else "ViT",
        checkpoint,
        rules,
        parts,
        free="pos_embed",
        left_out=with_head + checkpoints.PRE_LOGITS,
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
    checkpoint, rules, _ = swin.recognised(source)
    parts = parts_of(model, _stacked(model, r"blocks/\d+"))
    with_head = r"|embeddings\.mask_token|decoder\..*"
    return Layout(
        "swin",
        "Swin",
        checkpoint,
        rules,
        {swin.unpaired(path): part for path, part in parts.items()},
        free=r"blocks/.*/bias_table",
        # Buffers, which the window and the image size determine.
        left_out=r".*\.(relative_position_index|attn_mask)"
        + (with_head if model.config.num_classes else ""),
        config={"window_size": model.config.window},
    )


def _convnext(model: convnext.ConvNeXt, source: Checkpoint) -> Layout:
    checkpoint, rules, _ = convnext.recognised(source)
    parts = parts_of(model, _stacked(model, r"blocks/\d+"))
    return Layout("convnext", "ConvNext", checkpoint, rules, parts)


def _stacked(model: Any, blocks: str) -> str:
    return blocks if model.config.stacked else "(?!)"
