"""Reads a checkpoint's tensors and config files from a file or a folder."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from snella_jax.files import gguf_file, onnx_file, torch_file
from snella_jax.files.arrays import Deferred, Stored
from snella_jax.files.errors import CheckpointError
from snella_jax.files.hosts import native
from snella_jax.files.readers import check_download, map_safetensors, read_json
from snella_jax.models.checkpoints import meta_folder, state_dicts

# What PyTorch and its wrappers put into names, wherever the wrapped module is.
WRAPPERS = r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


RECORDED = "snella_jax"  # key of a .safetensors' metadata, see `Checkpoint.recorded`


WEIGHTS = (  # of a folder of transformers or diffusers, whole or in shards
    *("model.safetensors", "diffusion_pytorch_model.safetensors"),
    *("pytorch_model.bin", "diffusion_pytorch_model.bin"),
)
HALF = (  # the same as diffusers' `variant="fp16"` downloads them
    *("model.fp16.safetensors", "model.safetensors.index.fp16.json"),
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
)
PARTS = ("encoder.onnx", "sam.onnx")  # of a SAM that was exported


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a file or folder.

    Attributes:
      path: file or folder that was read.
      tensors: by name; mapped from a file, or made when they are read.
      config: a folder's `config.json`, of transformers or timm, or Meta's
        `params.json`; the metadata of a GGUF file; else empty.
      preprocessor: its `preprocessor_config.json`; else empty.
      recorded: fields of our config that `models.export` wrote beside the tensors, for
        shapes do not say them.
      prefix: beginning that names had, and no longer have.
    """

    path: Path
    tensors: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    recorded: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""

    def prefixes(self, *marks: str) -> list[str]:
        """Lists what stands before the names of a model's weights, for each set.

        Args:
          marks: regexes of names that such a model has, in every format.
        """
        ends = [re.compile(rf"(|.*[./])(?:{mark})") for mark in marks]
        names = [re.sub(WRAPPERS, "", name) for name in self.tensors]
        found = (end.fullmatch(name) for name in names for end in ends)
        return sorted({match[1] for match in found if match})

    def unwrapped(self, *marks: str) -> "Checkpoint":
        """Strips names of what the model was part of.

        Strips `module.`, `_orig_mod.`, `vit.` and anything else that stands before all
        of them; of `module.vit.`, before a head, perhaps a part. Keeps it as `prefix`.

        Args:
          marks: as in `prefixes`, none of which ends another's name.

        Raises:
          CheckpointError: there are several sets of weights.
        """
        found = self.prefixes(*marks)
        if len(found) > 1:
            sets = ", ".join(repr(prefix.rstrip("./")) for prefix in found)
            raise CheckpointError(
                self.path,
                f"it holds several sets of weights, {sets}: say which with weights=",
            )
        return self.without_prefix(found[0]) if found else self

    def without_prefix(self, prefix: str) -> "Checkpoint":
        """Strips a prefix, such as `vit.`, or a part of it, from all names."""
        names = {_bare(name, prefix): name for name in self.tensors}
        if len(names) < len(self.tensors):
            raise CheckpointError(
                self.path, f"names that differ by the prefix {prefix!r} alone"
            )
        tensors = {new: self.tensors[old] for new, old in names.items()}
        return dataclasses.replace(self, tensors=tensors, prefix=prefix)


def _bare(name: str, prefix: str) -> str:
    name = re.sub(WRAPPERS, "", name)
    while not name.startswith(prefix):
        prefix = re.sub(r"[^./]*.$", "", prefix)  # its last part
    return name.removeprefix(prefix)


def read(path: str | Path | Checkpoint, weights: str | None = None) -> Checkpoint:
    """Reads `.npz`, `.safetensors`, `.onnx`, `.gguf`, PyTorch's `.pth`, or a folder.

    A folder is one that Hugging Face's `save_pretrained` wrote, `config.json` and
    `model.safetensors` or its shards, Meta's, `params.json` and `consolidated.00.pth`,
    or one with `encoder.onnx` and `sam.onnx`, whose tensors' names then begin with
    `encoder.` and `sam.`. A `Checkpoint` comes back as it is. Tensors of
    `.safetensors`, PyTorch's files and GGUF stay in the file until they are used, so it
    must not change meanwhile.

    Args:
      path: file or folder.
      weights: set of weights, if there are several: what their names begin
        with (`module.momentum_encoder`), or where a PyTorch file keeps them
        (`model_ema`). Nothing else of the file is read.

    Raises:
      FileNotFoundError: there is nothing at `path`, or no weights in the folder.
      CheckpointError: the file is damaged or of no known format, has no such `weights`,
        or several without one that is usually taken.
      ModuleNotFoundError: reading it needs a package; says which.
    """
    if isinstance(path, Checkpoint):
        return _chosen(path, weights)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    if path.is_dir():
        return _read_folder(path, weights)
    if path.suffix == ".gguf":
        return _chosen(_read_gguf(path), weights)
    saved, metadata = _read_file(path)
    tensors = state_dicts.chosen(path, saved, weights)
    return Checkpoint(path, tensors, recorded=_recorded(path, metadata))


