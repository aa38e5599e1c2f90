"""Tokenizers of language models, from the files that models come with."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snella_jax.files.errors import CheckpointError
from snella_jax.files.readers import read_json
from snella_jax.files.vocabulary_packages import package
from snella_jax.models.llama import gguf_vocabulary
from snella_jax.models.llama.vocabulary import (
    Tokenizer,
    byte_level,
    ranks,
    sentencepiece,
)

NAMES = ("tokenizer.json", "tokenizer.model")
CONFIG = "tokenizer_config.json"
RANKS = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # a first line
# What a tokenizer.json without a config beside it begins and ends texts with.
USUAL = (("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"))


def tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer; the file's content says of which kind it is.

    Args:
      path: a `tokenizer.json` of Hugging Face, a `tokenizer.model` of SentencePiece
        (LLaMA 1 and 2) or of Llama 3 (ranks), a GGUF file, or a folder with one of
        them, looked for in this order.

    Raises:
      FileNotFoundError: there is nothing at `path`, or no tokenizer in the folder.
      CheckpointError: the file is damaged, or of no known format.
      ModuleNotFoundError: a package of the extra `language` is missing; says which.
    """
    path = _file(Path(path))
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"GGUF"):
        return gguf_vocabulary.read(path)
    if start.lstrip().startswith(b"{"):
        return _json(path)
    if RANKS.match(start):
        return ranks(path)
    adds = _config(path.parent).get("add_bos_token", True)
    return sentencepiece(path, path.read_bytes(), adds_bos=bool(adds))


def _file(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"There is no tokenizer at {path}.")
    if path.is_file():
        return path
    found = [path / name for name in NAMES if (path / name).is_file()]
    found = found[:1] or sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{path} has {len(found) or 'no'} tokenizers: expected {NAMES[0]}, "
            f"{NAMES[1]} or one GGUF file."
        )
    return found[0]


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    return read_json(path) if path.exists() else {}


def _json(path: Path) -> Tokenizer:
    """Reads a `tokenizer.json`; the config beside it names the special tokens."""
    tokenizers = package("tokenizers", path, "language")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_padding()  # which would stand before what begins a text
        begun = backend.encode("", add_special_tokens=True).ids
    except Exception as error:
        raise CheckpointError.damaged(path, error) from error
    config = _config(path.parent)
    known = [
        [token if backend.token_to_id(token) is not None else None for token in pair]
        for pair in USUAL
    ]
    begin, end = next((pair for pair in known if pair[1] is not None), (None, None))
    names = {"bos_token": begin, "eos_token": end, **config}
    bos, eos, pad = (
        _id(path, backend, f"{name}_token", names) for name in ("bos", "eos", "pad")
    )
    if eos is None:
        raise CheckpointError(
            path, f"no token ends a text: expected eos_token in a {CONFIG} beside it"
        )
    adds = config.get("add_bos_token")
    if adds is None:
        adds = bos is not None and begun[:1] == [bos]
    if adds and bos is None:
        raise CheckpointError(
            path, f"a token begins a text: expected bos_token in the {CONFIG} beside it"
        )
    return byte_level(backend, bos=bos, eos=eos, pad=pad, adds_bos=bool(adds))


def _id(path: Path, backend: Any, name: str, names: Mapping[str, Any]) -> int | None:
    """Returns the id of a special token; None where there is none."""
    token = names.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    number = backend.token_to_id(str(text))
    if number is None:
        raise CheckpointError(path, f"it has no token {text!r}, which is to be {name}")
    return number
