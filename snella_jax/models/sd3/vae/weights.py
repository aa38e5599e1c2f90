"""Published weights for the autoencoder: files and folders as models."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from jaxtyping import DTypeLike

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.build import agreed, configured, given
from snella_jax.models.checkpoints.json_fields import count, number, only, unknown
from snella_jax.models.checkpoints.mapping import arrange, fill
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.sd3.single_file import PREFIXES, component
from snella_jax.models.sd3.vae import formats
from snella_jax.models.sd3.vae.config import VAEConfig
from snella_jax.models.sd3.vae.formats import MARKS, Names
from snella_jax.models.sd3.vae.model import VAE

# Fields of diffusers' config that have to be so, or absent.
ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu",),
    "use_quant_conv": (False,),
    "use_post_quant_conv": (False,),
    "mid_block_add_attention": (True,),
    "latents_mean": (None,),
    "latents_std": (None,),
}
# Others that change nothing here, or that are compared with the weights or obeyed.
KNOWN = {
    *("down_block_types", "up_block_types", "in_channels", "out_channels"),
    *("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups"),
    *("scaling_factor", "shift_factor", "sample_size", "force_upcast"),
}
KINDS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def load(
    path: str | Path | Checkpoint,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    **overrides: Any,
) -> VAE:
    """Loads the autoencoder of Stable Diffusion 3; the format is recognised.

    Args:
      path: folder of diffusers, with `config.json`; a single file of Stability's, such
        as `sd3_medium.safetensors`; or what `checkpoints.read` made of one.
      dtype: dtype of the computation; None for float32.
      param_dtype: dtype of the weights; None for float32.
      overrides: other fields of `VAEConfig`, such as `remat`.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      CheckpointError: a file is damaged, holds another autoencoder, such as that of
        SDXL, or does not fit; lists every tensor without a place and place without a
        tensor.
      ModuleNotFoundError: reading it needs a package; says which.
      ValueError, TypeError: an option that cannot be.
    """
    checkpoint = component(path, "vae")
    names = _recognised(checkpoint)
    own = given(VAEConfig, {"dtype": dtype, "param_dtype": param_dtype, **overrides})
    config = configured(
        VAEConfig, checkpoint, lambda: _fields(checkpoint, names, own), ()
    )
    parts, problems = arrange(checkpoint, formats.rules(names, config))
    model = nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))
    fill(checkpoint.path, parts, model, problems=problems)
    return model


def _recognised(checkpoint: Checkpoint) -> Names:
    """Returns the format of an autoencoder's names.

    Raises:
      CheckpointError: it is another autoencoder, or none.
    """
    tensors = checkpoint.tensors
    if any(re.fullmatch(r"(post_)?quant_conv\..*", name) for name in tensors):
        raise CheckpointError(
            checkpoint.path,
            "an autoencoder with quant convolutions, as of Stable Diffusion 1, 2 or "
            "XL: expected that of Stable Diffusion 3, which has none",
        )
    for mark, names in MARKS.items():
        if mark in tensors:
            return names
    some = ", ".join(sorted(tensors)[:5])
    raise CheckpointError(
        checkpoint.path,
        "no autoencoder of Stable Diffusion 3: expected Stability's names or those of "
        f"diffusers, found {some} ({len(tensors)} in all)",
    )


def _fields(
    checkpoint: Checkpoint, names: Names, own: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields of our config, by shapes, `config.json` and the caller.

    Raises:
      ValueError, TypeError, KeyError: a tensor is missing, or the config says what no
        VAE here computes, or other than the weights.
    """
    found = _by_shapes(checkpoint, names)
    if checkpoint.config:
        found = agreed(found, _by_config(checkpoint.config))
    elif checkpoint.prefix != PREFIXES["vae"] and not {"scale", "shift"} <= {*own}:
        raise ValueError(
            "nothing says the scale and shift of its latents (Flux's autoencoder has "
            "the same tensors): expected a folder with config.json, the single file "
            "of Stable Diffusion 3, or scale= and shift="
        )
    return {**found, **own}


def _by_shapes(checkpoint: Checkpoint, names: Names) -> dict[str, Any]:
    tensors = checkpoint.tensors

    def channels(name: str) -> tuple[int, int]:
        """Returns those that a convolution makes, and those that it sees."""
        shape = tensors[f"{name}.weight"].shape
        if len(shape) != 4:
            raise ValueError(
                f"{name}.weight has shape {list(shape)}: expected a convolution's"
            )
        return shape[0], shape[1]

    def block(level: int, index: int) -> str:
        way = names.level.format(way="down", level=level)
        return f"encoder.{way}.{names.block}.{index}.conv1"

    levels, blocks = 0, 0
    while f"{block(levels, 0)}.weight" in tensors:
        levels += 1
    while f"{block(0, blocks)}.weight" in tensors:
        blocks += 1
    return {
        "widths": tuple(channels(block(level, 0))[0] for level in range(levels)),
        "blocks": blocks,
        "latents": channels("decoder.conv_in")[1],
        "channels": channels("encoder.conv_in")[1],
    }


def _by_config(said: Mapping[str, Any]) -> dict[str, Any]:
    only(said, ONLY)
    if others := unknown(said, {*ONLY, *KNOWN}):
        raise ValueError(
            f"config.json has {', '.join(others[:5])} ({len(others)} not known "
            "here): expected that of an AutoencoderKL"
        )
    for name, kind in KINDS.items():
        if any(own != kind for own in said.get(name) or ()):
            raise ValueError(f"{name}={said[name]}: expected {kind} alone")
    channels = count(said, "in_channels")
    if count(said, "out_channels") != channels:
        raise ValueError(
            f"out_channels={said['out_channels']}, in_channels={channels}: expected "
            "one number"
        )
    widths = said.get("block_out_channels")
    if not isinstance(widths, list):
        raise ValueError(f"block_out_channels={widths!r}: expected a list")
    shift = said.get("shift_factor")
    if isinstance(shift, bool) or not isinstance(shift, int | float | None):
        raise ValueError(f"shift_factor={shift!r}: expected a number")
    return {
        "widths": tuple(widths),
        "blocks": count(said, "layers_per_block"),
        "groups": count(said, "norm_num_groups"),
        "latents": count(said, "latent_channels"),
        "channels": channels,
        "scale": number(said, "scaling_factor"),
        "shift": float(shift or 0),
    }
