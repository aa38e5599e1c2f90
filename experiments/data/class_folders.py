"""Trees with a folder for each class (torchvision's ImageFolder).

Hidden files and folders are left out, and so is what systems and archives leave behind.
Links to folders are followed. The files that are left out are counted.
"""

import os
from collections import Counter
from pathlib import Path

from experiments.data.listed import Found, Listed

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"),
    *(".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
)
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
HIDDEN, BESIDE = "hidden or the system's", "beside the class folders"
LINKED, BROKEN = "linked folders that were read already or lead back", "broken links"
UNREAD = "folders that cannot be read"
SHOWN = 8  # kinds
# Of Synology and QNAP, of archives from macOS, of Windows, of file systems.
SYSTEM = {
    *("@eadir", "#recycle", "__macosx", "$recycle.bin", "system volume information"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found"),
}


def read(folder: Path) -> Found:
    """Reads `train/CLASS/*.jpg` and so on; classes are the folders of `train`, sorted.

    Raises:
      FileNotFoundError: the folder of the training or the test split is missing.
      ValueError: a split has no images, classes that `train` lacks, or two folders.
    """
    parts: dict[str, Listed] = {}
    notes: list[str] = []
    names = _classes(folder / "train")
    for part in SPLITS:
        root = _root(folder, part)
        parts[part] = []
        if root is None:
            continue
        if extra := sorted(set(_classes(root)) - set(names)):
            raise ValueError(f"{root} has classes that train/ has not: {extra[:5]}.")
        left_out = _beside(root)
        for label, name in enumerate(names):
            if (root / name).is_dir():
                images = _images(root / name, left_out)
                parts[part] += [(path, label) for path in images]
        said = kinds(left_out)
        notes += [f"{root}: left out {said}"] * bool(said)
        if not parts[part]:
            raise ValueError(
                f"{root} has no images ({', '.join(SUFFIXES)}) in folders of classes"
                + f"; left out {said}." * bool(said)
            )
    return Found(parts["train"], parts["val"], parts["test"], names, tuple(notes))


def kinds(left_out: Counter[str]) -> str:
    """Returns the counts of what was left out, largest first, as text."""
    shown = (+left_out).most_common(SHOWN)
    named = [f"{count} {kind}" for kind, count in shown]
    rest = left_out.total() - sum(count for _, count in shown)
    return ", ".join([*named, *[f"{rest} others"] * bool(rest)])


def _root(folder: Path, part: str) -> Path | None:
    """Returns the folder of a split; None if there is no validation split."""
    there = [folder / name for name in SPLITS[part] if (folder / name).is_dir()]
    if len(there) > 1:
        raise ValueError(f"{folder} has both {there[0].name} and {there[1].name}.")
    if not there and part != "val":
        raise FileNotFoundError(f"{folder / part} is missing.")
    return there[0] if there else None


def _classes(root: Path) -> list[str]:
    return sorted(
        path.name for path in root.iterdir() if path.is_dir() and not _hidden(path.name)
    )


def _beside(root: Path) -> Counter[str]:
    """Counts, by kind, what lies in the folder of a split beside the classes."""
    others = [p.name for p in root.iterdir() if _hidden(p.name) or not p.is_dir()]
    return Counter(HIDDEN if _hidden(name) else BESIDE for name in others)


def _images(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Returns the image files in and below the folder of a class, sorted.

    Each folder is read once, and none that contains the class, wherever links lead.

    Args:
      left_out: counter that is increased for each file that is left out, by kind.
    """
    found = []
    seen = set(map(str, Path(os.path.realpath(folder)).parents))

    def unread(_: OSError) -> None:
        left_out[UNREAD] += 1

    for place, folders, files in os.walk(folder, onerror=unread, followlinks=True):
        where = os.path.realpath(place)
        if where in seen:
            left_out[LINKED] += 1
            folders.clear()
            continue
        seen.add(where)
        left_out[HIDDEN] += sum(map(_hidden, folders))
        folders[:] = sorted(name for name in folders if not _hidden(name))
        folders.sort(key=lambda name: os.path.islink(os.path.join(place, name)))
        for path in (Path(place, name) for name in files):
            if kind := no_image(path):
                left_out[kind] += 1
            else:
                found.append(path)
    return sorted(found)


def no_image(path: Path) -> str:
    """Returns why a file is left out; "" for an image, even as a broken link."""
    if _hidden(path.name):
        return HIDDEN
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        whole = path.is_file() or not path.exists()  # that it is missing is said later
        return "" if whole else "no regular files"
    if not path.exists():
        return BROKEN
    return suffix or "without a suffix"


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM
