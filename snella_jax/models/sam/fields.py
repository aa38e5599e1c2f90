"""Fields of SAM's config, from Hugging Face's `config.json` or from shapes.

What changes outputs is obeyed, compared, or refused by name.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from snella_jax.models.checkpoints.config_fields import config_fields
from snella_jax.models.checkpoints.json_fields import count, number, only
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.sam import mobile_sam
from snella_jax.models.sam.prompts import EPS
from snella_jax.models.sam.tiny_vit import TinyViTConfig
from snella_jax.models.sam.vit_encoder import ViTEncoderConfig

YES = (True,)
SECTIONS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
# Fields of these, and of the whole, that have to be so, or absent.
ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {"model_type": ("sam",), "quantization_config": (None,)},
    "vision_config": {
        "hidden_act": ("gelu",),
        "qkv_bias": YES,
        "use_abs_pos": YES,
        "use_rel_pos": YES,
    },
    "prompt_encoder_config": {
        "hidden_act": ("gelu",),
        "num_point_embeddings": (4,),
        "layer_norm_eps": (EPS,),
    },
    "mask_decoder_config": {
        "hidden_act": ("relu",),
        "attention_downsample_rate": (2,),
        "iou_head_depth": (3,),
    },
}
GLOBAL = (2, 5, 8, 11)  # transformers' default


def of_hugging_face(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads `config.json`; what is absent has transformers' default.

    Raises:
      ValueError, TypeError: it says what no SAM here computes, or contradicts itself.
    """
    said = checkpoint.config
    if not said:
        raise ValueError(
            "there is no config.json, which says how many heads there are: expected "
            "the whole folder"
        )
    only(said, ONLY[""])
    for name in SECTIONS:
        section = said.get(name, {})
        if not isinstance(section, Mapping):
            raise ValueError(f"{name}={section!r}: expected an object")
        only(section, ONLY[name])
    vision, prompts, decoder = (said.get(name, {}) for name in SECTIONS)
    size, patch = count(vision, "image_size", 1024), count(vision, "patch_size", 16)
    out = count(vision, "output_channels", 256)
    expected = [
        (vision, "num_pos_feats", 128, out // 2),
        (prompts, "hidden_size", 256, out),
        (prompts, "image_size", 1024, size),
        (prompts, "patch_size", 16, patch),
        (decoder, "hidden_size", 256, out),
    ]
    for section, name, default, other in expected:
        if (found := count(section, name, default)) != other:
            raise ValueError(f"{name}={found}: expected {other}, as elsewhere in it")
    return {
        "encoder": _vision(vision, size, patch, out),
        "decoder_depth": count(decoder, "num_hidden_layers", 2),
        "decoder_heads": count(decoder, "num_attention_heads", 8),
        "decoder_mlp_dim": count(decoder, "mlp_dim", 2048),
        "decoder_norm_eps": number(decoder, "layer_norm_eps", 1e-6),
        "iou_hidden": count(decoder, "iou_head_hidden_dim", 256),
        "masks": 1 + count(decoder, "num_multimask_outputs", 3),
        "mask_channels": count(prompts, "mask_input_channels", 16),
        **config_fields(dataclasses.replace(checkpoint, config={})),  # of the pixels
    }


def _vision(
    said: Mapping[str, Any], size: int, patch: int, out: int
) -> ViTEncoderConfig:
    width, depth = count(said, "hidden_size", 768), count(said, "num_hidden_layers", 12)
    indices = said.get("global_attn_indexes", GLOBAL)
    if not isinstance(indices, list | tuple) or any(
        type(i) is not int for i in indices
    ):
        raise ValueError(f"global_attn_indexes={indices!r}: expected integers")
    return ViTEncoderConfig(
        width=width,
        depth=depth,
        heads=count(said, "num_attention_heads", 12),
        global_blocks=tuple(sorted({*indices} & {*range(depth)})),
        mlp_dim=count(said, "mlp_dim", int(width * number(said, "mlp_ratio", 4.0))),
        window=count(said, "window_size", 14),
        out_channels=out,
        patch_size=patch,
        image_size=size,
        channels=count(said, "num_channels", 3),
        norm_eps=number(said, "layer_norm_eps", 1e-6),
    )


def of_meta(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Reads shapes; what they do not say, the decoder's heads, is Meta's default.

    Args:
      parts: arrays by path, as the rules of `formats` give them.

    Raises:
      KeyError: there is no part that it needs.
      ValueError, IndexError: shapes that no SAM has.
    """
    return {"encoder": _vit(parts), **_rest(parts)}


def of_mobile_sam(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Reads shapes, as `of_meta`; images are 1024 pixels wide and high."""
    encoder = TinyViTConfig(**mobile_sam.fields(parts))
    return {"encoder": encoder, **_rest(parts)}


def _rest(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the shapes of prompt encoder and decoder."""
    return {
        "decoder_depth": _blocks(parts, "decoder/layers"),
        "decoder_mlp_dim": parts["decoder/layers/0/mlp/fc1/kernel"].shape[1],
        "iou_hidden": parts["decoder/iou/fc1/kernel"].shape[1],
        "masks": len(parts["decoder/mask_tokens"]),
        "mask_channels": parts["prompts/mask/conv2/kernel"].shape[3],
    }


def _vit(parts: Mapping[str, Any]) -> ViTEncoderConfig:
    depth = _blocks(parts, "encoder/blocks")
    height, width = parts["encoder/pos_embed"].shape[1:3]
    patch_h, patch_w, channels, features = parts["encoder/patch_embed/kernel"].shape
    paths = [f"encoder/blocks/{i}/attn/rel_pos_" for i in range(depth)]
    lengths = [tuple(len(parts[path + axis]) for axis in "hw") for path in paths]
    whole = [
        i for i, own in enumerate(lengths) if own == (2 * height - 1, 2 * width - 1)
    ]
    windows = {own for i, own in enumerate(lengths) if i not in whole}
    if len(windows) > 1 or any(h != w or h % 2 == 0 for h, w in windows):
        raise ValueError(
            f"tables of relative positions of lengths {sorted(windows)}: expected one "
            f"odd length, or {2 * height - 1} and {2 * width - 1}, as the grid is "
            f"{height} x {width}"
        )
    head_dim = parts[f"{paths[0]}h"].shape[1]
    return ViTEncoderConfig(
        width=features,
        depth=depth,
        heads=features // head_dim,
        global_blocks=tuple(whole),
        mlp_dim=parts["encoder/blocks/0/mlp/fc1/kernel"].shape[1],
        window=(windows.pop()[0] + 1) // 2 if windows else 14,
        out_channels=parts["encoder/neck/conv1/kernel"].shape[3],
        patch_size=_side(patch_h, patch_w),
        image_size=_side(patch_h * height, patch_w * width),
        channels=channels,
    )


def _side(height: int, width: int) -> int | tuple[int, int]:
    return height if height == width else (height, width)


def _blocks(parts: Mapping[str, Any], path: str) -> int:
    """Counts blocks: a number that leaves a gap is a tensor without a place."""
    found = (re.match(rf"{path}/(\d+)/", name) for name in parts)
    return len({match[1] for match in found if match})
