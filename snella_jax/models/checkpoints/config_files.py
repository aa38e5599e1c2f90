"""Writes what `config_fields` reads: the config files of a folder, and metadata."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from snella_jax.models.checkpoints.config_fields import POOLS
from snella_jax.models.checkpoints.formats import ExportFormat
from snella_jax.models.checkpoints.read import RECORDED, Checkpoint
from snella_jax.models.layers.images import pair

FIELDS = ("image_size", "heads", "norm_eps", "pool", "pixel_mean", "pixel_std")


def metadata(config: Any) -> dict[str, str]:
    """Returns metadata for `.safetensors`: fields of a config that no shape says."""
    said = {name: getattr(config, name) for name in FIELDS if hasattr(config, name)}
    return {RECORDED: json.dumps(said, default=lambda number: number.item())}


def config_files(
    source: Checkpoint, own: ExportFormat, config: Any, names: Sequence[str] | None
) -> dict[str, bytes]:
    """Makes the JSON files of a folder, which say what a model is now.

    Args:
      source: the folder.
      own: numbers of the model, in its format.
      config: the model's.
      names: names of its classes; None for those that the folder has.
    """
    files = {
        path.name: path.read_bytes()
        for path in sorted(source.path.glob("*.json"))
        if not path.name.endswith(".index.json")
    }
    marks = ("architecture", "pretrained_cfg", "model_args")
    timm = not own.hugging_face and any(name in source.config for name in marks)
    said = dict(source.config)
    said |= _of_timm(said, own, config) if timm else _of_transformers(said, own, config)
    dtype = str(jnp.dtype(config.param_dtype))
    new = {"num_classes": config.num_classes, "dtype": dtype, "torch_dtype": dtype}
    said |= {name: value for name, value in new.items() if name in said}
    _name_classes(said, config.num_classes, names, timm)
    if not _same_pixels(own.known, config) and (source.preprocessor or not timm):
        images = {**source.preprocessor, **_pixels(config, "image_")}
        images |= {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255}
        files["preprocessor_config.json"] = _json(images)
    return files | {"config.json": _json(said)}


def _of_transformers(
    said: Mapping[str, Any], own: ExportFormat, config: Any
) -> dict[str, Any]:
    """Returns what changes in a config of transformers."""
    height, width = config.image_hw
    size = height if height == width else [height, width]
    new: dict[str, Any] = {}
    if own.hugging_face:
        new = {"image_size": size, **own.config}
    elif "image_size" in said:
        new = {"image_size": size}
    with_head = [f"{own.kind}ForImageClassification"]
    if "architectures" in said and config.num_classes:
        new |= {"architectures": with_head, "model_type": own.family}
    elif said.get("architectures") == with_head:
        new["architectures"] = [f"{own.kind}Model"]
    return new


def _of_timm(said: Mapping[str, Any], own: ExportFormat, config: Any) -> dict[str, Any]:
    """Returns what changes in a config of timm, beside the classes."""
    nested = isinstance(said.get("pretrained_cfg"), Mapping)
    pretrained = dict(said["pretrained_cfg"]) if nested else {}
    arguments = dict(said.get("model_args") or {})
    new: dict[str, Any] = {}
    size = own.known.get("image_size")
    if size is None or pair(size) != config.image_hw:
        pretrained["input_size"] = [config.channels, *config.image_hw]
        if own.family != "convnext":  # whose weights are of no size
            arguments["img_size"] = list(config.image_hw)
    if own.family in ("vit", "dinov2"):
        if own.known.get("heads") != config.heads:
            arguments["num_heads"] = config.heads
        usual = "cls" if config.class_token else "mean"
        if own.known.get("pool", usual) != config.pool:
            pool = {ours: theirs for theirs, ours in POOLS.items()}[config.pool]
            new["global_pool"] = arguments["global_pool"] = pool
            arguments["fc_norm"] = False  # the norm is before the mean
    if not _same_pixels(own.known, config):
        pretrained |= _pixels(config, "")
    for level in (pretrained, arguments):
        if "num_classes" in level:
            level["num_classes"] = config.num_classes
    new |= {"pretrained_cfg": pretrained} if nested else pretrained
    return new | ({"model_args": arguments} if arguments else {})


def _name_classes(
    said: dict[str, Any], count: int, names: Sequence[str] | None, timm: bool
) -> None:
    """Gives a config these names, or `LABEL_0` and so on, or leaves its own.

    Its own stay where `names` is None and it has as many as there are classes.
    """
    lists = ("label_names", "labels") if timm else ("id2label",)
    nested = said.get("pretrained_cfg") if timm else None
    levels = [said, nested] if isinstance(nested, dict) else [said]
    own = [level[key] for level in levels for key in lists if level.get(key)]
    fit = count and all(len(labels) == count for labels in own)
    if names is None and fit and (own or timm):
        return
    for level in levels:
        for key in (*lists, "label_descriptions", "id2label", "label2id"):
            level.pop(key, None)
    if not count:
        return
    names = names or [f"LABEL_{i}" for i in range(count)]
    if timm:
        said["label_names"] = list(names)
        return
    said["id2label"] = {str(i): name for i, name in enumerate(names)}
    said["label2id"] = {name: i for i, name in enumerate(names)}
    if "num_labels" in said:
        said["num_labels"] = count


def _same_pixels(known: Mapping[str, Any], config: Any) -> bool:
    """Returns True if pixels are normalised as where the config is from."""
    names = ("pixel_mean", "pixel_std")
    return all(
        name not in known or np.allclose(known[name], getattr(config, name), atol=1e-9)
        for name in names
    )


def _pixels(config: Any, prefix: str) -> dict[str, list[float]]:
    constants = {"mean": config.pixel_mean, "std": config.pixel_std}
    return {
        f"{prefix}{name}": [
            float(number) for number in np.broadcast_to(v, config.channels)
        ]
        for name, v in constants.items()
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
