"""Fields of CLIP's configs that files say, beside what shapes do.

They are in transformers' `config.json`, in `preprocessor_config.json`, and for OpenAI's
archives in its code. What changes outputs is obeyed, or refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from snella_jax.models.checkpoints.config_fields import config_fields
from snella_jax.models.checkpoints.json_fields import count, number, only
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.layers.images import pair
from snella_jax.models.sd3.clip.formats import OPENAI, Format, Tower

HEAD_DIM = 64  # of every published CLIP with a ViT
SECTIONS: dict[Tower, str] = {"text": "text_config", "image": "vision_config"}
KINDS: dict[Tower, str] = {"text": "clip_text_model", "image": "clip_vision_model"}
HEADS: dict[Tower, int] = {"text": 8, "image": 12}  # transformers' defaults
# End of texts where a config does not name it, and the one that old configs name
# wrongly: there transformers takes the largest id.
EOS, OLD_EOS = 49407, 2
SIZES = {  # names in transformers' configs by ours
    "hidden_size": "width",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "depth",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "positions",
    "patch_size": "patch_size",
    "num_channels": "channels",
    "projection_dim": "projection",
}


def known(
    checkpoint: Checkpoint, form: Format, tower: Tower, shape: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields that are known beside the shapes.

    Args:
      checkpoint: tensors and config files.
      form: format of the tensors.
      tower: tower that is meant.
      shape: fields that the shapes say, to be compared with.

    Raises:
      ValueError, TypeError: the files say what no CLIP here computes, or something else
        than the shapes.
    """
    if form == "openai":
        archive = {"activation": "quick_gelu"} if OPENAI in checkpoint.tensors else {}
        return _heads(shape["width"]) | archive
    pixels = {}
    if tower == "image":
        alone = dataclasses.replace(checkpoint, config={})
        pixels = config_fields(alone)
    if not checkpoint.config:
        return pixels
    said = _section(checkpoint.config, tower)
    for theirs, ours in SIZES.items():
        value, has = said.get(theirs), shape.get(ours)
        if has is None or value is None:
            continue
        if (pair(value) if ours == "patch_size" else value) != has:
            raise ValueError(
                f"its config says {theirs}={value!r}, and its weights {has!r}"
            )
    found = {
        "heads": count(said, "num_attention_heads", HEADS[tower]),
        "activation": said.get("hidden_act") or "quick_gelu",
        "norm_eps": number(said, "layer_norm_eps", 1e-5),
    }
    if tower == "text":
        eos = EOS if said.get("eos_token_id") is None else said["eos_token_id"]
        if type(eos) is not int:
            raise ValueError(f"eos_token_id={eos!r}: expected one token")
        found["eos"] = None if eos == OLD_EOS else eos
    elif (size := said.get("image_size", 224)) is not None:
        found["image_size"] = tuple(size) if isinstance(size, list) else size
    return found | pixels


def of_part(width: int, activation: str) -> dict[str, Any]:
    """Returns the fields of a file without a config that is known to be a part."""
    return _heads(width) | {"activation": activation}


def _heads(width: int) -> dict[str, int]:
    return {"heads": width // HEAD_DIM} if width % HEAD_DIM == 0 else {}


def _section(config: Mapping[str, Any], tower: Tower) -> dict[str, Any]:
    """Returns what a config says of a tower, as transformers reads it."""
    only(config, {"model_type": ("clip", KINDS[tower], None)})
    name = SECTIONS[tower]
    if config.get("model_type") != "clip" and name not in config:
        return dict(config)
    section = config.get(f"{name}_dict")  # of old files, which then counts
    section = config.get(name) if section is None else section
    if not isinstance(section, Mapping):
        raise ValueError(f"{name}={section!r}: expected an object")
    return {**section, "projection_dim": config.get("projection_dim")}
