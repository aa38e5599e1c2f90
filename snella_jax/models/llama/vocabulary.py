"""Tokenizers made by the packages that know a format.

`tokenizers` reads `tokenizer.json`, `sentencepiece` the vocabularies of LLaMA 1 and 2,
`tiktoken` runs the ranks of Llama 3. Each is imported where it is used.
"""

import base64
import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from snella_jax.files import vocabulary_packages
from snella_jax.files.errors import CheckpointError
from snella_jax.files.vocabulary_packages import package

# Llama 3's, from llama-models' tokenizer.py.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = {  # places after the last rank; 256 are reserved
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|finetune_right_pad_id|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eom_id|>": 8,
    "<|eot_id|>": 9,
    "<|python_tag|>": 10,
}
LLAMA3_RESERVED = 256
# Longer runs overflow the stack of tiktoken's regular expressions.
LONGEST_RUN = 25_000


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Tokenizer of a language model.

    Attributes:
      size: number of ids.
      bos: id that begins a text; None where the model has none.
      eos: id that ends a text.
      pad: id to fill rows with; `eos` where the file names none.
      adds_bos: True if `encode` begins with `bos` unless told otherwise, as the file
        has it.
      to_ids: encodes a text without `bos`.
      to_text: decodes ids, of which those of special tokens give nothing.
    """

    size: int
    bos: int | None
    eos: int
    pad: int
    adds_bos: bool
    to_ids: Callable[[str], list[int]]
    to_text: Callable[[list[int]], str]

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Returns the ids of a text; the id that ends a text is not among them.

        Where the text has that of a special token, such as `<|eot_id|>`, byte-level
        vocabularies give this token, as their packages do; SentencePiece gives the
        pieces of its letters.

        Args:
          text: any, also an empty one.
          bos: True to begin with `bos`, False not to; None as the file has it.

        Raises:
          ValueError: the model has no `bos`, or the text a lone surrogate, which is no
            character.
        """
        text.encode("utf-8")
        bos = self.adds_bos if bos is None else bos
        if not bos:
            return self.to_ids(text)
        if self.bos is None:
            raise ValueError("bos=True: the model has no token that begins a text.")
        return [self.bos, *self.to_ids(text)]

    def decode(self, ids: Iterable[Any]) -> str:
        """Returns the text of ids; special tokens give nothing.

        Bytes that are no UTF-8, of a character that is cut, become U+FFFD.

        Raises:
          ValueError: there is no such id.
        """
        numbers = [int(number) for number in ids]
        for number in numbers:
            if not 0 <= number < self.size:
                raise ValueError(f"id {number}: expected 0 to {self.size - 1}.")
        return self.to_text(numbers)


def byte_level(
    backend: Any, *, bos: int | None, eos: int, pad: int | None, adds_bos: bool
) -> Tokenizer:
    """Returns a tokenizer of the package `tokenizers`."""
    backend.no_truncation()  # a file may ask for both
    backend.no_padding()
    return Tokenizer(
        size=backend.get_vocab_size(),
        bos=bos,
        eos=eos,
        pad=eos if pad is None else pad,
        adds_bos=adds_bos,
        to_ids=lambda text: backend.encode(text, add_special_tokens=False).ids,
        to_text=backend.decode,
    )


def sentencepiece(
    path: Path,
    proto: bytes,
    *,
    bos: int | None = None,
    eos: int | None = None,
    pad: int | None = None,
    adds_bos: bool = True,
) -> Tokenizer:
    """Returns a tokenizer of the package `sentencepiece`.

    Args:
      path: file to name in errors.
      proto: serialized `ModelProto`.
      bos: id that begins a text; None for the model's own, likewise `eos` and `pad`.
      adds_bos: as in `Tokenizer`.

    Raises:
      CheckpointError: it is damaged, or has no token that ends a text.
      ModuleNotFoundError: `sentencepiece` is not installed.
    """
    pieces = vocabulary_packages.pieces(path, proto, "language")

    def own(number: int | None, known: int) -> int | None:
        return number if number is not None else known if known >= 0 else None

    eos = own(eos, pieces.eos_id())
    if eos is None:
        raise CheckpointError(path, "no token ends a text")
    pad = own(pad, pieces.pad_id())
    return Tokenizer(
        size=pieces.vocab_size(),
        bos=own(bos, pieces.bos_id()),
        eos=eos,
        pad=eos if pad is None else pad,
        adds_bos=adds_bos,
        to_ids=pieces.encode,
        to_text=pieces.decode,
    )


def ranks(path: Path) -> Tokenizer:
    """Returns the tokenizer of a ranks file of Llama 3: a line `BASE64 RANK` a token.

    Special tokens are those of Llama 3.1. Texts are cut as in Meta's code where spaces
    or letters run on for more than 25,000 characters.

    Raises:
      CheckpointError: it is damaged.
      ModuleNotFoundError: `tiktoken` is not installed.
    """
    tiktoken = package("tiktoken", path, "language")
    try:
        lines = (line.split() for line in path.read_bytes().splitlines())
        found = {base64.b64decode(t, validate=True): int(rank) for t, rank in lines}
        count = len(found)
        if sorted(found.values()) != list(range(count)):
            raise ValueError("the ranks are not 0, 1, 2 and so on")
        if missing := [byte for byte in range(256) if bytes([byte]) not in found]:
            raise ValueError(f"no rank for the bytes {missing[:5]}")
        special = {name: count + place for name, place in LLAMA3_SPECIAL.items()}
        encoding = tiktoken.Encoding(
            path.name,
            pat_str=LLAMA3_PATTERN,
            mergeable_ranks=found,
            special_tokens=special,
        )
    except ValueError as error:
        raise CheckpointError.damaged(path, error) from error

    def to_ids(text: str) -> list[int]:
        encode = encoding.encode
        return [i for t in _short_runs(text) for i in encode(t, allowed_special="all")]

    return Tokenizer(
        size=count + LLAMA3_RESERVED,
        bos=special["<|begin_of_text|>"],
        eos=special["<|end_of_text|>"],
        pad=special["<|finetune_right_pad_id|>"],
        adds_bos=True,
        to_ids=to_ids,
        to_text=lambda ids: encoding.decode([i for i in ids if i < count]),
    )


def _short_runs(text: str) -> list[str]:
    """Cuts a text where spaces, or other characters, run on for too long.

    >>> list(map(len, _short_runs("a" * 60_000 + " b")))
    [25000, 25000, 10002]
    """
    cuts = [0]
    for run in re.finditer(r"\s+|\S+", text):
        cuts += range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
