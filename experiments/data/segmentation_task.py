"""Segmentation task: splits of images with masks, from folders in several layouts.

| layout | recognised by |
|---|---|
| lists | `train.txt` with `test.txt` or `val.txt`, beside the images and masks |
| folders | `train/` and `test/`, perhaps `val/`, each with images and masks |
| PraNet's | `TrainDataset/`, `TestDataset/NAME/` |
| a single folder | images and masks alone; a fifth of them becomes the test |
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.data import listed, pairs
from experiments.data.pairs import Pairs
from experiments.data.source import Joined, Rows, Source, split

SEED = 0  # of what is held out, which is the same for every seed of a run
TEST = 0.2  # share of a single folder
VALIDATION = 0.1  # share of the training images
PRANET = ("TrainDataset", "TestDataset")
SEEN = ("CVC-ClinicDB", "Kvasir")  # PraNet's tests from the sets that it trains on


@dataclasses.dataclass(frozen=True)
class SegmentationTask:
    """Images with masks in disjoint splits.

    Attributes:
      name: name of the data set in tables.
      train: pairs to train on while something is chosen; empty for a test alone.
      validation: pairs to choose by.
      test: pairs that are used once.
      notes: remarks for the user on how it was read.
      fingerprint: fingerprints of the splits and of the extra tests, by name, once
        every pair was looked at.
      extra_tests: more sources that a trained model is tested on, by name.
      titles: names in tables of extra tests that have one.
    """

    name: str
    train: Source
    validation: Source
    test: Source
    notes: tuple[str, ...] = ()
    fingerprint: dict[str, Any] | None = None
    extra_tests: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    titles: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def full(self) -> Source:
        """Pairs of training and validation."""
        return Joined(self.train, self.validation)


@dataclasses.dataclass(frozen=True)
class _Found:
    """Pairs of the splits, as a layout on disk has them; `validation` may be empty."""

    train: Pairs
    validation: Pairs
    test: Pairs
    notes: tuple[str, ...] = ()
    extra_tests: Mapping[str, Source] = dataclasses.field(default_factory=dict)


def load(
    path: Path, validation: float = VALIDATION, name: str = ""
) -> SegmentationTask:
    """Loads the task in a folder of any of the layouts; opens no image.

    Args:
      validation: share of the training images that is held out, where the layout has
        no validation split. The draw is the same for every seed of a run.
      name: name of the task in tables; the folder's name by default.

    Raises:
      FileNotFoundError: folders or lists are missing.
      ValueError: an image has no mask or the other way round, a pair is in two splits,
        or there are too few to hold some out; names the first ones.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation={validation}: expected a share between 0 and 1.")
    found = _read(path)
    _check_disjoint(path, found)
    train, held_out = found.train, found.validation
    if not len(held_out):
        held_out, train = hold_out(path, train, validation)
    return SegmentationTask(
        name or path.resolve().name,
        train,
        held_out,
        found.test,
        notes=found.notes,
        extra_tests=found.extra_tests,
    )


def test_only(path: Path, name: str = "") -> SegmentationTask:
    """Returns every pair of a folder as a test; errors are those of `load`."""
    folder, none = pairs.read(path), Pairs([])
    name = name or path.resolve().name
    return SegmentationTask(name, none, none, folder.whole(), notes=folder.notes)


def as_test(path: Path, validation: float = VALIDATION) -> SegmentationTask:
    """Returns every pair of a single folder as a test, and any other as `load` does."""
    single = pairs.kinds(path) is not None and not (path / "train.txt").exists()
    return test_only(path) if single else load(path, validation)


def is_folder(path: Path) -> bool:
    """Returns True if a folder has one of the layouts."""
    layouts = path, path / "train", path / PRANET[0]
    return any(pairs.kinds(place) is not None for place in layouts)


def _read(path: Path) -> _Found:
    if (path / PRANET[0]).is_dir():
        return _pranet(path)
    if pairs.kinds(path / "train") is not None:
        return _folders(path)
    if not is_folder(path):
        known = " or ".join(f"{image}/ with {mask}/" for image, mask in pairs.FOLDERS)
        raise FileNotFoundError(
            f"{path} has no images with masks: expected {known}, the same in train/ "
            f"and test/, or {PRANET[0]}/ and {PRANET[1]}/."
        )
    folder = pairs.read(path)
    if (path / "train.txt").exists():
        return _lists(folder)
    whole, note = folder.whole(), f"{path}: a fifth of the pairs, seeded, are the test"
    test, train = hold_out(path, whole, TEST)
    return _Found(train, Pairs([]), test, (*folder.notes, note))


def _lists(folder: pairs.Folder) -> _Found:
    """Reads `train.txt` and its neighbours; `val.txt` alone is the test.

    So it is in Kvasir-SEG, whose two lists have these names.
    """
    path = folder.path
    tests = "test.txt" if (path / "test.txt").exists() else "val.txt"
    train, notes = folder.listed(path / "train.txt")
    test, more = folder.listed(path / tests)
    notes = (*folder.notes, *notes, *more)
    if tests == "val.txt":
        note = f"{path}: val.txt is the test, there is no test.txt"
        return _Found(train, Pairs([]), test, (*notes, note))
    if not (path / "val.txt").exists():
        return _Found(train, Pairs([]), test, notes)
    held_out, more = folder.listed(path / "val.txt")
    return _Found(train, held_out, test, (*notes, *more))


def _folders(path: Path) -> _Found:
    parts = [pairs.read(path / name) for name in ("train", "test")]
    (train, test), notes = (part.whole() for part in parts), parts[0].notes
    notes = (*notes, *parts[1].notes)
    if not (path / "val").is_dir():
        return _Found(train, Pairs([]), test, notes)
    held_out = pairs.read(path / "val")
    return _Found(train, held_out.whole(), test, (*notes, *held_out.notes))


def _pranet(path: Path) -> _Found:
    """Reads PraNet's folders: the test are those of the sets that it trains on."""
    train, places = pairs.read(path / PRANET[0]), path / PRANET[1]
    tests = {
        place.name: pairs.read(place)
        for place in (sorted(places.iterdir()) if places.is_dir() else ())
        if pairs.kinds(place) is not None
    }
    if absent := [name for name in SEEN if name not in tests]:
        raise FileNotFoundError(
            f"{places} has no pairs of {' and '.join(absent)}: expected a folder of "
            "each, with images/ and masks/."
        )
    notes = [note for own in (train, *tests.values()) for note in own.notes]
    sources = {name: own.whole() for name, own in tests.items()}
    seen = Pairs([files for name in SEEN for files in sources[name].files])
    return _Found(train.whole(), Pairs([]), seen, tuple(notes), sources)


def _check_disjoint(path: Path, found: _Found) -> None:
    train, validation, test = (
        [(own.image, 0) for own in source.files]
        for source in (found.train, found.validation, found.test)
    )
    listed.checked(path, listed.Found(train, validation, test))


def hold_out(path: Path, source: Pairs, share: float) -> tuple[Pairs, Pairs]:
    """Returns a seeded share of some pairs, at least one, and the others."""
    count = max(1, int(share * len(source)))
    if count >= len(source):
        raise ValueError(
            f"{path} has {len(source)} pair to train on and nothing held out: expected "
            "two, one of which is held out."
        )
    some, rest = (
        Pairs([source.files[int(row)] for row in part.rows])
        for part in split(source, SEED, count)
        if isinstance(part, Rows)
    )
    return some, rest
