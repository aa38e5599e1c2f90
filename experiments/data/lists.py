"""Lists of files: VTAB-1k as the PEFT papers share it, and other sets in that form.

The writers of VPT and NOAH give every list copies of its images: `train800.txt` has
lines such as `images/train800/000000.jpg 3`, `train800val200.txt` has the same images
again as `images/train800val200/000000.jpg`.
"""

from collections import Counter
from pathlib import Path

from experiments.data.listed import Found, Listed
from experiments.paths import written

BOTH = "train800val200.txt"
NAMED = ("train800.txt", "val200.txt", "test.txt")
PLAIN = ("train.txt", "val.txt", "test.txt")


def read(folder: Path) -> Found:
    """Reads a folder's lists: text files with a line `images/0.jpg 3` for each image.

    `val.txt` may be missing. With `train800val200.txt` alone, its last 200 lines are
    the validation split, or the last fifth if it has fewer than 1000.

    Raises:
      FileNotFoundError: a list is missing.
      ValueError: a line is not a path and a label, or `train800val200.txt` does not
        list as many images of each label as the lists of its parts.
    """
    train, validation, test = PLAIN if (folder / PLAIN[0]).exists() else NAMED
    both = lines(folder / BOTH) if (folder / BOTH).exists() else []
    if both and not (folder / train).exists() and not (folder / validation).exists():
        cut = len(both) - min(200, max(1, len(both) // 5))
        return Found(both[:cut], both[cut:], lines(folder / test))
    for name in (train, validation, test):
        if not (folder / name).exists() and name != "val.txt":
            raise FileNotFoundError(
                f"{folder / name} is missing: expected {train}, {validation}, {test}."
            )
    parts = [lines(folder / train), [], lines(folder / test)]
    if (folder / validation).exists():
        parts[1] = lines(folder / validation)
    if both:
        _check_both(folder, both, parts[0] + parts[1], f"{train} and {validation}")
    return Found(*parts)


def lines(path: Path) -> Listed:
    """Returns the files, relative to the list's folder, and labels of a list.

    Raises:
      FileNotFoundError, ValueError: as `read`, or it is empty.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    listed: Listed = []
    for number, line in enumerate(text(path), start=1):
        if not line.strip():
            continue
        *file, label = line.strip().rsplit(maxsplit=1)
        if not file or not label.isdecimal() or int(label) >= 2**31:
            raise ValueError(
                f"{path}, line {number}: {line!r}, expected a path and a label from 0."
            )
        listed.append((path.parent / written(file[0]), int(label)))
    if not listed:
        raise ValueError(f"{path} is empty.")
    return listed


def text(path: Path) -> list[str]:
    """Returns the lines of a text file.

    Raises:
      ValueError: the file is not UTF-8.
    """
    try:  # not splitlines, which also cuts at characters that a path may have
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def _check_both(folder: Path, both: Listed, parts: Listed, names: str) -> None:
    """Raises a `ValueError` if two sets of images cannot be copies of each other."""
    where = f"{folder / BOTH} does not list what {names} list"
    if len(both) != len(parts):
        raise ValueError(f"{where}: {len(both)} images, expected {len(parts)}.")
    counts, expected = (Counter(label for _, label in x) for x in (both, parts))
    for label in sorted(counts | expected):
        if counts[label] != expected[label]:
            raise ValueError(
                f"{where}: {counts[label]} images of label {label}, expected "
                f"{expected[label]}."
            )
