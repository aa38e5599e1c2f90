"""Reads the config files of a folder as fields of our configs.

They are `config.json` and `preprocessor_config.json` of transformers, and `config.json`
of timm (`_parse_model_cfg` in `timm/models/_hub.py`). What changes outputs is obeyed,
compared with the weights (`check_agreement`), or refused by name. Resizing and cropping
are the caller's: nothing of them is read.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.checkpoints.torch_rules import check_numbers

# Fields that have to be absent, or what our models compute (what null means, too).
NO, YES = (False, None), (True,)
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "act_layer": ("gelu", None),
    "norm_layer": ("layernorm", None),
    "use_swiglu_ffn": NO,
    "use_mean_pooling": NO,
    "use_absolute_embeddings": NO,
    "num_register_tokens": (0, None),
    "qkv_bias": YES,
    "proj_bias": YES,
    "qk_norm": NO,
    "scale_attn_norm": NO,
    "scale_mlp_norm": NO,
    "pre_norm": NO,
    "final_norm": YES,
    "fc_norm": NO,
    "pool_include_prefix": NO,
    "pos_embed": ("learn",),
    "no_embed_class": NO,
    "reg_tokens": (0, None),
    "ape": NO,
    "patch_norm": YES,
    "conv_mlp": NO,
    "conv_bias": YES,
    "use_grn": NO,
}
ACTIVATIONS = ("hidden_act", "act_layer", "use_swiglu_ffn")
IN_PIXELS = {"rescale_offset": NO, "do_flip_channel_order": NO}
# Arguments of timm's models that outputs do not depend on, once there are weights.
FREE = r"(\w+_)?drop(_path)?_rate|weight_init|fix_init|ls_init_value|" + (
    "head_init_scale|dynamic_img_size|dynamic_img_pad|strict_img_size|pretrained"
)
# Those that `config_fields` obeys, and those that families compare with the weights.
KNOWN = (
    "img_size|num_heads|global_pool|num_classes|in_chans|embed_dim|depths?|dims|"
    + ("patch_size|mlp_ratio|class_token|window_size|init_values")
)
NESTED = ("encoder", "vision_config", "text_config", "backbone_config")
POOLS = {"token": "cls", "avg": "mean"}


def config_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads the fields of our configs that are said beside the weights.

    Returns:
      `heads`, `norm_eps`, `image_size`, `pool`, `pixel_mean` and `pixel_std`, as far as
      they are known; a `pool` that no model here has stays as it is called there.

    Raises:
      CheckpointError: it says what no model here computes.
    """
    try:
        said = _said(checkpoint.config)
        _only(said, ONLY)
        _only(checkpoint.preprocessor, IN_PIXELS)
        names = {
            "num_heads": "heads",
            "num_attention_heads": "heads",
            "layer_norm_eps": "norm_eps",
            "image_size": "image_size",
        }
        found = {ours: said[name] for name, ours in names.items() if name in said}
        if "image_size" not in said and (size := _input(said)[1:]):
            found["image_size"] = size
        pool = said.get("global_pool")
        if pool is not None and (pool or _has_head(checkpoint)):
            found["pool"] = POOLS.get(pool, pool)
        found |= _pixels(said, checkpoint.preprocessor)
    except (ValueError, TypeError) as wrong:
        raise CheckpointError(checkpoint.path, str(wrong).rstrip(".")) from wrong
    recorded = {name: _fixed(value) for name, value in checkpoint.recorded.items()}
    return recorded | {name: _fixed(value) for name, value in found.items()}


def check_agreement(checkpoint: Checkpoint, **has: Any) -> None:
    """Raises a `ValueError` if the config says something else than the weights.

    Args:
      checkpoint: checkpoint that has the config.
      has: values that the weights say, by the names in timm's and transformers'
        configs.
    """
    said = _said(checkpoint.config)
    if channels := _input(said)[:1]:
        said.setdefault("in_chans", channels[0])
    for name, value in has.items():
        if said.get(name) is not None and not _same(said[name], value):
            raise ValueError(
                f"its config says {name}={said[name]!r}, and its weights {value!r}"
            )


