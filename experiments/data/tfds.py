"""TFDS data sets, read without TensorFlow (`tfds.data_source`).

Preparing one downloads it and needs TensorFlow; see `experiments/prepare.py`. It must
be prepared as ArrayRecord files, the format that can be read by index.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.data.source import Example, Rows, Source

LabelOf = Callable[[dict[str, Any]], int]
ImageOf = Callable[[dict[str, Any]], np.ndarray]
FORMAT = "array_record"


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of examples of a TFDS split, in the order of its files.

    It begins after `after` percent of the split, each rounded down by itself, and has
    `count` examples (None: all that are left).
    """

    split: str
    after: tuple[int, ...] = ()
    count: int | None = None

    def rows(self, size: int) -> range:
        """The indices, of a split with `size` examples.

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


def stored(features: dict[str, Any]) -> np.ndarray:
    """The image as it is, 0 to 255 with one or three channels."""
    return features["image"]


@dataclasses.dataclass(frozen=True)
class Builder:
    """A TFDS builder that is read as image and label.

    Attributes:
      name: as TFDS knows it, with its config (`eurosat/rgb`).
      versions: with which the rows of our tables were checked, the oldest first; a
        prepared one of them is taken, the newest first.
      label: the label, from an example's features.
      manual: what has to be downloaded by hand, if anything.
      image: the image of 0 to 255, from an example's features.
    """

    name: str
    versions: tuple[str, ...]
    label: LabelOf
    manual: str = ""
    image: ImageOf = stored

    def open(
        self, data_dir: Path, splits: Sequence[str], task: str
    ) -> dict[str, Source]:
        """Its splits as sources, for a task.

        Raises:
          FileNotFoundError: it is not prepared in `data_dir`; says how to do it.
        """
        for version in reversed(self.versions):
            folder = data_dir / self.name / version
            if folder.is_dir():
                break
        else:
            raise FileNotFoundError(self._missing(data_dir, task))
        builder: Any = tfds.builder_from_directory(folder)
        kind = builder.info.file_format
        if kind is None or kind.value != FORMAT:
            found = "an unknown format" if kind is None else kind.value
            raise FileNotFoundError(
                f"{folder} is in {found}, which cannot be read by index. "
                f"{self._missing(data_dir, task)}"
            )
        return {
            split: TfdsSplit(builder.as_data_source(split=split), self)
            for split in splits
        }

    def _missing(self, data_dir: Path, task: str) -> str:
        by_hand = f" By hand first: {self.manual}." if self.manual else ""
        return (
            f"TFDS's {self.name} ({' or '.join(self.versions)}) is not in {data_dir} "
            f"as {FORMAT} files.{by_hand} To prepare it (only this needs TensorFlow): "
            f'pip install -e ".[prepare]" && python -m experiments.prepare --task '
            f"{task} --data_dir {data_dir}"
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
        image, label = self.builder.image(features), self.builder.label(features)
        return {"image": image, "label": label}


def part(sources: dict[str, Source], part: Part) -> Rows:
    """The examples of a part."""
    source = sources[part.split]
    return Rows(source, np.asarray(part.rows(len(source))))
