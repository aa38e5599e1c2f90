"""Tasks from files on disk: lists of files, class folders, archives, CSV files.

| layout | recognised by | used by |
|---|---|---|
| lists | `train800.txt`, `val200.txt`, `test.txt` | the PEFT papers' VTAB-1k |
| CUB's | `images.txt`, `image_class_labels.txt`, ... | NABirds, CUB |
| Cars' | `devkit/cars_train_annos.mat` | Stanford Cars |
| class folders | `train/CLASS/*.jpg`, `test/...`, maybe `val/...` | ImageFolder trees |
| CSV | a file with the columns `path`, `label`, `split` | your own images |
"""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.data import class_folders, lists
from experiments.data.listed import Found, Listed, checked, real
from experiments.data.source import Files, Rows
from experiments.data.task import Task
from experiments.paths import stem, written

VALIDATION = 10  # percent of the training images, where there is no validation split
VALIDATION_SEED = 0


def load(path: Path, name: str = "", classes: int | None = None) -> Task:
    """Loads the task in a folder or CSV file of any of the layouts.

    If there is no validation split, a seeded tenth of the training images becomes one.

    Args:
      name: name of the task in tables; the file's name by default.
      classes: number of classes that the task must have; None for any.

    Raises:
      FileNotFoundError: the path or a file of the layout is missing.
      ValueError: the layout is unknown, a line is malformed, the number of classes is
        another, or a file is in two splits.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no folder or CSV file at {path}.")
    read = layout(path)
    if read is None:
        raise ValueError(
            f"{path} has no layout that is known: expected train800.txt (lists), "
            "image_class_labels.txt (CUB, NABirds), devkit/ (Stanford Cars), or a "
            "folder for each class in train/ and in test/."
        )
    found = read(path)
    if classes is not None and found.classes != classes:
        raise ValueError(f"{path} has {found.classes} classes, expected {classes}.")
    found = checked(path, found)
    train, validation, test = map(_files, (found.train, found.validation, found.test))
    if not found.validation:
        train, validation = _held_out(path, train)
    return Task(
        name or stem(path),
        found.classes,
        train,
        validation,
        test,
        names=tuple(found.names),
        notes=found.notes,
    )


def layout(path: Path) -> Callable[[Path], Found] | None:
    """Returns the reader of a folder's or file's layout; None if it is unknown."""
    marks = {
        lists.BOTH: lists.read,
        "train800.txt": lists.read,
        "train.txt": lists.read,
        "image_class_labels.txt": from_cub,
        "devkit": from_cars,
        "train": class_folders.read,
    }
    if path.is_file():
        return from_csv
    return next((read for mark, read in marks.items() if (path / mark).exists()), None)


def from_cub(folder: Path) -> Found:
    """Reads the archives of CUB-200-2011 and NABirds: tables of `image-id value`."""
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
        path = folder / "images" / written(file)
        if training[image] not in parts:
            table = folder / "train_test_split.txt"
            raise ValueError(f"{table}: {training[image]!r}, expected 0 or 1.")
        parts[training[image]].append((path, number[labels[image]]))
    names = _table(folder / "classes.txt") if (folder / "classes.txt").exists() else {}
    found = [names.get(identity, identity) for identity in ids]
    return Found(parts["1"], [], parts["0"], found)


def from_cars(folder: Path) -> Found:
    """Reads Stanford Cars: `cars_train/`, `cars_test/`, MATLAB tables in `devkit/`."""
    from scipy.io import loadmat  # slow to import

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
    return Found(parts[0], [], parts[1], [str(name) for name in names])


def from_csv(path: Path) -> Found:
    """Reads a table with the columns `path`, `label` and `split` (train, val, test).

    Paths are relative to the file; labels are names, or numbers from 0. Digits that
    begin with 0 (`01`) are names.
    """
    rows = _rows(path)
    number = _numbering(path, [(line, label) for line, _, label, _ in rows])
    parts: dict[str, Listed] = {"train": [], "val": [], "test": []}
    for line, file, label, part in rows:
        if part not in parts:
            raise ValueError(
                f"{path}, line {line}: split {part!r}, expected {list(parts)}."
            )
        parts[part].append(
            (path.parent / written(file), number[label] if number else int(label))
        )
    if not parts["train"] or not parts["test"]:
        raise ValueError(f"{path}: expected rows of the splits train and test.")
    return Found(parts["train"], parts["val"], parts["test"], list(number))


NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def _numbering(path: Path, labels: list[tuple[int, str]]) -> dict[str, int]:
    """Numbers the labels' names in sorted order; empty if labels are numbers already.

    Args:
      labels: line number and label of each row.
    """
    names = sorted({label for _, label in labels})
    if not any(map(NUMBER.fullmatch, names)):
        return {name: number for number, name in enumerate(names)}
    for line, label in labels:
        if not (label.isdecimal() and int(label) < 2**31):
            raise ValueError(
                f"{path}, line {line}: label {label!r} among numbers, expected a "
                "number from 0."
            )
    if all(str(int(name)) == name for name in names):
        return {}
    spelt = {int(name): name for name in names}
    if doubled := sorted(set(names) - set(spelt.values())):
        other = spelt[int(doubled[0])]
        raise ValueError(
            f"{path}: {doubled[0]!r} and {other!r} are one number: expected one "
            "spelling of a label."
        )
    return {name: number for number, name in enumerate(names)}


def _rows(path: Path) -> list[tuple[int, str, str, str]]:
    """Returns line, path, label and split of every row of a CSV file."""
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


def _held_out(where: Path, source: Files) -> tuple[Rows, Rows]:
    """Splits off a seeded tenth of the files: what is left to train on, and that tenth.

    Rows of one file, such as those of a class that is repeated, stay together.

    Raises:
      ValueError: there are fewer than two files.
    """
    rows: dict[str, list[int]] = {}
    for row, file in enumerate(real(source.paths)):
        rows.setdefault(file, []).append(row)
    if len(rows) < 2:
        raise ValueError(
            f"{where} has {len(rows)} image to train on and no validation split: "
            "expected two, one of which is held out."
        )
    order = np.random.default_rng(VALIDATION_SEED).permutation(len(rows))
    cut, files = max(1, len(rows) * VALIDATION // 100), list(rows.values())
    validation, train = (
        Rows(source, np.concatenate([files[file] for file in part]))
        for part in np.split(order, [cut])
    )
    return train, validation


def _table(path: Path) -> dict[str, str]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    rows = (line.split(maxsplit=1) for line in lists.text(path))
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


def _files(listed: Listed) -> Files:
    paths, labels = [path for path, _ in listed], [label for _, label in listed]
    return Files(paths, np.asarray(labels, np.int32))
