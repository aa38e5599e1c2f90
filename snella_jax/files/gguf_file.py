"""GGUF files: metadata and tensors, memory-mapped, dequantised when they are read.

The format is ggml's (https://github.com/ggml-org/ggml), versions 2 and
3, little-endian. The header is read here, with every count and offset checked, for the
package `gguf` loops over impossible ones; the package dequantises the blocks.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from snella_jax.files.errors import CheckpointError

FLOATS = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NUMBERS = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}  # of other types gguf knows them
TEXT, ARRAY = 8, 9
SCALARS = dict(enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"]))
SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
AT_ONCE = 2**22  # weights that are dequantised together


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """Tensor of a GGUF file.

    Attributes:
      name: name in the file.
      shape: shape in NumPy's order, so `[out, in]` for a linear layer.
      kind: name of its type in ggml, such as `F16` or `Q4_1`.
      data: read-only view of the file, uint8 `[rows, bytes of a row]`.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    data: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the numbers: the file's for floats, float32 for blocks."""
        return FLOATS.get(self.kind, np.dtype(np.float32))

    def read(self, dtype: DTypeLike | None = None) -> np.ndarray:
        """Returns the numbers, `[*shape]`, in a dtype or in the tensor's own.

        Blocks are dequantised and converted a few rows at a time. Where nothing is
        converted, the array is a read-only view of the file.
        """
        wanted = self.dtype if dtype is None else np.dtype(dtype)
        if self.kind in FLOATS:
            numbers = self.data.view(self.dtype).reshape(self.shape)
            return numbers.astype(wanted, copy=False)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        made = np.empty((len(self.data), self.shape[-1]), wanted)
        step = max(1, AT_ONCE // self.shape[-1])
        for row in range(0, len(made), step):
            blocks = self.data[row : row + step]
            made[row : row + step] = dequantize(blocks, GGMLQuantizationType[self.kind])
        return made.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """Contents of a GGUF file.

    Attributes:
      path: the file.
      metadata: values by key: numbers, booleans, texts, and lists of them.
      tensors: by name, in the file's order.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def open(path: str | Path) -> GGUFFile:
    """Opens a file; its tensors stay there until they are read.

    Raises:
      CheckpointError: the file is no GGUF, damaged, one of several parts, or has
        tensors of a type that cannot be dequantised.
      FileNotFoundError: there is no such file.
      ModuleNotFoundError: it has quantised tensors and `gguf` is not installed.
    """
    path = Path(path)
    if not path.stat().st_size:
        raise CheckpointError(path, "the file is empty")
    header = _Header(path, np.asarray(np.memmap(path, np.uint8, "r")))
    tensors, values = header.counts()
    metadata = header.metadata(values)
    if (parts := metadata.get("split.count", 1)) != 1:
        raise CheckpointError(
            path,
            f"one of {parts} parts of a model: join them (llama-gguf-split --merge)",
        )
    infos = header.infos(tensors)
    return GGUFFile(path, metadata, _tensors(header, infos, _alignment(path, metadata)))


class _Info(NamedTuple):
    """Line of the header on a tensor."""

    name: str
    shape: tuple[int, ...]
    number: int
    offset: int


class _Header:
    """Cursor in a file's header; every read checks that the bytes are there."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.at = path, data, 0

    def error(self, reason: str) -> CheckpointError:
        return CheckpointError(self.path, f"{reason} (at byte {self.at})")

    def check(self, count: int, what: str) -> None:
        left = len(self.data) - self.at
        if count > left:
            raise self.error(
                f"cut short or damaged: {what} takes {count} bytes, {left} are left"
            )

    def take(self, count: int, what: str) -> np.ndarray:
        self.check(count, what)
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, dtype: str, what: str) -> Any:
        return self.numbers(dtype, 1, what)[0]

    def numbers(self, dtype: str, count: int, what: str) -> list[Any]:
        kind = np.dtype(dtype)
        return self.take(count * kind.itemsize, what).view(kind).tolist()

    def text(self, what: str) -> str:
        data = self.take(self.number("<u8", what), what).tobytes()
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"damaged: {what} is no UTF-8 ({error})") from error

    def counts(self) -> tuple[int, int]:
        """Returns the numbers of tensors and of values in the metadata."""
        magic = self.take(4, "the magic number").tobytes()
        if magic != b"GGUF":
            raise CheckpointError(
                self.path, f"no GGUF file: it begins with {magic!r}, expected b'GGUF'"
            )
        version = self.number("<u4", "the version")
        if version % 2**16 == 0:
            raise self.error("big-endian or damaged: expected a little-endian file")
        if version not in (2, 3):
            raise self.error(f"version {version} of GGUF, expected 2 or 3")
        tensors, values = self.numbers("<u8", 2, "the numbers of tensors and values")
        return tensors, values

    def metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number in range(count):
            key = self.text(f"the name of value {number + 1} of {count}")
            if key in found:
                raise self.error(f"damaged: two values are called {key!r}")
            kind = self.number("<u4", f"the type of {key!r}")
            found[key] = self.value(kind, f"the value {key!r}")
        return found

    def value(self, kind: int, what: str) -> Any:
        if kind == TEXT:
            return self.text(what)
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind != ARRAY:
            raise self.error(f"damaged: {what} is of unknown type {kind}")
        kind, count = self.number("<u4", what), self.number("<u8", what)
        if kind == TEXT:
            self.check(8 * count, what)  # the lengths alone; else it would take hours
            return [self.text(what) for _ in range(count)]
        if kind in SCALARS:
            return self.numbers(SCALARS[kind], count, what)
        raise self.error(f"damaged: {what} is a list of unknown type {kind}")

    def infos(self, count: int) -> list[_Info]:
        """Returns what the header says of the tensors, whose names differ."""
        found: dict[str, _Info] = {}
        for number in range(count):
            name = self.text(f"the name of tensor {number + 1} of {count}")
            if name in found:
                raise self.error(f"damaged: two tensors are called {name!r}")
            what = f"the shape of tensor {name!r}"
            axes = self.number("<u4", what)
            if not 1 <= axes <= 4:
                raise self.error(f"damaged: {what} has {axes} axes, expected 1 to 4")
            shape = tuple(reversed(self.numbers("<u8", axes, what)))
            if 0 in shape:
                raise self.error(f"damaged: {what} is {shape}")
            kind = self.number("<u4", f"the type of tensor {name!r}")
            offset = self.number("<u8", f"the offset of tensor {name!r}")
            found[name] = _Info(name, shape, kind, offset)
        return list(found.values())


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment % 8 or alignment.bit_count() != 1:
        raise CheckpointError(
            path,
            f"damaged: general.alignment is {alignment!r}, expected a power of two "
            "from 8",
        )
    return alignment


