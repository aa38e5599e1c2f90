"""Paths on the command line, and names that a run folder may have."""

import os
import re
from pathlib import Path
from typing import Annotated

import jax
from tyro.constructors import PrimitiveConstructorSpec

# Orbax takes these for patterns, separators and URLs.
UNREADABLE = re.compile(r"[*?\[\\]|:(?=/|$)")
ENDINGS = (  # of weights, texts and tables: others belong to the name
    *(".npz", ".pth", ".pt", ".bin", ".onnx", ".gguf", ".safetensors"),
    *(".csv", ".json", ".jsonl"),
)
DEEPEST = 400  # bytes; the longest path below a run folder is shorter


def at_home(path: str | Path) -> Path:
    """Returns a path, in the user's home if it begins with `~`.

    >>> at_home("runs/~").as_posix()
    'runs/~'
    """
    text = os.path.expanduser(path)
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # of a file in UTF-8, in a locale of another encoding
        return written(text)
    return Path(text)


def written(text: str) -> Path:
    """Returns the path that a text in UTF-8 names, whatever the locale's encoding.

    >>> written("images/ü.png").name
    'ü.png'
    """
    return Path(os.fsdecode(text.encode("utf-8", "surrogateescape")))


Given = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: at_home(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
"""A path on a command line."""


def check_out(out: Path) -> None:
    """Raises a `ValueError` if a folder could not be made or filled."""
    whole = out.absolute()
    there = next(path for path in (whole, *whole.parents) if os.path.exists(path))
    if not there.is_dir():
        raise ValueError(f"--out {out}: {there} is a file, expected a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {there} cannot be written to.")
    name, total = (_limit(there, which) for which in ("PC_NAME_MAX", "PC_PATH_MAX"))
    if long := [part for part in whole.parts if len(os.fsencode(part)) > name]:
        raise ValueError(
            f"--out {out}: {long[0]!r} has more than the {name} bytes that a name may "
            "have. Choose a shorter one."
        )
    if len(os.fsencode(whole)) + DEEPEST > total:
        raise ValueError(
            f"--out {out}: a file in it would have a path of more than {total} bytes. "
            "Choose a shorter one."
        )
    if is_unreadable(out) and jax.process_count() > 1:
        raise ValueError(
            f"--out {out}: several processes can share no checkpoints below a name "
            "with *, ?, [, a backslash, a colon at its end or bytes that are not "
            "UTF-8. Choose another."
        )


def printable(name: str) -> str:
    r"""Returns a name as any file can hold it; bytes that are no UTF-8 become escapes.

    >>> printable("caf\udce9")
    'caf\\xe9'
    """
    data = name.encode("utf-8", "surrogateescape")
    return data.decode("utf-8", "backslashreplace")


def stem(path: str | Path) -> str:
    """Returns the name of a file without its ending, or of a folder as it is.

    >>> stem("weights/ViT-B_16.npz"), stem("weights/Llama-3.2-1B")
    ('ViT-B_16', 'Llama-3.2-1B')
    """
    path = Path(path)
    return path.stem if path.suffix.lower() in ENDINGS else path.name


def shortened(name: str, room: int) -> str:
    """Returns a name of at most `room` bytes, cut at its end.

    >>> shortened("pets", 255), shortened("äpfel", 2)
    ('pets', 'ä')
    """
    data = os.fsencode(name)
    return name if len(data) <= room else data[:room].decode("utf-8", "ignore")


def is_unreadable(path: Path) -> bool:
    """Returns True if Orbax could not read again what it writes into a folder."""
    text = "/".join(path.absolute().parts[1:])
    as_utf_8 = text.encode("utf-8", "surrogatepass")  # as TensorStore opens it
    return bool(UNREADABLE.search(text)) or os.fsencode(text) != as_utf_8


def _limit(folder: Path, which: str) -> int:
    usual = {"PC_NAME_MAX": 255, "PC_PATH_MAX": 4096}[which]
    return os.pathconf(folder, which) if hasattr(os, "pathconf") else usual