def _chosen(checkpoint: Checkpoint, weights: str | None) -> Checkpoint:
    """Returns a set of weights, or all of them; errors as in `read`."""
    if weights is None:
        return checkpoint
    tensors = state_dicts.chosen(checkpoint.path, checkpoint.tensors, weights)
    return dataclasses.replace(checkpoint, tensors=tensors)


def _recorded(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Reads what `models.export` wrote beside the tensors, and nothing else.

    Raises:
      CheckpointError: it is damaged.
    """
    try:
        recorded = json.loads(metadata.get(RECORDED, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError.damaged(path, error) from error
    if not isinstance(recorded, dict):
        raise CheckpointError(path, f"expected an object in its metadata {RECORDED}")
    return recorded


def _read_folder(folder: Path, weights: str | None) -> Checkpoint:
    choices = [f"{name}{end}" for name in WEIGHTS for end in ("", ".index.json")]
    choices += HALF
    first = next((folder / name for name in choices if (folder / name).exists()), None)
    if first is None:
        if (found := meta_folder.read(folder)) is not None:
            return _chosen(Checkpoint(folder, *found), weights)
        if (folder / PARTS[0]).exists() or (folder / PARTS[1]).exists():
            return _chosen(Checkpoint(folder, _read_parts(folder)), weights)
        choices += ["consolidated.00.pth", *PARTS]
        raise FileNotFoundError(f"{folder} has none of {', '.join(choices)}.")
    if first.suffix == ".json":
        saved, metadata = _read_shards(first)
    else:
        saved, metadata = _read_file(first)
    config, preprocessor = (
        read_json(folder / f"{name}.json") if (folder / f"{name}.json").exists() else {}
        for name in ("config", "preprocessor_config")
    )
    tensors = state_dicts.chosen(first, saved, weights)
    return Checkpoint(folder, tensors, config, preprocessor, _recorded(first, metadata))


def _read_parts(folder: Path) -> dict[str, np.ndarray]:
    """Reads the two ONNX files of a SAM; the file's name stands before a tensor's."""
    files = [folder / name for name in PARTS]
    for file, other in (files, files[::-1]):
        if not file.exists():
            raise CheckpointError(
                folder, f"there is no {file.name} beside {other.name}"
            )
    return {
        f"{file.stem}.{name}": tensor
        for file in files
        for name, tensor in onnx_file.read(file, constants=True).items()
    }


def _read_gguf(path: Path) -> Checkpoint:
    file = gguf_file.open(path)
    tensors: dict[str, Stored] = {
        name: Deferred(tensor.shape, tensor.dtype, tensor.read)
        for name, tensor in file.tensors.items()
    }
    return Checkpoint(path, tensors, file.metadata)


def _read_shards(index: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads each tensor from the shard that the index names, and what it leaves out.

    An index may name tensors that no shard has: converters drop those that are tied.
    """
    where = _places(index)
    shards = {n: _read_file(index.parent / n) for n in sorted(set(where.values()))}
    for name, shard in where.items():
        others = [other for other, (tensors, _) in shards.items() if name in tensors]
        if others and shard not in others:
            raise CheckpointError(
                index, f"it places {name} in {shard}, but it is in {others[0]}"
            )
    found = {
        name: tensor
        for shard, (tensors, _) in shards.items()
        for name, tensor in tensors.items()
        if where.get(name, shard) == shard
    }
    return found, next(iter(shards.values()))[1]


def _places(index: Path) -> dict[str, str]:
    """Returns the file of each tensor, which an index of shards names."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(index, "expected file names under weight_map")
    for name in names.values():
        beside = isinstance(name, str) and Path(name).name == name
        if not beside or not (index.parent / name).exists():
            raise CheckpointError(index, f"it names {name!r}, which is not beside it")
    return names


def _read_file(path: Path) -> tuple[Any, dict[str, str]]:
    """Reads tensors by name (of PyTorch's files all that was saved) and metadata."""
    check_download(path)
    match path.suffix:
        case ".npz":
            return _read_npz(path), {}
        case ".safetensors":
            return map_safetensors(path)
        case ".pth" | ".pt" | ".tar" | ".bin" | ".ckpt":
            return torch_file.read(path), {}
        case ".onnx":
            return onnx_file.read(path), {}
    known = (
        ".npz, .safetensors, .onnx, .gguf, .pth, .pt, .pth.tar, .bin, .ckpt or a folder"
    )
    raise CheckpointError(
        path, f"unknown kind of file {path.suffix!r}: expected {known}"
    )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: _numbers(arrays[name]) for name in arrays.files}
    except Exception as error:
        raise CheckpointError.damaged(path, error) from error


def _numbers(array: np.ndarray) -> np.ndarray:
    """Mends bfloat16, which NumPy's files have as two bytes, and the byte order."""
    array = array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
    return native(array)
