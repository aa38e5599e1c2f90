"""Packages that read vocabularies, and files that they would misread."""

import importlib
from pathlib import Path
from typing import Any, Literal

from snella_jax.files.errors import CheckpointError

Extra = Literal["generation", "language"]


def package(name: str, path: Path, extra: Extra) -> Any:
    """Imports a package that a file needs.

    Args:
      name: name of the package.
      path: file to name in the error.
      extra: the extra of this project that has it.

    Raises:
      ModuleNotFoundError: it is not installed; names the file and the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'The tokenizer in {path} needs {name}: pip install "snella-jax[{extra}]"'
        ) from error


def pieces(path: Path, proto: bytes, extra: Extra) -> Any:
    """Returns the `SentencePieceProcessor` of a serialized `ModelProto`.

    Args:
      path: file to name in errors.
      proto: content of a `.model` file of SentencePiece.
      extra: as in `package`.

    Raises:
      CheckpointError: it is damaged.
      ModuleNotFoundError: `sentencepiece` is not installed.
    """
    spm = package("sentencepiece", path, extra)
    try:
        _check_whole(proto)
        return spm.SentencePieceProcessor(model_proto=proto)
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError.damaged(path, error) from error


def _check_whole(proto: bytes) -> None:
    """Raises a `ValueError` if a `ModelProto` ends before its last part.

    One that is cut between two pieces is a valid message of fewer pieces.
    """
    parts, at = set(), 0
    while at < len(proto):
        tag, at = _varint(proto, at)
        size, at = _varint(proto, at)
        parts.add(tag)
        at += size
    pieces, trainer, normalizer = 0x0A, 0x12, 0x1A
    if at != len(proto) or not {pieces, trainer, normalizer} <= parts:
        raise ValueError("expected pieces, trainer_spec and normalizer_spec")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns the number at a place and the place after it."""
    number, shift = 0, 0
    while data[at] & 0x80:
        number |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return number | data[at] << shift, at + 1
