"""Weights written back as they were published, for other programs to load."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snella_jax.files.arrays import Stored
from snella_jax.files.errors import CheckpointError
from snella_jax.files.hosts import once
from snella_jax.models.checkpoints.build import head_origin
from snella_jax.models.checkpoints.config_files import config_files, metadata
from snella_jax.models.checkpoints.formats import ExportFormat
from snella_jax.models.checkpoints.mapping import arrange, place_of
from snella_jax.models.checkpoints.read import Checkpoint, read
from snella_jax.models.checkpoints.rewrite import rewritten, unmade
from snella_jax.models.checkpoints.write import write_file, write_folder
from snella_jax.models.registry import Model, family_of
from snella_jax.models.vit import ViT

log = logging.getLogger("snella_jax")

# What other programs take for one file.
FILES = (".npz", ".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt", ".onnx")
FILES += (".h5", ".msgpack", ".pkl", ".zip")


def export(
    model: Model,
    path: str | Path,
    *,
    like: str | Path | None = None,
    weights: str | None = None,
    class_names: Sequence[str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model in the format of the file or folder that it was loaded from.

    A LLaMA or a SAM becomes a folder of Hugging Face's with a new `config.json`,
    whatever it was loaded from, and an MMDiT one of diffusers; a SAM with a TinyViT,
    which transformers does not have, a file with the names of `mobile_sam.pt`.

    What no shape says, such as the position grid and the number of heads, goes into
    `config.json`, and into the metadata of `.safetensors`, where `load` finds it. A
    Swin's `attn_mask`, a buffer of the original, is not written: the image size
    determines it, and the authors' own loader leaves it out, too.

    Args:
      model: plain. Its head, its image size, a Swin's window and the dtype may differ
        from the file's.
      path: to be made: a file `.npz` or `.safetensors`, or, where `like` is a folder of
        Hugging Face's `save_pretrained`, a folder that `from_pretrained` loads.
      like: gives names, config, and tensors that a model here does not have; for a
        LLaMA, a SAM or an MMDiT, where it may be None, other fields of the config, the
        tokenizer and the other JSON files.
      weights: set of weights of `like`, as in `load`.
      class_names: one for each class, for a folder's config. None keeps those that
        `like` has, if the model still has its head; a new one gets `LABEL_0` and so on.
      max_shard_bytes: size of one file of a folder.

    Raises:
      FileNotFoundError: there is nothing at `like`.
      CheckpointError: `like` does not fit the model, or is an ONNX file.
      ValueError: a `path` that this format cannot be, a head that it does not have,
        `class_names` that cannot be, no `like` where one is needed, an `.npz` of a ViT
        whose grid is no square, a Swin whose last grid is smaller than its window, or a
        SAM that transformers does not have (with a TinyViT).
      FileExistsError: there is something at `path`.
      TypeError: no model of `snella_jax.models`.
    """
    path, family = Path(path), family_of(model)
    source = None if like is None else read(like, weights)
    if family.file is not None and path.suffix in (".npz", ".safetensors"):
        _check_no_classes(type(model).__name__, class_names)
        tensors = family.file(model, source)
        once(lambda: write_file(path, tensors, {}))
        return
    if family.folder is not None:
        _check_folder(path, type(model).__name__, class_names)
        tensors, files = family.folder(model, source)
        once(
            lambda: write_folder(path, tensors, files, {}, max_shard_bytes, family.stem)
        )
        return
    source = _given(model, source)
    if source.path.suffix == ".onnx":
        raise CheckpointError(source.path, "a model cannot be written as ONNX")
    as_file = path.suffix in (".npz", ".safetensors")
    if not as_file and (not source.path.is_dir() or path.suffix.lower() in FILES):
        raise ValueError(
            f"{path}: expected .npz or .safetensors, or a folder where `like` is one."
        )
    own = _format(model, source)
    _check_grid(model, path, own)
    names = _class_names(class_names, model, own, as_file)
    tensors = _named(_tensors(own), source, own)
    said = metadata(model.config)
    if as_file:
        once(lambda: write_file(path, tensors, said))
    else:
        files = config_files(source, own, model.config, names)
        once(lambda: write_folder(path, tensors, files, said, max_shard_bytes))


