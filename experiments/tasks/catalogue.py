"""Every task by name: VTAB-1k, FGVC, the sets that need no network, and your own.

A task is named by its entry in the catalogue, or by the path of a folder or CSV file
(`experiments.data.folders`). A VTAB or FGVC task is read from a folder of that name in
the data directory if there is one, else from TFDS; the others are read from their
packages, whatever folders there are.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from experiments.data import folders, lists
from experiments.data.task import Task
from experiments.names import unknown
from experiments.paths import at_home
from experiments.tasks import (
    digits,
    dsprites,
    elpv,
    fashion_mnist,
    fgvc,
    tuxpaint,
    vtab,
)

DATA_DIR = Path("~/tensorflow_datasets")
TASK_LIST = "python -m experiments.tasks.show --list"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A task in the catalogue.

    Attributes:
      group: natural, specialized, structured, FGVC, or local for sets that need no
        network.
      get: where the data come from.
      load: loads the task, given the data directory.
    """

    group: str
    classes: int
    licence: str
    get: str
    load: Callable[[Path], Task]


LOCAL = {
    "digits": Entry(
        "local", 10, "CC-BY-4.0", "in scikit-learn", lambda _: digits.load()
    ),
    "fashion_mnist": Entry(
        "local",
        10,
        "MIT",
        "apt-get install dataset-fashion-mnist",
        lambda _: fashion_mnist.load(),
    ),
    "elpv": Entry(
        "local",
        4,
        "CC-BY-NC-SA-4.0",
        'pip install -e ".[demo]"',
        lambda _: elpv.load("defect"),
    ),
    "elpv_mono": Entry(
        "local",
        2,
        "CC-BY-NC-SA-4.0",
        'pip install -e ".[demo]"',
        lambda _: elpv.load("mono"),
    ),
    "tuxpaint": Entry(
        "local",
        10,
        "GPL-2",
        "apt-get install tuxpaint-stamps-default",
        lambda _: tuxpaint.load(),
    ),
    **{
        f"{name}_rerendered": Entry(
            "local",
            16,
            "Apache-2.0, as this project",
            "rendered when read",
            lambda _, name=name: dsprites.load(name),
        )
        for name in ("dsprites_loc", "dsprites_ori")
    },
}


def _entries() -> dict[str, Entry]:
    entries = dict(LOCAL)
    for name, row in vtab.TASKS.items():
        entries[name] = Entry(
            row.group,
            row.classes,
            row.licence,
            f"TFDS {row.builder.name}" + ", by hand" * bool(row.builder.manual),
            lambda data_dir, name=name: vtab.load(name, data_dir),
        )
    for name, row in fgvc.TASKS.items():
        entries[name] = Entry(
            "FGVC",
            row.classes,
            row.licence,
            f"TFDS {row.builder.name}" if row.builder else "archive, by hand",
            lambda data_dir, name=name: fgvc.load(name, data_dir),
        )
    return entries


ENTRIES = _entries()


def load(name: str, data_dir: Path = DATA_DIR) -> Task:
    """Loads the task of that name, or in that folder or CSV file.

    If there are several of one name, the notes of the task say which one was taken.

    Raises:
      ValueError: there is no task and no file of that name, or its data are wrong.
      FileNotFoundError, ModuleNotFoundError: the data are missing; says how to get
        them.
    """
    data_dir, path = at_home(data_dir), at_home(name)
    if name not in ENTRIES:
        if path.exists():
            return folders.load(path)
        raise ValueError(unknown("task, folder or CSV file", name, ENTRIES, TASK_LIST))
    entry, folder = ENTRIES[name], _folder(name, data_dir)
    notes, others = [], [path] if path.exists() else []
    if folder is None:
        task = entry.load(data_dir)
    elif entry.group == "local":
        task = entry.load(data_dir)
        others.append(folder)
    else:
        task = _in_folder(name, folder, entry.classes)
        others = [other for other in others if not other.samefile(folder)]
        notes.append(f"{name}: read from the folder {folder}, not from TFDS")
    notes += [
        f"{name}: the task of that name is taken, not {other.absolute()}; "
        f"--task {'./' * (other is path)}{other} takes that"
        for other in others
    ]
    return dataclasses.replace(task, notes=(*notes, *task.notes))


def _folder(name: str, data_dir: Path) -> Path | None:
    """Returns the folder of a task's name in the data directory, if it has images.

    TFDS keeps its versions in a folder of that name; that one has no layout.
    """
    if folders.layout(data_dir / name):
        return data_dir / name
    shared = data_dir / vtab.SHARED.get(name, name)
    marks = (lists.BOTH, lists.NAMED[0])
    return shared if any((shared / mark).exists() for mark in marks) else None


def _in_folder(name: str, folder: Path, classes: int) -> Task:
    task = folders.load(folder, name, classes)
    sizes = (len(task.train), len(task.validation))
    if name in vtab.TASKS and sizes != (800, 200):
        raise ValueError(
            f"{folder} has {sizes[0]} images to train and {sizes[1]} to validate; "
            f"VTAB-1k's {name} has 800 and 200. If it is another task, give the "
            "folder itself as the task."
        )
    return task


def listing() -> Table:
    """Returns a table of all tasks, to print."""
    table = Table(title="tasks")
    for column in ("task", "group", "classes", "licence", "from"):
        table.add_column(column, no_wrap=column in ("task", "group"), overflow="fold")
    for name, entry in ENTRIES.items():
        row = (name, entry.group, str(entry.classes), entry.licence, entry.get)
        table.add_row(*row)
    return table
