"""Tokenizers of Stable Diffusion 3's text encoders: CLIP's and T5's.

CLIP's is a byte-level BPE that follows from its merges alone. They come in the folders
`tokenizer` of diffusers, and as `bpe_simple_vocab_16e6.txt.gz` in OpenAI's repository
and in the PyPI package `open-clip-torch`. It needs `tokenizers`, T5's `sentencepiece`.
"""

import dataclasses
import gzip
import importlib.util
import logging
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from snella_jax.files.errors import CheckpointError
from snella_jax.files.readers import check_download, read_json
from snella_jax.files.vocabulary_packages import package, pieces

log = logging.getLogger("snella_jax")

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 48_894  # of the 262,144 lines in OpenAI's file
OPEN_CLIP = "bpe_simple_vocab_16e6.txt.gz"
# Contractions, runs of letters, single digits, the rest: transformers' CLIPTokenizer.
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Tokenizer of a text encoder.

    Attributes:
      size: number of ids.
      start: id that begins a text; None where texts begin at once.
      end: id that ends a text.
      pad: id to fill rows with.
      length: most ids of a text, start and end included; longer texts are cut.
      to_ids: encodes a text without start and end.
    """

    size: int
    start: int | None
    end: int
    pad: int
    length: int
    to_ids: Callable[[str], list[int]]

    def encode(self, text: str, length: int | None = None) -> list[int]:
        """Returns the ids of a text with start and end; logs it if it is cut.

        Args:
          text: any, also an empty one.
          length: most ids; None for `self.length`.

        Raises:
          ValueError: the text has a lone surrogate, which is no character, or the
            length leaves no place for start and end.
        """
        text.encode("utf-8")
        length = self.length if length is None else length
        start = [] if self.start is None else [self.start]
        room = length - len(start) - 1
        if room < 0:
            raise ValueError(f"length={length}: expected room for start and end.")
        ids = self.to_ids(text)
        if len(ids) > room:
            log.warning(
                "A text has %d tokens, of which the first %d are read: %.60r...",
                len(ids),
                room,
                text,
            )
        return [*start, *ids[:room], self.end]

    def padded(
        self, texts: Sequence[str], length: int | None = None, pad: int | None = None
    ) -> Int[np.ndarray, "B length"]:
        """Returns the ids of texts, int32, filled up at the end to a common length.

        Args:
          texts: texts.
          length: as in `encode`.
          pad: id to fill with; None for `self.pad`. Stable Diffusion 3 fills CLIP-L's
            rows with the end and bigG's with 0.

        Raises:
          TypeError: one text instead of several.
          ValueError: as in `encode`.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts={texts!r}: expected a list of texts.")
        length = self.length if length is None else length
        pad = self.pad if pad is None else pad
        rows = np.full((len(texts), length), pad, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = self.encode(text, length)
            row[: len(ids)] = ids
        return rows


def clip_tokenizer(path: str | Path | None = None, length: int = 77) -> Tokenizer:
    """Loads CLIP's tokenizer: texts become lower case, and white space does not count.

    Ids are those of transformers' `CLIPTokenizer`, whatever the file; that fills bigG's
    rows with `!` and then reads every `!` of a text as filling, which is not done here.

    Args:
      path: a folder of transformers with `vocab.json` and `merges.txt`, or else with
        `tokenizer.json`, that file, or merges alone (`bpe_simple_vocab_16e6.txt.gz`,
        `merges.txt`), from which the ids follow; None for those in the installed
        package `open-clip-torch`, which is not imported.
      length: most ids of a text.

    Raises:
      FileNotFoundError: there is nothing at `path`, or no tokenizer in the folder.
      CheckpointError: the file is damaged, or no CLIP's.
      ModuleNotFoundError: `tokenizers` or `open-clip-torch` is not installed.
    """
    path = _open_clip() if path is None else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no tokenizer at {path}.")
    path, ids, merges = _vocabulary(path)
    if missing := [token for token in (START, END) if token not in ids]:
        raise CheckpointError(path, f"no CLIP's: it has no {' and no '.join(missing)}")
    letters = {letter + end for letter in _letters() for end in ("", "</w>")}
    made = letters | {START, END} | {"".join(merge) for merge in merges}
    unmade = sorted(ids.keys() - made)
    if unmade and len(ids) > MERGES:  # the whole vocabulary, not one for tests
        raise CheckpointError(
            path,
            f"no merge makes {len(unmade)} of {len(ids)} tokens, {unmade[0]!r} among "
            "them: its merges are cut off, or of another vocabulary",
        )
    backend = _bpe(path, ids, merges)
    return Tokenizer(
        size=len(ids),
        start=ids[START],
        end=ids[END],
        pad=ids[END],
        length=length,
        to_ids=lambda text: backend.encode(text, add_special_tokens=False).ids,
    )


def t5_tokenizer(path: str | Path, length: int = 256) -> Tokenizer:
    """Loads T5's tokenizer, whose texts have an end and no start.

    Args:
      path: a `spiece.model` of SentencePiece, a `tokenizer.json`, or a folder with one
        of them, looked for in this order.
      length: most ids of a text: 256 in diffusers' pipeline, 77 in its training script.

    Raises:
      FileNotFoundError: there is nothing at `path`, or no tokenizer in the folder.
      CheckpointError: the file is damaged, or no T5's.
      ModuleNotFoundError: `sentencepiece` or `tokenizers` is not installed.
    """
    path = Path(path)
    names = ("spiece.model", "tokenizer.json")
    if not path.exists():
        raise FileNotFoundError(f"There is no tokenizer at {path}.")
    if path.is_dir():
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path} has none of {', '.join(names)}.")
        path = found[0]
    check_download(path)
    if path.suffix == ".json":
        backend = _json_backend(path)

        def to_ids(text: str) -> list[int]:
            return backend.encode(text, add_special_tokens=False).ids

        size = backend.get_vocab_size()
        pad, end = (backend.token_to_id(token) for token in ("<pad>", "</s>"))
    else:
        model = pieces(path, path.read_bytes(), "generation")
        to_ids = model.encode
        size, pad, end = model.vocab_size(), model.pad_id(), model.eos_id()
    if (pad, end) != (0, 1):
        raise CheckpointError(
            path, f"no T5's: its padding is {pad} and its end {end}, expected 0 and 1"
        )
    return Tokenizer(size, None, end, pad, length, to_ids)


