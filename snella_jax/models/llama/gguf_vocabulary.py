"""The tokenizer inside a GGUF file."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snella_jax.files import gguf_file
from snella_jax.files.errors import CheckpointError
from snella_jax.files.vocabulary_packages import package
from snella_jax.models.llama.vocabulary import (
    LLAMA3_PATTERN,
    Tokenizer,
    byte_level,
    sentencepiece,
)

KEYS = "tokenizer.ggml."
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # SentencePiece's types of pieces
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
WORDS = ("smollm", "gpt-2", *LLAMA3)  # known rules to cut a text, `tokenizer.ggml.pre`


def read(path: Path) -> Tokenizer:
    """Reads the tokenizer: byte-level BPE (`gpt2`) or SentencePiece (`llama`).

    Raises:
      CheckpointError: the file is damaged, has no tokenizer, or one of another kind.
      ModuleNotFoundError: `tokenizers` or `sentencepiece` is not installed.
    """
    metadata = gguf_file.open(path).metadata
    values = {
        k.removeprefix(KEYS): v for k, v in metadata.items() if k.startswith(KEYS)
    }
    kind = values.get("model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            path, f"its tokenizer is of kind {kind!r}, expected 'gpt2' or 'llama'"
        )
    _check(path, values)
    return (_byte_level if kind == "gpt2" else _sentencepiece)(path, values)


def _check(path: Path, values: Mapping[str, Any]) -> None:
    """Raises a `CheckpointError` if lists and ids do not fit each other."""
    kinds = {"tokens": str, "token_type": int}
    kinds |= {"merges": str} if values["model"] == "gpt2" else {"scores": float}
    for name, kind in kinds.items():
        given = values.get(name)
        if not isinstance(given, list) or not all(isinstance(x, kind) for x in given):
            raise CheckpointError(path, f"its tokenizer has no list of {name}")
    tokens = values["tokens"]
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(path, "damaged: several of its tokens are equal")
    for name in kinds.keys() - {"merges"}:
        if len(values[name]) != len(tokens):
            raise CheckpointError(
                path, f"damaged: {len(values[name])} {name} of {len(tokens)} tokens"
            )
    if "eos_token_id" not in values:
        raise CheckpointError(path, "its tokenizer has no eos_token_id")
    for name in ("bos_token_id", "eos_token_id", "padding_token_id"):
        number = values.get(name, 0)
        if not isinstance(number, int) or not 0 <= number < len(tokens):
            raise CheckpointError(
                path, f"damaged: {name} is {number!r} of {len(tokens)} tokens"
            )


def _ids(values: Mapping[str, Any], adds_bos: bool) -> dict[str, Any]:
    """Returns the special ids; `adds_bos` is llama.cpp's choice where none is given."""
    return {
        "bos": values.get("bos_token_id"),
        "eos": values["eos_token_id"],
        "pad": values.get("padding_token_id"),
        "adds_bos": bool(values.get("add_bos_token", adds_bos)),
    }


def _byte_level(path: Path, values: Mapping[str, Any]) -> Tokenizer:
    how = values.get("pre")
    if how not in WORDS:
        raise CheckpointError(
            path,
            f"its tokenizer cuts texts as {how!r} does, expected one of "
            f"{', '.join(WORDS)}",
        )
    tokenizers = package("tokenizers", path, "language")
    words = tokenizers.pre_tokenizers
    if how in LLAMA3:
        pattern = tokenizers.Regex(LLAMA3_PATTERN)
        cuts = [
            words.Split(pattern, "isolated"),
            words.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        cuts = [words.ByteLevel(add_prefix_space=False)]
        if how == "smollm":
            cuts.insert(0, words.Digits(individual_digits=True))
    tokens, types = values["tokens"], values["token_type"]
    try:
        model = tokenizers.models.BPE(
            {token: number for number, token in enumerate(tokens)},
            [tuple(merge.split(" ")) for merge in values["merges"]],
            ignore_merges=how in LLAMA3,  # its merges do not reach all of its tokens
        )
    except Exception as error:
        raise CheckpointError.damaged(path, error) from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = words.Sequence(cuts)
    backend.decoder = tokenizers.decoders.ByteLevel()
    for kind, add in (
        (CONTROL, backend.add_special_tokens),
        (USER_DEFINED, backend.add_tokens),
    ):
        chosen = [t for t, own in zip(tokens, types, strict=True) if own == kind]
        add([tokenizers.AddedToken(token, normalized=False) for token in chosen])
    return byte_level(backend, **_ids(values, adds_bos=how in LLAMA3))


def _sentencepiece(path: Path, values: Mapping[str, Any]) -> Tokenizer:
    """Writes the model as SentencePiece's `ModelProto`, which its package reads."""
    lists = (values[name] for name in ("tokens", "scores", "token_type"))
    pieces = [
        _bytes(1, _bytes(1, token.encode()) + _float(2, score) + _int(3, kind))
        for token, score, kind in zip(*lists, strict=True)
    ]
    types, bpe = values["token_type"], 2
    unknown = types.index(UNKNOWN) if UNKNOWN in types else 0
    trainer = _int(3, bpe) + _int(35, BYTE in types) + _int(40, unknown)
    normalizer = (
        _bytes(1, b"identity")
        + _int(3, values.get("add_space_prefix", True))
        + _int(4, values.get("remove_extra_whitespaces", False))
    )
    proto = b"".join(pieces) + _bytes(2, trainer) + _bytes(3, normalizer)
    return sentencepiece(path, proto, **_ids(values, adds_bos=True))


def _varint(number: int) -> bytes:
    """Returns a number in groups of seven bits, the lowest first.

    >>> _varint(300).hex()
    'ac02'
    """
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def _int(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(int(number))


def _float(field: int, number: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", number)


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data