def weak_size(checkpoint: Checkpoint, given: bool) -> bool:
    """Returns True if the image size that is said need not be that of the positions.

    timm's `input_size` need not, where its model has no fixed size, or where the caller
    has `given` one.
    """
    said = _said(checkpoint.config)
    strong = said.get("img_size") is not None or "image_size" in said
    if strong or "image_size" in checkpoint.recorded:
        return False
    return given or said.get("fixed_input_size") is False


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """Joins the three levels of timm's configs to one."""
    if nested := [name for name in NESTED if isinstance(config.get(name), Mapping)]:
        raise ValueError(
            f"its config is that of a larger model, with {', '.join(nested)}: save the "
            "ViT, Swin or ConvNeXt alone"
        )
    levels = [config.get(name) or {} for name in ("pretrained_cfg", "model_args")]
    pretrained, arguments = levels
    if not isinstance(arguments, Mapping):
        raise ValueError(f"model_args={arguments!r}: expected an object")
    known = f"{FREE}|{KNOWN}"
    for name, value in arguments.items():
        if value is not None and name not in ONLY and not re.fullmatch(known, name):
            raise ValueError(
                f"model_args has {name}={value!r}, which is not known here"
            )
    said = dict(config)
    if isinstance(pretrained, Mapping):
        said |= {name: v for name, v in pretrained.items() if v is not None}
    if "num_classes" in config:  # which timm takes first
        said["num_classes"] = config["num_classes"]
    if "init_values" in arguments:  # only whether there are any
        arguments = {**arguments, "init_values": bool(arguments["init_values"])}
    return {**said, **arguments}


def _only(said: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in expected.items():
        value = said.get(name, values[0])
        if value not in values:
            gelu = ", an MLP with an exact GELU" if name in ACTIVATIONS else ""
            raise ValueError(f"{name}={value!r}: expected {values[0]!r}{gelu}")


def _input(said: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns channels, height and width of timm's `img_size` or `input_size`."""
    given = said.get("input_size")
    if given is not None and not (isinstance(given, list) and len(given) == 3):
        raise ValueError(f"input_size={given!r}: expected [channels, height, width]")
    size = said.get("img_size")
    if size is None:
        return tuple(given or ())
    pair = tuple(size) if isinstance(size, list) else (size, size)
    return (given[0] if given else said.get("in_chans"), *pair)


def _has_head(checkpoint: Checkpoint) -> bool:
    head = r"(.*\.)?(head|classifier)\.weight"
    return any(re.fullmatch(head, name) for name in checkpoint.tensors)


def _pixels(said: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the mean and deviation of pixels in [0, 1]."""
    for name in ("do_normalize", "do_rescale"):
        if not isinstance(images.get(name, True), bool):
            raise ValueError(f"{name}={images[name]!r}: expected true or false")
    names = {"pixel_mean": "mean", "pixel_std": "std"}
    of_config = {ours: said[name] for ours, name in names.items() if name in said}
    found = {
        ours: images[f"image_{name}"]
        for ours, name in names.items()
        if f"image_{name}" in images
    }
    if images.get("do_normalize") is False:
        found = {"pixel_mean": (0.0,), "pixel_std": (1.0,)}
    for ours in of_config.keys() & found.keys():
        if not _same(of_config[ours], found[ours]):
            raise ValueError(
                f"config.json and preprocessor_config.json differ: {names[ours]}="
                f"{of_config[ours]!r}, image_{names[ours]}={found[ours]!r}"
            )
    constants = of_config | _rescaled(found, images)
    check_numbers(constants, *constants)
    return {
        name: numbers if isinstance(numbers, list | tuple) else (numbers,)
        for name, numbers in constants.items()
    }


def _rescaled(found: dict[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    """Converts constants for the pixels of a folder to those for pixels in [0, 1].

    Those are `factor` times the pixels in [0, 255].
    """
    factor = images.get("rescale_factor", 1 / 255)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor <= 0:
        raise ValueError(f"rescale_factor={factor!r}: expected a positive number")
    scale = 255 * factor if images.get("do_rescale", True) else 255.0
    if math.isclose(scale, 1, rel_tol=1e-6):
        return found
    if len(found) < 2:
        raise ValueError(
            f"do_rescale={images.get('do_rescale', True)}, rescale_factor={factor!r}: "
            "expected image_mean and image_std beside"
        )
    check_numbers(found, *found)
    return {
        name: (np.atleast_1d(np.array(numbers)) / scale).tolist()
        for name, numbers in found.items()
    }


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _same(one: Any, other: Any) -> bool:
    """Returns True if both are equal; a number stands for a list of it."""
    first, second = (
        list(x) if isinstance(x, list | tuple) else [x] for x in (one, other)
    )
    length = max(len(first), len(second))
    pairs = [(x * length if len(x) == 1 else x) for x in (first, second)]
    return len(pairs[0]) == len(pairs[1]) and all(
        a == b or (isinstance(a, float) and math.isclose(a, b, rel_tol=1e-4))
        for a, b in zip(*pairs, strict=True)
    )