def _open_clip() -> Path:
    """Returns the merges in the package `open-clip-torch`, which needs PyTorch."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "CLIP's merges are in the package open-clip-torch: pip install --no-deps "
            "open-clip-torch==3.3.0, or give the path of a tokenizer."
        )
    return Path(spec.submodule_search_locations[0]) / OPEN_CLIP


def _vocabulary(path: Path) -> tuple[Path, dict[str, int], list[tuple[str, ...]]]:
    """Returns the file to name in errors, ids by token, and merges."""
    if path.is_dir():
        names = [path / name for name in ("vocab.json", "merges.txt")]
        if all(name.exists() for name in names):
            return path, read_json(names[0]), _merges(names[1])
        if not (path / "tokenizer.json").exists():
            raise FileNotFoundError(
                f"{path} has neither vocab.json and merges.txt nor tokenizer.json."
            )
        path = path / "tokenizer.json"
    if path.suffix == ".json":
        model = read_json(path).get("model")
        if not isinstance(model, dict) or not {"vocab", "merges"} <= model.keys():
            raise CheckpointError(path, "no CLIP's: expected the vocabulary of a BPE")
        merges = (m.split() if isinstance(m, str) else m for m in model["merges"])
        return path, model["vocab"], [tuple(merge) for merge in merges]
    merges = _merges(path)
    letters = _letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["".join(merge) for merge in merges]
    tokens += [START, END]
    return path, {token: number for number, token in enumerate(tokens)}, merges


def _merges(path: Path) -> list[tuple[str, ...]]:
    """Reads the merges that count: a header, then two parts of a token a line."""
    check_download(path)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise CheckpointError.damaged(path, error) from error
    header, *lines = text.split("\n")
    if "#version" not in header:
        raise CheckpointError(path, f"no merges: it begins with {header[:40]!r}")
    found = [tuple(line.split()) for line in lines[:MERGES] if line]
    for number, merge in enumerate(found, 2):
        if len(merge) != 2:
            raise CheckpointError(
                path, f"line {number} is {' '.join(merge)[:40]!r}: expected two parts"
            )
    return found


def _letters() -> list[str]:
    """Returns the letters that stand for bytes, in the order of their ids in CLIP.

    Printable bytes come first and stand for themselves, the others from 256.

    >>> _letters()[0], _letters()[188], len(_letters())
    ('!', 'Ā', 256)
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(n) for n in [*plain, *range(256, 256 + 256 - len(plain))]]


def _bpe(path: Path, ids: dict[str, int], merges: list[tuple[str, ...]]) -> Any:
    """Returns the tokenizer of the package `tokenizers`, as transformers makes it."""
    tokenizers = package("tokenizers", path, "generation")
    normalizers, cuts = tokenizers.normalizers, tokenizers.pre_tokenizers
    regex = tokenizers.Regex
    try:
        model = tokenizers.models.BPE(
            vocab=ids,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=END,
        )
    except Exception as error:  # the package raises nothing narrower
        raise CheckpointError.damaged(path, error) from error
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    backend.pre_tokenizer = cuts.Sequence(
        [
            cuts.Split(regex(WORDS), behavior="removed", invert=True),
            cuts.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.add_special_tokens([START, END])
    return backend


def _json_backend(path: Path) -> Any:
    tokenizers = package("tokenizers", path, "generation")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise CheckpointError.damaged(path, error) from error
    backend.no_truncation()  # a file may ask for both
    backend.no_padding()
    return backend