def _tensors(header: _Header, infos: list[_Info], alignment: int) -> dict[str, Tensor]:
    """Returns the tensors by name; their data begin after the header."""
    begin = -(-header.at // alignment) * alignment
    data, path = header.data[begin:], header.path
    found: dict[str, Tensor] = {}
    end, last = 0, "the header"
    for info in sorted(infos, key=lambda info: info.offset):
        tensor = _tensor(path, data, info)
        if info.offset < end or info.offset % alignment:
            raise CheckpointError(
                path,
                f"damaged: tensor {info.name!r} begins at {info.offset}, expected a "
                f"multiple of {alignment} after {last}, which ends at {end}",
            )
        found[info.name] = tensor
        end, last = info.offset + tensor.data.nbytes, repr(info.name)
    return {info.name: found[info.name] for info in infos}


def _tensor(path: Path, data: np.ndarray, info: _Info) -> Tensor:
    try:
        kind, weights, size = _layout(path, info.number)
    except ValueError as error:
        raise CheckpointError(path, f"tensor {info.name!r} is of {error}") from error
    *_, columns = info.shape
    if columns % weights:
        raise CheckpointError(
            path,
            f"damaged: tensor {info.name!r} has {columns} columns, expected a multiple "
            f"of {kind}'s {weights}",
        )
    rows, row = math.prod(info.shape[:-1]), columns // weights * size
    end = info.offset + rows * row
    if end > len(data):
        raise CheckpointError(
            path,
            f"cut short or damaged: tensor {info.name!r} ({kind}, {info.shape}) ends "
            f"at byte {end} of the data, which have {len(data)}",
        )
    own = data[info.offset : end].reshape(rows, row)
    return Tensor(info.name, info.shape, kind, own)


def _layout(path: Path, number: int) -> tuple[str, int, int]:
    """Returns a type's name, and how many weights are in how many bytes.

    Raises:
      ValueError: there is no such type, or it cannot be dequantised.
      ModuleNotFoundError: `gguf` is needed and not installed.
    """
    if number in NUMBERS:
        return NUMBERS[number], 1, FLOATS[NUMBERS[number]].itemsize
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'Reading {path} needs gguf: pip install "snella-jax[language]"'
        ) from error
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(
            f"type {number}: the file is damaged, or newer than the installed gguf"
        ) from None
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        raise ValueError(
            f"type {kind.name}, which the package gguf cannot dequantise"
        ) from None
    return kind.name, weights, size
