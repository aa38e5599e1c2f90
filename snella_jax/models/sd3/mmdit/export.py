"""An MMDiT as a folder of diffusers, which `SD3Transformer2DModel` loads."""

import json
from typing import Any

import numpy as np

from snella_jax.files.arrays import Stored
from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.formats import stacked
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.checkpoints.rewrite import parts_of
from snella_jax.models.sd3.mmdit.config import MMDiTConfig
from snella_jax.models.sd3.mmdit.fields import CLASS, SIZES
from snella_jax.models.sd3.mmdit.formats import SWAPPED, diffusers_name, halves_swapped
from snella_jax.models.sd3.mmdit.model import MMDiT

STEM = "diffusion_pytorch_model"  # of the weights' files
FIXED = {"mlp_ratio": 4, "norm_eps": 1e-6}  # in diffusers


def folder(
    model: MMDiT, like: Checkpoint | None
) -> tuple[dict[str, Stored], dict[str, bytes]]:
    """Returns a model's tensors by diffusers' names, and the folder's `config.json`.

    Args:
      model: plain.
      like: a folder of diffusers whose other fields of `config.json` are kept; None for
        none.

    Raises:
      ValueError: diffusers has no such model.
      CheckpointError: `like` is no such folder, or of a model of other sizes.
    """
    config = model.config
    for name, value in FIXED.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)}: in diffusers it is always {value}."
            )
    parts = parts_of(model, stacked(model, "blocks"))
    tensors: dict[str, Stored] = {
        diffusers_name(path, config.depth): _theirs(path, part)
        for path, part in parts.items()
    }
    said = config_json(config)
    if like is not None:
        _check_sizes(like, said)
        said = {**like.config, **said, "sample_size": like.config.get("sample_size")}
        said.pop("quantization_config", None)  # of the weights of `like`
    text = json.dumps(said, indent=2) + "\n"
    return tensors, {"config.json": text.encode()}


def config_json(config: MMDiTConfig) -> dict[str, Any]:
    """Returns a config as diffusers reads it.

    `sample_size`, from which a pipeline takes the size of pictures that are asked for
    without one, is that of a table's third: 128 for one of 192 places, as published.
    """
    return {
        "_class_name": CLASS,
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "sample_size": config.patch * max(1, config.positions // 3),
        "qk_norm": None,
        "dual_attention_layers": [],
    }


def _theirs(path: str, part: np.ndarray) -> np.ndarray:
    """Returns a tensor as PyTorch has it."""
    layer, _, kind = path.rpartition("/")
    if path == "positions":
        return part.reshape(1, -1, part.shape[-1])
    if layer == "patch" and kind == "kernel":
        return part.transpose(3, 2, 0, 1)
    part = part.T
    return halves_swapped(part) if layer in SWAPPED else part


def _check_sizes(like: Checkpoint, said: dict[str, Any]) -> None:
    """Raises a `CheckpointError` if `like` is no folder of a model of these sizes."""
    if not like.path.is_dir() or like.config.get("_class_name") != CLASS:
        raise CheckpointError(
            like.path, f"expected a diffusers folder of a {CLASS}; leave like= out"
        )
    for theirs in (*SIZES, "num_attention_heads", "attention_head_dim"):
        if like.config.get(theirs, said[theirs]) != said[theirs]:
            raise CheckpointError(
                like.path,
                f"it has {theirs}={like.config[theirs]!r}, and the model "
                f"{said[theirs]}",
            )
