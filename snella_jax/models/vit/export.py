"""ViT weights written back as they were published, for other programs to load."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from snella_jax.hosts import once
from snella_jax.models.checkpoint_error import CheckpointError
from snella_jax.models.exporting import (
    parts_of,
    rewritten,
    unmade,
    write_file,
    write_folder,
)
from snella_jax.models.loading import Checkpoint, Rule, place_of, read
from snella_jax.models.vit.checkpoints import HUGGING_FACE, recognised
from snella_jax.models.vit.model import ViT

# The model with a head in transformers, and the one without.
CLASSES = {
    "vit": ("ViTForImageClassification", "ViTModel"),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Model"),
}
PREFIXES = ("opt/target/", "module.", "vit.", "dinov2.", "backbone.", "")
WITH_HEAD = ("pooler.", "decoder.")  # tensors that models with a head do not have


def export(
    model: ViT, path: str | Path, *, like: str | Path, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes a ViT in the format of the file or folder that it was loaded from.

    Args:
      model: plain. Its head, its image size and its dtype may differ from the file's.
      path: to be made: a file `.npz` or `.safetensors`, or, where `like` is a folder of
        Hugging Face's `save_pretrained`, a folder that `from_pretrained` loads.
      like: gives names, config, and tensors that a `ViT` does not have.
      max_shard_bytes: of one file of a folder.

    Raises:
      FileNotFoundError: there is nothing at `like`.
      CheckpointError: `like` does not fit the model, or is an ONNX file.
      ValueError: a `path` that this format cannot be, or a head that it does not have.
      FileExistsError: there is something at `path`.
    """
    path, source = Path(path), read(like)
    as_file = path.suffix in (".npz", ".safetensors")
    if source.path.suffix == ".onnx":
        raise CheckpointError(source.path, "a ViT cannot be written as ONNX")
    if not as_file and not source.path.is_dir():
        raise ValueError(
            f"{path}: expected .npz or .safetensors, or a folder where `like` is one."
        )
    checkpoint, rules, _ = recognised(source, model.config.num_classes)
    parts = parts_of(model, "blocks" if model.config.stacked else "(?!)")
    tensors, left = rewritten(checkpoint, rules, parts, free="head/.*|pos_embed")
    if other := sorted(path for path in left if not path.startswith("head/")):
        raise CheckpointError(source.path, f"it has no place for {', '.join(other)}")
    tensors |= _head({path: parts[path] for path in left}, rules)
    for name, tensor in checkpoint.tensors.items():
        unused = model.config.num_classes and name.startswith(WITH_HEAD)
        if not (place_of(name, rules)[1] or unused or name.startswith("pre_logits/")):
            tensors[name] = tensor
    if rules is HUGGING_FACE:
        tensors = _classifier(tensors, model, _family(checkpoint))
    tensors = _named(tensors, source, checkpoint, rules)
    if as_file:
        once(lambda: write_file(path, tensors))
    else:
        files = _files(source, model)
        once(lambda: write_folder(path, tensors, files, max_shard_bytes))


def _head(parts: dict[str, np.ndarray], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """A head that the file does not have, in the names of its format."""
    tensors = {}
    for path, part in parts.items():
        for name in (path, *NAMES[path]):
            with contextlib.suppress(ValueError):
                rule, places = place_of(name, rules)
                if places == (path,):
                    tensors[name] = unmade(rule, [part])
    return tensors


NAMES = {
    "head/kernel": ("head.weight", "classifier.weight"),
    "head/bias": ("head.bias", "classifier.bias"),
}


def _family(checkpoint: Checkpoint) -> str:
    return "dinov2" if any("lambda1" in name for name in checkpoint.tensors) else "vit"


def _classifier(
    tensors: dict[str, np.ndarray], model: ViT, family: str
) -> dict[str, np.ndarray]:
    """What transformers' head of this family sees: DINOv2's both tokens and their mean.

    Raises:
      ValueError: it does not see what the model's does.
    """
    weight = tensors.get("classifier.weight")
    if weight is None:
        return tensors
    if family == "dinov2":
        halves = [weight, np.zeros_like(weight)]
        order = 1 if model.config.pool == "cls" else -1
        return tensors | {"classifier.weight": np.concatenate(halves[::order], 1)}
    if model.config.pool != "cls":
        raise ValueError(
            'transformers has no ViT with a head on the mean of the tokens: pool="mean"'
        )
    return tensors


def _named(
    tensors: dict[str, np.ndarray],
    source: Checkpoint,
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
) -> dict[str, np.ndarray]:
    """Names with the prefix they had, or which a model with a head gives them."""
    known = checkpoint.tensors.keys()
    prefix = next(
        p for p in PREFIXES if any(p + name in source.tensors for name in known)
    )
    if not prefix and "classifier.weight" in tensors:
        prefix = f"{_family(checkpoint)}."
    bare = ("classifier.", "decoder.") if rules is HUGGING_FACE else ()
    return {
        name if name.startswith(bare) else prefix + name: tensor
        for name, tensor in tensors.items()
    }


def _files(source: Checkpoint, model: ViT) -> dict[str, bytes]:
    """The folder's other files, with a config that says what the model is now."""
    files = {
        path.name: path.read_bytes()
        for path in sorted(source.path.glob("*.json"))
        if not path.name.endswith(".index.json")
    }
    config, c = dict(source.config), model.config
    family = _family(source)
    if "architectures" in config:
        config["architectures"] = [CLASSES[family][0 if c.num_classes else 1]]
        if c.num_classes:
            config["model_type"] = family
    labels = config.get("id2label")
    if c.num_classes and (labels is None or len(labels) != c.num_classes):
        names = {str(i): f"LABEL_{i}" for i in range(c.num_classes)}
        config["id2label"] = names
        config["label2id"] = {name: int(i) for i, name in names.items()}
    if "num_classes" in config:  # timm
        config["num_classes"] = c.num_classes
    if "image_size" in config:
        height, width = c.image_hw
        config["image_size"] = height if height == width else [height, width]
    for name in ("dtype", "torch_dtype"):
        if name in config:
            config[name] = str(jnp.dtype(c.param_dtype))
    return files | {"config.json": json.dumps(config, indent=2).encode() + b"\n"}
