"""Weights written back as they were published, for other programs to load."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from snella_jax.hosts import once
from snella_jax.models.checkpoint_error import CheckpointError
from snella_jax.models.families import Model
from snella_jax.models.layouts import Layout, layout
from snella_jax.models.loading import Checkpoint, place_of, read
from snella_jax.models.rewriting import rewritten, unmade
from snella_jax.models.writing import write_file, write_folder


def export(
    model: Model,
    path: str | Path,
    *,
    like: str | Path,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model in the format of the file or folder that it was loaded from.

    A Swin's `attn_mask`, a buffer of the original, is not written: the image size
    determines it, and the authors' own loader leaves it out, too.

    Args:
      model: plain. Its head, its image size, a Swin's window and the dtype may differ
        from the file's.
      path: to be made: a file `.npz` or `.safetensors`, or, where `like` is a folder of
        Hugging Face's `save_pretrained`, a folder that `from_pretrained` loads.
      like: gives names, config, and tensors that a model here does not have.
      max_shard_bytes: of one file of a folder.

    Raises:
      FileNotFoundError: there is nothing at `like`.
      CheckpointError: `like` does not fit the model, or is an ONNX file.
      ValueError: a `path` that this format cannot be, a head that it does not have, or
        a Swin whose last grid is smaller than its window.
      FileExistsError: there is something at `path`.
      TypeError: no model of `snella_jax.models`.
    """
    path, source = Path(path), read(like)
    as_file = path.suffix in (".npz", ".safetensors")
    if source.path.suffix == ".onnx":
        raise CheckpointError(source.path, "a model cannot be written as ONNX")
    if not as_file and not source.path.is_dir():
        raise ValueError(
            f"{path}: expected .npz or .safetensors, or a folder where `like` is one."
        )
    own = layout(model, source)
    tensors = _named(_tensors(own), source, own)
    if as_file:
        once(lambda: write_file(path, tensors))
    else:
        files = _files(source, own, model.config)
        once(lambda: write_folder(path, tensors, files, max_shard_bytes))


def _tensors(own: Layout) -> dict[str, np.ndarray]:
    """Those of the model, and of the checkpoint what the model does not have."""
    checkpoint, rules = own.checkpoint, own.rules
    tensors, left = rewritten(checkpoint, rules, own.parts, f"head/.*|{own.free}")
    if other := sorted(left - own.head.keys()):
        raise CheckpointError(
            checkpoint.path, f"it has no place for {', '.join(other)}"
        )
    for path in sorted(left):  # a head that the checkpoint does not have
        name = own.head[path]
        tensors[name] = unmade(place_of(name, rules)[0], [own.parts[path]])
    for name, tensor in checkpoint.tensors.items():
        placed = place_of(name, rules)[1]
        if not placed and not re.fullmatch(own.left_out, name):
            tensors[name] = own.buffers.get(name, tensor)
    return tensors


def _named(
    tensors: dict[str, np.ndarray], source: Checkpoint, own: Layout
) -> dict[str, np.ndarray]:
    """Names with the prefix they had, or which a model with a head gives them."""
    pairs = zip(source.tensors, own.checkpoint.tensors, strict=True)
    prefix = next((old.removesuffix(new) for old, new in pairs if old != new), "")
    if not prefix and "classifier.weight" in tensors:
        prefix = f"{own.family}."
    bare = ("classifier.", "decoder.") if own.hugging_face else ()
    return {
        name if name.startswith(bare) else prefix + name: tensor
        for name, tensor in tensors.items()
    }


def _files(source: Checkpoint, own: Layout, c: Any) -> dict[str, bytes]:
    """The folder's other files, with a config that says what the model is now."""
    files = {
        path.name: path.read_bytes()
        for path in sorted(source.path.glob("*.json"))
        if not path.name.endswith(".index.json")
    }
    config = dict(source.config)
    with_head = [f"{own.kind}ForImageClassification"]
    if "architectures" in config and c.num_classes:
        config |= {"architectures": with_head, "model_type": own.family}
    elif config.get("architectures") == with_head:
        config["architectures"] = [f"{own.kind}Model"]
    labels = config.get("id2label")
    if c.num_classes and (labels is None or len(labels) != c.num_classes):
        names = {str(i): f"LABEL_{i}" for i in range(c.num_classes)}
        config["id2label"] = names
        config["label2id"] = {name: int(i) for i, name in names.items()}
    height, width = c.image_hw
    dtype = str(jnp.dtype(c.param_dtype))
    new = {
        "num_classes": c.num_classes,  # timm
        "image_size": height if height == width else [height, width],
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    config |= {name: value for name, value in new.items() if name in config}
    if own.hugging_face:
        config |= {"image_size": new["image_size"], **own.config}
    return files | {"config.json": json.dumps(config, indent=2).encode() + b"\n"}
