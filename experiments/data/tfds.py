"""TFDS data sets, read without TensorFlow (`tfds.data_source`).

Preparing one downloads it and needs TensorFlow; see `experiments/tasks/prepare.py`. It
must be prepared as ArrayRecord files, the format that can be read by index.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.source import Example, Source, decoding, pixels_of, take
from experiments.paths import at_home, printable

LabelOf = Callable[[dict[str, Any]], int]
FORMAT, INFO = "array_record", "dataset_info.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """A contiguous part of a TFDS split, in the order of its files.

    It begins after `after` percent of the split, each percentage rounded down by
    itself, and has `count` examples (None: all that are left).
    """

    split: str
    after: tuple[int, ...] = ()
    count: int | None = None

    def rows(self, size: int) -> range:
        """Returns the indices in a split of `size` examples.

        Raises:
          ValueError: the split is too small.
        """
        begin = sum(percent * size // 100 for percent in self.after)
        end = size if self.count is None else begin + self.count
        if not begin < end <= size:
            raise ValueError(
                f"split {self.split!r} has {size} examples, too few for {self}."
            )
        return range(begin, end)


@dataclasses.dataclass(frozen=True)
class Builder:
    """A TFDS builder that is read as image and label.

    Attributes:
      name: name in TFDS, with its config (`eurosat/rgb`).
      versions: versions that the rows of our tables were checked with, oldest first;
        the newest one that is prepared is read.
      label: returns the label from an example's features.
      manual: what has to be downloaded by hand; "" for nothing.
      binary: True if pixels are 0 and 1 instead of 0 and 255.
    """

    name: str
    versions: tuple[str, ...]
    label: LabelOf
    manual: str = ""
    binary: bool = False

    def open(
        self, data_dir: Path, splits: Sequence[str], task: str
    ) -> dict[str, Source]:
        """Returns splits as sources, for a task.

        Raises:
          FileNotFoundError: the set is not prepared in `data_dir`; says how to prepare
            it.
          ValueError: the path is not UTF-8.
        """
        import tensorflow_datasets as tfds  # slow to import

        data_dir = at_home(data_dir)
        if printable(str(data_dir)) != str(data_dir):
            raise ValueError(
                f"TFDS reads nothing below {printable(str(data_dir))!r}: expected a "
                "--data_dir in UTF-8."
            )
        folders = [data_dir / self.name / version for version in self.versions]
        there = [folder for folder in folders if (folder / INFO).is_file()]
        if not there:
            raise FileNotFoundError(self._missing(data_dir, task))
        builders: list[Any] = [tfds.builder_from_directory(f) for f in reversed(there)]
        kinds = [builder.info.file_format for builder in builders]
        values = [None if kind is None else kind.value for kind in kinds]
        if FORMAT not in values:
            raise FileNotFoundError(
                f"{there[-1]} is in {values[0]}, which cannot be read by index: delete "
                f"it, or name another --data_dir. {self._missing(data_dir, task)}"
            )
        builder = builders[values.index(FORMAT)]
        return {split: TfdsSplit(_undecoded(builder, split), self) for split in splits}

    def _missing(self, data_dir: Path, task: str) -> str:
        by_hand = f" By hand first: {self.manual}." if self.manual else ""
        return (
            f"TFDS's {self.name} ({' or '.join(self.versions)}) is not in {data_dir} "
            f"as {FORMAT} files.{by_hand} To prepare it (only this needs TensorFlow): "
            f'pip install -e ".[prepare]" && python -m experiments.tasks.prepare '
            f"--task {task} --data_dir {data_dir}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSplit:
    """A TFDS data source as images and labels."""

    features: Any
    builder: Builder

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> Example:
        features = self.features[index]
        image = features["image"]
        if isinstance(image, bytes):
            with decoding(image, self.builder.name, index) as picture:
                image = pixels_of(picture)
        if self.builder.binary:
            image = 255 * image
        return {"image": image, "label": self.builder.label(features)}


def _undecoded(builder: Any, split: str) -> Any:
    """Returns a data source whose images are bytes: we decode them ourselves."""
    import tensorflow_datasets as tfds

    images = [
        name
        for name, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    ]
    decoders = dict.fromkeys(images, tfds.decode.SkipDecoding())
    return builder.as_data_source(split=split, decoders=decoders)


def part(sources: dict[str, Source], part: Part) -> Source:
    """Returns the examples of a part."""
    source = sources[part.split]
    return take(source, np.asarray(part.rows(len(source))))
