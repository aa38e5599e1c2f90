"""A SAM as a Hugging Face folder, which `SamModel.from_pretrained` loads."""

import json
import re
from typing import Any

import numpy as np

from snella_jax.files.arrays import Stored
from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.checkpoints.rewrite import parts_of
from snella_jax.models.sam import formats
from snella_jax.models.sam.config import SamConfig
from snella_jax.models.sam.fields import SECTIONS
from snella_jax.models.sam.model import Sam
from snella_jax.models.sam.prompts import EPS
from snella_jax.models.sam.vit_encoder import ViTEncoderConfig


def folder(
    model: Sam, like: Checkpoint | None
) -> tuple[dict[str, Stored], dict[str, bytes]]:
    """Returns a model's tensors by Hugging Face's names, and the folder's other files.

    Args:
      model: plain.
      like: a folder of a `SamModel` whose other fields of `config.json` and other JSON
        files are kept; None for none.

    Raises:
      ValueError: transformers has no such model: its encoder is a TinyViT, or its
        images or patches are no squares.
      CheckpointError: `like` is no such folder, or of a model of other sizes.
    """
    config, encoder = model.config, vit_of(model.config)
    said = config_json(config)
    parts, places = parts_of(model, formats.stacked(config)), encoder.places
    flat = {_by_number(path, places): part for path, part in parts.items()}
    files = {"preprocessor_config.json": _json(preprocessor_json(config))}
    if like is not None:
        _check_sizes(like, said)
        kept = {name: {**like.config.get(name, {}), **said[name]} for name in SECTIONS}
        said = {**like.config, **said, **kept}
        said.pop("quantization_config", None)  # of the weights of `like`
        images = {**like.preprocessor, **preprocessor_json(config)}
        files = {
            path.name: path.read_bytes()
            for path in sorted(like.path.glob("*.json"))
            if not path.name.endswith(".index.json")
        } | {"preprocessor_config.json": _json(images)}
    return formats.hugging_face(flat), files | {"config.json": _json(said)}


def config_json(config: SamConfig) -> dict[str, Any]:
    """Returns a config as transformers reads it; errors as in `folder`."""
    encoder = vit_of(config)
    for name, pair in (
        ("image_size", encoder.image_hw),
        ("patch_size", encoder.patch_hw),
    ):
        if pair[0] != pair[1]:
            raise ValueError(f"{name}={pair}: a SamModel of transformers has squares.")
    size, patch, out = encoder.image_hw[0], encoder.patch_hw[0], config.width
    dtype = str(np.dtype(config.param_dtype))
    vision = {
        "model_type": "sam_vision_model",
        "hidden_size": encoder.width,
        "output_channels": out,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "num_channels": encoder.channels,
        "image_size": size,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": encoder.norm_eps,
        "qkv_bias": True,
        "use_abs_pos": True,
        "use_rel_pos": True,
        "window_size": encoder.window,
        "global_attn_indexes": list(encoder.global_blocks),
        "num_pos_feats": out // 2,
        "mlp_dim": encoder.mlp_dim or 4 * encoder.width,
    }
    prompts = {
        "hidden_size": out,
        "image_size": size,
        "patch_size": patch,
        "mask_input_channels": config.mask_channels,
        "num_point_embeddings": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": EPS,
    }
    decoder = {
        "hidden_size": out,
        "hidden_act": "relu",
        "mlp_dim": config.decoder_mlp_dim,
        "num_hidden_layers": config.decoder_depth,
        "num_attention_heads": config.decoder_heads,
        "attention_downsample_rate": 2,
        "num_multimask_outputs": config.masks - 1,
        "iou_head_depth": 3,
        "iou_head_hidden_dim": config.iou_hidden,
        "layer_norm_eps": config.decoder_norm_eps,
    }
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        **dict(zip(SECTIONS, (vision, prompts, decoder), strict=True)),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def vit_of(config: SamConfig) -> ViTEncoderConfig:
    """Returns the encoder's config; raises a `ValueError` for a TinyViT's."""
    if isinstance(config.encoder, ViTEncoderConfig):
        return config.encoder
    raise ValueError(
        "transformers has no SAM with a TinyViT, only with a ViT: expected a path that "
        "ends in .safetensors, for a file with MobileSAM's names."
    )


def preprocessor_json(config: SamConfig) -> dict[str, Any]:
    """Returns the config of the `SamImageProcessor` that prepares images as `segment`.

    With the long side to the size of the images, and zeros to the right and below.
    """
    side = config.image_hw[0]
    square, mask = ({"height": n, "width": n} for n in (side, 4 * config.grid[0]))
    constants = {
        f"image_{name}": list(numbers) * (config.channels if len(numbers) == 1 else 1)
        for name, numbers in (("mean", config.pixel_mean), ("std", config.pixel_std))
    }
    return {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": side},
        "mask_size": {"longest_edge": mask["height"]},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **constants,
        "do_pad": True,
        "pad_size": square,
        "mask_pad_size": mask,
    }


def _by_number(path: str, places: tuple[tuple[str, int], ...]) -> str:
    """Turns `encoder/blocks/whole/1/...` into `encoder/blocks/5/...`."""
    match = re.fullmatch(r"encoder/blocks/(windowed|whole)/(\d+)/(.*)", path)
    if not match:
        return path
    return f"encoder/blocks/{places.index((match[1], int(match[2])))}/{match[3]}"


def _check_sizes(like: Checkpoint, said: dict[str, Any]) -> None:
    """Raises a `CheckpointError` if `like` is no folder of a model of these sizes.

    Images and windows may have other sizes, and norms another epsilon.
    """
    if not like.path.is_dir() or like.config.get("model_type") != "sam":
        raise CheckpointError(
            like.path, "expected a Hugging Face folder of a SamModel; leave like= out"
        )
    for name in SECTIONS:
        theirs = like.config.get(name, {})
        if not isinstance(theirs, dict):
            raise CheckpointError(like.path, f"{name}={theirs!r}: expected an object")
        for field, own in said[name].items():
            free = field in ("image_size", "layer_norm_eps", "window_size")
            if not free and theirs.get(field) not in (None, own):
                raise CheckpointError(
                    like.path,
                    f"it has {field}={theirs[field]!r}, and the model {own!r}",
                )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
