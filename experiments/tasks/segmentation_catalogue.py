"""Every segmentation task by name, and folders of images with masks."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from experiments.data import segmentation_task
from experiments.data.check import SPLITS
from experiments.data.segmentation_task import VALIDATION, SegmentationTask
from experiments.names import unknown
from experiments.paths import at_home
from experiments.tasks import polyps, tuxpaint_masks
from experiments.tasks.catalogue import DATA_DIR, TASK_LIST


@dataclasses.dataclass(frozen=True)
class Entry:
    """A task in the catalogue.

    Attributes:
      images: numbers of images to train on and to test on, as its authors state them.
      licence: terms of use.
      get: where the data come from.
      load: loads the task, given the data directory and the share of the training
        images that is held out.
    """

    images: str
    licence: str
    get: str
    load: Callable[[Path, float], SegmentationTask]


ENTRIES = {
    "kvasir": Entry("880 / 120", polyps.TERMS, polyps.KVASIR_SITE, polyps.kvasir),
    "kvasir_released": Entry(
        "1000 / 196 of them",
        polyps.TERMS,
        polyps.KVASIR_SITE,
        polyps.kvasir_released,
    ),
    "cvc_clinicdb": Entry(
        "0 / 612",
        polyps.TERMS,
        polyps.CVC_SITE,
        lambda data_dir, _: polyps.cvc_clinicdb(data_dir),
    ),
    "pranet": Entry("1450 / 162", polyps.TERMS, polyps.PRANET_SITE, polyps.pranet),
    "tuxpaint_masks": Entry(
        "588 + 46 / 102",
        "GPL-2 and CC-BY-NC-SA-4.0",
        'apt-get install tuxpaint-stamps-default and pip install -e ".[demo]"',
        lambda *_: tuxpaint_masks.load(),
    ),
}


def load(
    name: str,
    data_dir: Path = DATA_DIR,
    validation: float = VALIDATION,
    also: Sequence[str] = (),
) -> SegmentationTask:
    """Loads the task of that name, or in that folder.

    Args:
      data_dir: has a folder for each of the sets that no package holds.
      validation: share of the training images that is held out, where the task has no
        validation split of its own.
      also: more tasks or folders, whose tests become extra tests; of a folder without
        lists and splits, all pairs.

    Raises:
      ValueError: there is no task and no folder of that name, or its data are wrong.
      FileNotFoundError, ModuleNotFoundError: the data are missing; says how to get
        them.
    """
    data_dir = at_home(data_dir)
    task = _loaded(name, data_dir, validation, segmentation_task.load)
    extra, notes, titles = dict(task.extra_tests), list(task.notes), {}
    for other in also:
        own = _loaded(other, data_dir, validation, segmentation_task.as_test)
        key = other if other in ENTRIES else own.name
        if key in extra or key in SPLITS:
            raise ValueError(f"also={tuple(also)}: there are two tests called {key}.")
        extra[key], titles[key] = own.test, own.name
        notes += own.notes
    titles = {
        key: title
        for key, title in titles.items()
        if [task.name, *extra, *titles.values()].count(title) == 1
    }
    changes = {"notes": tuple(notes), "extra_tests": extra, "titles": titles}
    return dataclasses.replace(task, **changes)


def knows(name: str) -> bool:
    """Returns True if there is such a task, or images with masks in such a folder."""
    return name in ENTRIES or segmentation_task.is_folder(at_home(name))


def _loaded(
    name: str,
    data_dir: Path,
    validation: float,
    read: Callable[[Path, float], SegmentationTask],
) -> SegmentationTask:
    path = at_home(name)
    if name in ENTRIES:
        task = ENTRIES[name].load(data_dir, validation)
        if not path.exists():
            return task
        note = (
            f"{name}: the task of that name is taken, not the folder {path.absolute()}"
        )
        return dataclasses.replace(task, notes=(note, *task.notes))
    if not path.exists():
        raise ValueError(unknown("task or folder with masks", name, ENTRIES, TASK_LIST))
    return read(path, validation)


def listing() -> Table:
    """Returns a table of all segmentation tasks, to print."""
    table = Table(title="tasks with masks")
    for column in ("task", "train / test", "licence", "from"):
        table.add_column(column, no_wrap=column == "task", overflow="fold")
    for name, entry in ENTRIES.items():
        table.add_row(name, entry.images, entry.licence, entry.get)
    return table
