"""What people have on disk: lists of files, class folders, archives, CSV files.

| layout | what marks it | who has it |
|---|---|---|
| lists | `train800.txt`, `val200.txt`, `test.txt` | the PEFT papers' VTAB-1k |
| CUB's | `images.txt`, `image_class_labels.txt`, ... | NABirds, CUB |
| Cars' | `devkit/cars_train_annos.mat` | Stanford Cars |
| class folders | `train/CLASS/*.jpg`, `test/...`, maybe `val/...` | ImageFolder trees |
| CSV | a file with the columns `path`, `label`, `split` | anybody |
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from experiments.data.source import Files, Source, split
from experiments.data.task import Task

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
BOTH = "train800val200.txt"
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
VALIDATION = 10  # percent of the training images, where there is no validation split
VALIDATION_SEED = 0

Listed = list[tuple[Path, int]]
Found = tuple[Listed, Listed, Listed, Sequence[str]]  # train, validation, test, names


def load(path: Path, name: str = "", classes: int | None = None) -> Task:
    """The task in a folder or CSV file, whichever of the layouts it has.

    Where there is no validation split, a seeded tenth of the training images is one.

    Args:
      name: how tables call it; the file's name by default.
      classes: that the task must have; None for as many as are found.

    Raises:
      FileNotFoundError: there is nothing, or a file of the layout is missing.
      ValueError: another layout, a malformed line, another number of classes, or a file
        in two splits.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no folder or CSV file at {path}.")
    read = layout(path)
    if read is None:
        raise ValueError(
            f"{path} has no layout that is known: expected train800.txt (lists), "
            "image_class_labels.txt (CUB, NABirds), devkit/ (Stanford Cars) or train/ "
            "(a folder for each class)."
        )
    train, validation, test, names = read(path)
    found = len(names) or 1 + max(label for _, label in [*train, *validation, *test])
    if classes is not None and found != classes:
        raise ValueError(f"{path} has {found} classes, expected {classes}.")
    _check_disjoint(path, train, validation, test)
    sources = [_files(part) for part in (train, validation, test)]
    if not validation:
        held_out = max(1, len(train) * VALIDATION // 100)
        sources[1], sources[0] = split(sources[0], VALIDATION_SEED, held_out)
    return Task(name or path.stem, found, *sources, names=tuple(names))


def layout(path: Path) -> Callable[[Path], Found] | None:
    """What reads the layout that a folder or file has; None where it has none."""
    marks = {
        BOTH: from_lists,
        "train800.txt": from_lists,
        "train.txt": from_lists,
        "image_class_labels.txt": from_cub,
        "devkit": from_cars,
        "train": from_class_folders,
    }
    if path.is_file():
        return from_csv
    return next((read for mark, read in marks.items() if (path / mark).exists()), None)


def from_lists(folder: Path) -> Found:
    """Text files with a line `images/0.jpg 3` for each image.

    With `train800val200.txt` alone, its last 200 lines are the validation split.
    """
    named = (folder / "train.txt").exists()
    parts = ("train", "val", "test") if named else ("train800", "val200", "test")
    parts = [f"{part}.txt" for part in parts]
    both = _lines(folder / BOTH, folder) if (folder / BOTH).exists() else []
    if both and not (folder / parts[0]).exists():
        return both[:-200], both[-200:], _lines(folder / parts[2], folder), ()
    lists: list[Listed] = []
    for part in parts:
        path = folder / part
        if not path.exists() and part != "val.txt":
            raise FileNotFoundError(f"{path} is missing: expected {', '.join(parts)}.")
        lists.append(_lines(path, folder) if path.exists() else [])
    if both and sorted(both) != sorted(lists[0] + lists[1]):
        raise ValueError(f"{folder / BOTH} does not list what {parts[:2]} list.")
    return lists[0], lists[1], lists[2], ()


def from_cub(folder: Path) -> Found:
    """The archives of CUB-200-2011 and NABirds: tables of `image-id value`."""
    files, labels, training = (
        _table(folder / name)
        for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    if not files.keys() == labels.keys() == training.keys():
        raise ValueError(f"{folder}: the three tables do not list the same images.")
    ids = sorted(set(labels.values()), key=int)  # NABirds' ids have gaps
    number = {identity: i for i, identity in enumerate(ids)}
    parts: dict[str, Listed] = {"1": [], "0": []}
    for image, file in files.items():
        path = folder / "images" / file
        if training[image] not in parts:
            table = folder / "train_test_split.txt"
            raise ValueError(f"{table}: {training[image]!r}, expected 0 or 1.")
        parts[training[image]].append((path, number[labels[image]]))
    names = _table(folder / "classes.txt") if (folder / "classes.txt").exists() else {}
    return (
        parts["1"],
        [],
        parts["0"],
        [names.get(identity, identity) for identity in ids],
    )


def from_cars(folder: Path) -> Found:
    """Stanford Cars: `cars_train/`, `cars_test/` and MATLAB tables in `devkit/`."""
    parts: list[Listed] = []
    for part, table in (
        ("cars_train", "cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels.mat"),
    ):
        path = folder / "devkit" / table
        if not path.exists():  # the test labels come as a file of their own
            path = folder / table
        if not path.exists():
            raise FileNotFoundError(f"{table} is missing in {folder} and its devkit/.")
        rows = loadmat(path, squeeze_me=True)["annotations"]
        parts.append([
            (folder / part / str(row["fname"]), int(row["class"]) - 1) for row in rows
        ])  # fmt: skip
    meta = folder / "devkit" / "cars_meta.mat"
    names = loadmat(meta, squeeze_me=True)["class_names"] if meta.exists() else ()
    return parts[0], [], parts[1], [str(name) for name in names]


def from_class_folders(folder: Path) -> Found:
    """`train/CLASS/*.jpg` and so on; the classes are the folders of `train`, sorted."""
    names = _classes(folder / "train")
    parts: dict[str, Listed] = {}
    for part, synonyms in SPLITS.items():
        there = [folder / name for name in synonyms if (folder / name).is_dir()]
        if not there and part != "val":
            raise FileNotFoundError(f"{folder / part} is missing.")
        if len(there) != 1:
            if there:
                raise ValueError(
                    f"{folder} has both {there[0].name} and {there[1].name}."
                )
            parts[part] = []
            continue
        root, found = there[0], set(_classes(there[0]))
        if extra := sorted(found - set(names)):
            raise ValueError(f"{root} has classes that train/ has not: {extra[:5]}.")
        parts[part] = [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        ]
        if not parts[part]:
            raise ValueError(f"{root} has no images ({', '.join(SUFFIXES)}).")
    return parts["train"], parts["val"], parts["test"], names


def from_csv(path: Path) -> Found:
    """A table with the columns `path`, `label` and `split` (train, val or test).

    Paths are relative to the file; labels are names or numbers from 0.
    """
    rows = _rows(path)
    numbers = {
        number for _, _, label, _ in rows if (number := _number(label)) is not None
    }
    names = [] if numbers else sorted({label for _, _, label, _ in rows})
    parts: dict[str, Listed] = {"train": [], "val": [], "test": []}
    for line, file, label, part in rows:
        if part not in parts:
            raise ValueError(
                f"{path}, line {line}: split {part!r}, expected {list(parts)}."
            )
        if numbers and not (label.isdecimal() and int(label) < 2**31):
            raise ValueError(
                f"{path}, line {line}: label {label!r} among numbers, expected a "
                "number from 0."
            )
        number = int(label) if numbers else names.index(label)
        parts[part].append((path.parent / file, number))
    if not parts["train"] or not parts["test"]:
        raise ValueError(f"{path}: expected rows of the splits train and test.")
    return parts["train"], parts["val"], parts["test"], names


def _rows(path: Path) -> list[tuple[int, str, str, str]]:
    """Line, path, label and split of every row of a CSV file."""
    columns = ("path", "label", "split")
    found = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not set(columns) <= set(reader.fieldnames or ()):
                raise ValueError(
                    f"{path}: expected a header with {', '.join(columns)}."
                )
            for row in reader:
                cells = [(row[column] or "").strip() for column in columns]
                if not all(cells):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {cells}, expected "
                        f"{', '.join(columns)}."
                    )
                found.append((reader.line_num, *cells))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from error
    return found


def _number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


def _check_disjoint(path: Path, *splits: Listed) -> None:
    seen: dict[Path, int] = {}
    for index, listed in enumerate(splits):
        for file, _ in listed:
            if seen.setdefault(file, index) != index:
                raise ValueError(f"{path}: {file} is in two splits.")


def _classes(root: Path) -> list[str]:
    return sorted(
        path.name
        for path in root.iterdir()
        if path.is_dir() and not path.name.startswith(".")
    )


def _read(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def _lines(path: Path, folder: Path) -> Listed:
    listed: Listed = []
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    for number, line in enumerate(_read(path), start=1):
        if not line.strip():
            continue
        file, _, label = line.strip().rpartition(" ")
        if not file or not label.isdecimal() or int(label) >= 2**31:
            raise ValueError(
                f"{path}, line {number}: {line!r}, expected a path and a label from 0."
            )
        listed.append((folder / file, int(label)))
    if not listed:
        raise ValueError(f"{path} is empty.")
    return listed


def _table(path: Path) -> dict[str, str]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    rows = (line.split(maxsplit=1) for line in _read(path))
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


def _files(listed: Listed) -> Source:
    paths, labels = [path for path, _ in listed], [label for _, label in listed]
    return Files(paths, np.asarray(labels, np.int32))
