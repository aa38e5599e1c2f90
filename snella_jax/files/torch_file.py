"""PyTorch checkpoints (`.pth`, `.pt`, `.pth.tar`), read without PyTorch.

Nothing in a file is executed: the unpickler knows how to make tensors, numbers, strings
and containers, and refuses every other name. The format is that of `torch.save` since
PyTorch 1.6: a zip archive of a pickle and of one uncompressed member per storage. That
of TorchScript has the same pickle, of modules instead of dictionaries, and programs,
which are not read.
Storages are mapped into memory, so the file must not change while they are in use.
"""

import io
import math
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from snella_jax.files.errors import CheckpointError
from snella_jax.files.readers import mapped

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def read(path: Path) -> Any:
    """Reads what was saved, with NumPy arrays (read-only, own dtypes) for tensors.

    Of a TorchScript module it reads the tensors alone, by the names of its state_dict.

    Raises:
      CheckpointError: the file is damaged, of the format before PyTorch 1.6, or names
        something that is no tensor, number, string or container.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            path,
            "no zip archive: it is cut short, or was saved before PyTorch 1.6 (then "
            "load and save it again with a newer PyTorch)",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            saved = _Unpickler(path, archive).load()
            return dict(_tensors_of(saved)) if isinstance(saved, _Script) else saved
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError.damaged(path, error) from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive, self.file = path, archive, mapped(path)
        self.storages: dict[tuple[str, np.dtype], _Storage] = {}
        pickles = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(path, "expected one data.pkl in the archive")
        self.folder = pickles[0].removesuffix("data.pkl")
        order = f"{self.folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise CheckpointError(path, "expected numbers in little-endian order")
        data = archive.read(pickles[0])
        _check_memo(data)
        super().__init__(io.BytesIO(data), encoding="utf-8")

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return _Kind(np.dtype(STORAGES[name]))
        if (module, name) in GLOBALS:
            made = GLOBALS[module, name]
            # A new function each time: a pickle can set attributes of what it names.
            return lambda *arguments: made(*arguments)
        if module.split(".")[0] == "__torch__":  # a class of TorchScript
            return _Script
        raise CheckpointError(
            self.path,
            f"it names {module}.{name}, which is no tensor, number, string or "
            "container, and is not executed; save the tensors alone (a state_dict)",
        )

    def persistent_load(self, pid: Any) -> "_Storage":
        storage, kind, key, _, length = pid
        if storage != "storage" or not isinstance(kind, _Kind):
            raise ValueError(f"unknown storage {pid!r}")
        dtype = kind.dtype
        if (key, dtype) in self.storages:  # tensors may share one
            return self.storages[key, dtype]
        member = self.archive.getinfo(f"{self.folder}data/{key}")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"storage {key} is compressed")
        if member.file_size != length * dtype.itemsize:
            raise ValueError(f"storage {key} does not hold {length} {dtype}")
        numbers = self._bytes(member).view(dtype)
        return self.storages.setdefault((key, dtype), _Storage(numbers))

    def _bytes(self, member: zipfile.ZipInfo) -> np.ndarray:
        """Returns a stored member as a view of the file, once its checksum was read."""
        start = member.header_offset
        name, extra = self.file[start + 26 : start + 30].view("<u2").astype(int)
        start += 30 + name + extra  # of the local header
        data = self.file[start : start + member.file_size]
        found = zlib.crc32(data)  # pyright: ignore[reportArgumentType]
        if len(data) < member.file_size or found != member.CRC:
            raise ValueError(f"{member.filename} is not what was written")
        return data


def _check_memo(data: bytes) -> None:
    """Raises a `ValueError` for gaps in the memo, for which memory is allocated."""
    for count, (code, argument, _) in enumerate(pickletools.genops(data)):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise ValueError(f"operation {count} notes something at place {argument}")


class _Fixed:
    """Object that is made here and given to the pickle, which cannot change it."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it sets the state of a storage or a dtype")


class _Kind(_Fixed):
    """Stand-in for `torch.FloatStorage` and its like."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class _Storage(_Fixed):
    """Numbers that tensors are views of; no tensor is a storage itself."""

    def __init__(self, numbers: np.ndarray):
        self.numbers = numbers


class _Dict(dict):
    """Stand-in for `collections.OrderedDict` without PyTorch's attributes."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Script:
    """Stand-in for a module of TorchScript: its attributes, and no program."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"the state of a module is {type(state).__name__}")
        self.attributes = state


def _tensors_of(
    script: _Script, prefix: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a module and those in it, each module at one place."""
    seen = set() if seen is None else seen
    if id(script) in seen:
        raise ValueError(f"{prefix} is a module that has another place, too")
    seen.add(id(script))
    for name, value in script.attributes.items():
        if isinstance(value, np.ndarray):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Script):
            yield from _tensors_of(value, f"{prefix}{name}.", seen)


def _tensor(of: _Storage, offset: int, size: tuple, stride: tuple, *_: Any):
    """Stands in for `torch._utils._rebuild_tensor_v2`."""
    if not isinstance(of, _Storage):
        raise ValueError("a tensor of something else than a storage")
    storage = of.numbers
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise ValueError(f"a tensor of size {size} and stride {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # No more elements than are there: one number expanded to 2^40 would be read too.
    if math.prod(size) > len(storage) or (0 not in size and last >= len(storage)):
        raise ValueError(f"a tensor of size {size} leaves its storage")
    bytes_ = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(
        storage[offset:], tuple(size), bytes_, writeable=False
    )


def _list(values: list) -> list:
    """Stands in for `torch.jit._pickle.build_intlist` and its like."""
    return list(values)


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    """Stands in for `torch._utils._rebuild_parameter`."""
    return data


def _size(values: tuple) -> tuple[int, ...]:
    """Stands in for `torch.Size`."""
    return tuple(int(value) for value in values)


class _NumpyDtype:
    """Stand-in for `numpy.dtype`, which a file must not touch."""

    def __init__(self, name: str, *_: Any):
        if np.dtype(name).kind not in "biuf":
            raise ValueError(f"a NumPy scalar of dtype {name}")
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in "<|":
            raise ValueError(f"a NumPy scalar in byte order {state[1]}")


def _numpy_scalar(dtype: _NumpyDtype, value: bytes) -> Any:
    """Stands in for `numpy.core.multiarray.scalar`, as which accuracies are saved."""
    (number,) = np.frombuffer(value, np.dtype(dtype.name).newbyteorder("<"))
    return number.item()


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`: how old pickles write a NumPy scalar's bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes in {encoding}")
    return text.encode(encoding)


GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.jit._pickle", "build_boollist"): _list,
    ("torch.jit._pickle", "build_doublelist"): _list,
    ("torch.jit._pickle", "build_intlist"): _list,
    ("torch.jit._pickle", "build_tensorlist"): _list,
    ("numpy", "dtype"): _NumpyDtype,
    ("_codecs", "encode"): _encode,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
}
