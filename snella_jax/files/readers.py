"""Readers of `.safetensors` and JSON whose errors name the file."""

import json
import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from snella_jax.files.errors import CheckpointError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
AGAIN = "log in where it comes from, accept its licence there, and download it again"
# What downloads leave in a file's place: how it begins, and what it is.
IN_PLACE = {
    b"<!doctype": f"a web page: {AGAIN}",
    b"<html": f"a web page: {AGAIN}",
    b"access to model": f"a refusal of Hugging Face: {AGAIN}",
    b"invalid username or password": f"a refusal of Hugging Face: {AGAIN}",
    b"version https://git-lfs": "a pointer of Git LFS: run `git lfs pull`",
}


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the tensors and the metadata of a `.safetensors` file.

    Raises:
      CheckpointError: it is damaged.
    """
    try:
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except Exception as error:
        raise CheckpointError.damaged(path, error) from error


def map_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Maps the tensors of a `.safetensors` file into memory; reads its metadata.

    The arrays are read-only views of the file, which must not change meanwhile.

    Raises:
      CheckpointError: it is damaged, or has numbers of a kind that NumPy does not know.
    """
    try:
        with safe_open(
            path, "np"
        ) as file:  # checks that the header is that of the file
            metadata = file.metadata() or {}
        whole = mapped(path)
        start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
        header = json.loads(whole[8:start].tobytes())
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(path, f"{name} is of dtype {entry['dtype']}")
            first, last = entry["data_offsets"]
            numbers = whole[start + first : start + last].view(DTYPES[entry["dtype"]])
            tensors[name] = numbers.reshape(entry["shape"])
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError.damaged(path, error) from error
    return tensors, metadata


def mapped(path: Path) -> np.ndarray:
    """Returns a file's bytes as a read-only array that its pages are read for."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), "u1")


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
      CheckpointError: it is damaged, something else in its place, or no object.
    """
    check_download(path)
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError.damaged(path, error) from error
    if not isinstance(value, dict):
        raise CheckpointError(path, "expected a JSON object")
    return value


def check_download(path: Path) -> None:
    """Raises a `CheckpointError` for a file that is something else in its place."""
    with path.open("rb") as file:
        first = file.read(64).lstrip().lower()
    for begins, what in IN_PLACE.items():
        if first.startswith(begins):
            raise CheckpointError(path, f"it is {what}")
