"""A classification task: what is trained on, chosen by and tested on."""

import dataclasses
from typing import Any

from experiments.data.source import Joined, Source


@dataclasses.dataclass(frozen=True)
class Task:
    """Three disjoint sources.

    Attributes:
      name: how tables call the data set.
      classes: labels are 0 to `classes - 1`.
      train: to train on while something is chosen.
      validation: to choose by.
      test: used once.
      names: of the classes, where the set has any.
      notes: what the user should be told of how it was read.
      fingerprint: of each split, by its name, once every image was looked at.
    """

    name: str
    classes: int
    train: Source
    validation: Source
    test: Source
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fingerprint: dict[str, Any] | None = None

    @property
    def full(self) -> Source:
        """What the final run trains on, once everything is chosen (VTAB-1k's 1000)."""
        return Joined(self.train, self.validation)
