"""The fields of a model's config that change outputs and do not show in the weights."""

import dataclasses
from typing import Any, get_args

from flax import nnx

from snella_jax.models.layers.activations import Gelu, Silu
from snella_jax.models.registry import Model

POSITIONS = "pos_embed"  # weights that follow from the grid of patches
# What shows in the weights, or changes how outputs are computed but not what they are.
NOT_COMPARED = {
    *("width", "widths", "depth", "depths", "mlp_dim", "mlp_ratio", "layer_scale"),
    *("patch_size", "image_size", "channels", "num_classes", "class_token"),
    *("vocab_size", "context", "tied", "bos", "eos"),
    *("patch", "positions", "context_dim", "pooled_dim"),
    *("stacked", "remat", "memory", "attention", "dtype", "param_dtype", "drop_path"),
}
# Activations that follow from the model, and differ in their derivative.
SAME = {*get_args(Gelu), *get_args(Silu)}


def of(model: nnx.Module) -> dict[str, dict[str, Any]]:
    """Collects these fields of every model of `snella_jax.models` in one, for JSON.

    With the grid of those that have weights for each place in it.

    >>> from snella_jax import models
    >>> model = models.create("vit_ti16", image_size=(16, 32), rngs=nnx.Rngs(0))
    >>> fields = of(model)[""]
    >>> fields["heads"], fields["pool"], fields["grid"], fields["pixel_std"]
    (3, 'cls', [1, 2], [0.5, 0.5, 0.5])
    """
    return {
        "/".join(map(str, path)): _fields(node.config)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, Model)
    }


def _fields(config: Any) -> dict[str, Any]:
    said = dataclasses.asdict(config)
    said |= said.pop("encoder", {})  # of a SAM, whose fields have other names
    found = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in said.items()
        if name not in NOT_COMPARED and not (name == "activation" and value in SAME)
    }
    for name in found.keys() & {"pixel_mean", "pixel_std"}:
        if len(found[name]) == 1:  # one number is that of every channel
            found[name] *= config.channels
    if hasattr(config, "grid"):
        found["grid"] = list(config.grid)
    return found
