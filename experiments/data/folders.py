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

from experiments.data.source import Files, Rows, split
from experiments.data.task import Task

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
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
      ValueError: another layout, a malformed line, a label out of range, or another
        number of classes.
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
    sources = [_files(part) for part in (train, validation, test)]
    if not validation:
        held_out = max(1, len(train) * VALIDATION // 100)
        sources[1], sources[0] = split(sources[0], VALIDATION_SEED, held_out)
    return Task(name or path.stem, found, *sources, names=tuple(names))


def layout(path: Path) -> Callable[[Path], Found] | None:
    """What reads the layout that a folder or file has; None where it has none."""
    marks = {
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
    """Text files with a line `images/0.jpg 3` for each image."""
    if (folder / "train800.txt").exists():
        parts = ("train800.txt", "val200.txt", "test.txt")
    else:
        parts = ("train.txt", "val.txt", "test.txt")
    lists: list[Listed] = []
    for part in parts:
        path = folder / part
        if not path.exists() and part != "val.txt":
            raise FileNotFoundError(f"{path} is missing: expected {', '.join(parts)}.")
        lists.append(_lines(path, folder) if path.exists() else [])
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
    names = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    parts: dict[str, Listed] = {}
    for part in ("train", "val", "test"):
        root = folder / part
        if not root.is_dir():
            if part != "val":
                raise FileNotFoundError(f"{root} is missing.")
            parts[part] = []
            continue
        found = {path.name for path in root.iterdir() if path.is_dir()}
        if extra := sorted(found - set(names)):
            raise ValueError(f"{root} has classes that train/ has not: {extra[:5]}.")
        parts[part] = [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not parts[part]:
            raise ValueError(f"{root} has no images ({', '.join(SUFFIXES)}).")
    return parts["train"], parts["val"], parts["test"], names


def from_csv(path: Path) -> Found:
    """A table with the columns `path`, `label` and `split` (train, val or test).

    Paths are relative to the file; labels are names or numbers from 0.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = {"path", "label", "split"}
    if not rows or not wanted <= rows[0].keys():
        raise ValueError(f"{path}: expected rows with the columns {sorted(wanted)}.")
    labels = {row["label"] for row in rows}
    numbers = all(label.isdecimal() for label in labels)
    names = [] if numbers else sorted(labels)
    parts: dict[str, Listed] = {"train": [], "val": [], "test": []}
    for line, row in enumerate(rows, start=2):
        if row["split"] not in parts:
            raise ValueError(
                f"{path}, line {line}: split {row['split']!r}, expected {list(parts)}."
            )
        label = int(row["label"]) if numbers else names.index(row["label"])
        parts[row["split"]].append((path.parent / row["path"], label))
    if not parts["train"] or not parts["test"]:
        raise ValueError(f"{path}: expected rows of the splits train and test.")
    return parts["train"], parts["val"], parts["test"], names


def _lines(path: Path, folder: Path) -> Listed:
    listed: Listed = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        file, _, label = line.strip().rpartition(" ")
        if not file or not label.isdecimal():
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
    rows = (line.split(maxsplit=1) for line in path.read_text().splitlines())
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


def _files(listed: Listed) -> Files | Rows:
    paths, labels = [path for path, _ in listed], [label for _, label in listed]
    return Files(paths, np.asarray(labels, np.int32))
