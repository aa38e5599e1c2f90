"""Splits of data, and a classification task: its splits and its classes."""

import dataclasses
from typing import Any, Protocol

from experiments.data.source import Joined, Source


class Splits(Protocol):
    """Data of a run: disjoint splits of examples of any kind.

    Attributes:
      name: name of the data in tables.
      train: examples to train on while something is chosen.
      validation: examples to choose by.
      test: examples that are used once.
      full: examples of the final run, once everything is chosen.
    """

    @property
    def name(self) -> str: ...
    @property
    def train(self) -> Source: ...
    @property
    def validation(self) -> Source: ...
    @property
    def test(self) -> Source: ...
    @property
    def full(self) -> Source: ...


@dataclasses.dataclass(frozen=True)
class Task:
    """Classification task with three disjoint splits.

    Attributes:
      name: name of the data set in tables.
      classes: number of classes; labels are 0 to `classes - 1`.
      train: examples to train on while something is chosen.
      validation: examples to choose by.
      test: examples that are used once.
      names: names of the classes; empty where the set has none.
      notes: remarks for the user on how it was read.
      fingerprint: fingerprints of the splits, by name, once every image was looked at.
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
        """Examples of the final run, once everything is chosen (VTAB-1k's 1000)."""
        return Joined(self.train, self.validation)
