"""Fields of an MMDiT's config by what files say of it.

Shapes say all but the number of heads, which is in diffusers' `config.json`; in single
files heads are 64 wide. What a `config.json` says else is compared with the weights, or
refused by name.
"""

from collections.abc import Mapping
from typing import Any

from snella_jax.models.checkpoints.json_fields import count, only, unknown
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.checkpoints.torch_rules import root
from snella_jax.models.sd3.mmdit.formats import FORMATS, PATCH, POSITIONS, Format
from snella_jax.models.sd3.mmdit.formats import depth_of as count_blocks

HEAD_DIM = 64  # in every published single file
CLASS = "SD3Transformer2DModel"
ONLY: dict[str, tuple[Any, ...]] = {  # fields that have to be so, or absent
    "_class_name": (CLASS,),
    "qk_norm": (None,),
    "dual_attention_layers": ([], None),
    "quantization_config": (None,),
}
SIZES = {  # of weights, by their names in `config.json`
    "patch_size": "patch",
    "in_channels": "channels",
    "out_channels": "channels",
    "num_layers": "depth",
    "joint_attention_dim": "context_dim",
    "caption_projection_dim": "width",
    "pooled_projection_dim": "pooled_dim",
    "pos_embed_max_size": "positions",
}
KNOWN = {*ONLY, *SIZES, "num_attention_heads", "attention_head_dim", "sample_size"}


def of_checkpoint(
    checkpoint: Checkpoint, form: Format, heads: int | None
) -> dict[str, Any]:
    """Reads shapes and `config.json`.

    Args:
      checkpoint: tensors by the format's names.
      form: the format.
      heads: number of heads, if the caller knows it.

    Raises:
      KeyError: a tensor is missing.
      ValueError, TypeError: the files say what no MMDiT here computes, or too little.
    """
    found = _of_shapes(checkpoint, form)
    said = checkpoint.config
    if form == "diffusers" and said:
        _check(said, found)
        own = count(said, "num_attention_heads")
        if own * count(said, "attention_head_dim", HEAD_DIM) != found["width"]:
            raise ValueError(
                f"num_attention_heads={own}, attention_head_dim="
                f"{said.get('attention_head_dim')!r}: expected {found['width']} in all"
            )
        return found | {"heads": own}
    if heads is not None:
        return found | {"heads": heads}
    if form == "diffusers":
        raise ValueError(
            "there is no config.json, which says how many heads there are: expected "
            "the whole folder"
        )
    if found["width"] % HEAD_DIM:
        raise ValueError(
            f"its width {found['width']} is no multiple of {HEAD_DIM}, the width of a "
            "head in published files: say how many there are with heads="
        )
    return found | {"heads": found["width"] // HEAD_DIM}


def _of_shapes(checkpoint: Checkpoint, form: Format) -> dict[str, Any]:
    column = FORMATS.index(form)
    width, channels, patch, _ = _shape(checkpoint, f"{PATCH[column]}.weight", 4)
    _, places, _ = _shape(checkpoint, POSITIONS[column], 3)
    pooled = ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1")[column]
    fc1 = ("joint_blocks.0.x_block.mlp.fc1", "transformer_blocks.0.ff.net.0.proj")
    hidden, _ = _shape(checkpoint, f"{fc1[column]}.weight", 2)
    if hidden % width:
        raise ValueError(f"its MLPs are {hidden} wide: expected a multiple of {width}")
    return {
        "width": width,
        "depth": count_blocks(checkpoint, form),
        "channels": channels,
        "patch": patch,
        "positions": root(places),
        "context_dim": _shape(checkpoint, "context_embedder.weight", 2)[1],
        "pooled_dim": _shape(checkpoint, f"{pooled}.weight", 2)[1],
        "mlp_ratio": hidden // width,
    }


def _check(said: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for a config that is of another model or other weights."""
    only(said, ONLY)
    if others := unknown(said, KNOWN):
        raise ValueError(f"config.json has {', '.join(others)}, not known here")
    for theirs, ours in SIZES.items():
        if said.get(theirs) is not None and said[theirs] != found[ours]:
            raise ValueError(
                f"its config says {theirs}={said[theirs]!r}, and its weights "
                f"{found[ours]}"
            )


def _shape(checkpoint: Checkpoint, name: str, ndim: int) -> tuple[int, ...]:
    shape = checkpoint.tensors[name].shape
    if len(shape) != ndim or 0 in shape:
        raise ValueError(f"{name} has shape {list(shape)}: expected {ndim} axes")
    return shape