def tensors(model: Model, like: str | Path | None) -> dict[str, Stored]:
    """Returns a model's tensors by the names that `export` writes them under.

    Raises:
      FileNotFoundError, CheckpointError, ValueError: as `export`.
    """
    family, source = family_of(model), None if like is None else read(like)
    if family.folder is not None:
        return dict(family.folder(model, source)[0])
    own = _format(model, source)
    return dict(_named(_tensors(own), _given(model, source), own))


def _given(model: Model, source: Checkpoint | None) -> Checkpoint:
    """Raises a `ValueError` where there is no checkpoint to take after."""
    if source is None:
        raise ValueError(
            f"like=None: a {type(model).__name__} is written like a file or folder of "
            "its format: expected one."
        )
    return source


def _format(model: Model, source: Checkpoint | None) -> ExportFormat:
    """Returns a model's numbers in the format of a checkpoint."""
    given, family = _given(model, source), family_of(model)
    if family.export_format is None:
        raise ValueError(f"A {type(model).__name__} is written as a folder alone.")
    return family.export_format(model, given)


def _check_folder(path: Path, kind: str, class_names: Sequence[str] | None) -> None:
    """Raises a `ValueError` for what is no folder, or has class names."""
    if path.suffix.lower() in FILES:
        raise ValueError(f"{path}: a {kind} is written as a folder.")
    _check_no_classes(kind, class_names)


def _check_no_classes(kind: str, class_names: Sequence[str] | None) -> None:
    """Raises a `ValueError` for names of classes that a model does not have."""
    if class_names is not None:
        raise ValueError(f"class_names: a {kind} has no classes.")


def _check_grid(model: Model, path: Path, own: ExportFormat) -> None:
    """Raises a `ValueError` if a grid of positions that is no square would be lost.

    Logs where transformers does not know of it.
    """
    if not isinstance(model, ViT) or len(set(model.config.grid)) == 1:
        return
    grid = "{} x {}".format(*model.config.grid)
    if path.suffix == ".npz":
        raise ValueError(
            f"{path}: an .npz cannot say that its grid is no square but {grid}: "
            "expected .safetensors or a folder."
        )
    if own.hugging_face and own.family == "dinov2":
        log.warning(
            "%s: transformers takes DINOv2's grid for a square, and this one is %s: it "
            "is right for snella_jax.models.load alone.",
            path,
            grid,
        )


def _class_names(
    names: Sequence[str] | None, model: Any, own: ExportFormat, as_file: bool
) -> Sequence[str] | None:
    """Returns the names for the head; None for those of the checkpoint's config.

    Raises:
      ValueError: they do not name the classes, one each, or there is no place for them.
    """
    count = model.config.num_classes
    if names is None:
        kept = getattr(model.head, "origin", None) if count else None
        if as_file or not count or (kept and kept == _origin(own)):
            return None
        return [f"LABEL_{i}" for i in range(count)]
    if as_file:
        raise ValueError("class_names: a file has no place for them, a folder has.")
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names={names!r}: expected a list of strings.")
    if len(names) != count:
        raise ValueError(
            f"class_names: expected {count}, one for each class of the model's head, "
            f"found {len(names)}."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"class_names has {', '.join(twice)} twice.")
    return names


def _origin(own: ExportFormat) -> str | None:
    return head_origin(arrange(own.checkpoint, own.rules)[0])


def _tensors(own: ExportFormat) -> dict[str, np.ndarray]:
    """Collects the model's tensors, and those of the checkpoint that it lacks."""
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
    tensors: dict[str, np.ndarray], source: Checkpoint, own: ExportFormat
) -> dict[str, np.ndarray]:
    """Names tensors with the prefix they had, or that of a model with a head."""
    names = dict(zip(own.checkpoint.tensors, source.tensors, strict=True))
    prefix = own.checkpoint.prefix
    if not prefix and "classifier.weight" in tensors:
        names, prefix = {}, f"{own.family}."
    bare = ("classifier.", "decoder.") if own.hugging_face else ()
    outer = re.sub(r"[^.]+\.$", "", prefix)  # `module.` of `module.vit.`
    return {
        names.get(name, (outer if name.startswith(bare) else prefix) + name): tensor
        for name, tensor in tensors.items()
    }
