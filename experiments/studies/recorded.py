"""Runs on images that keep which test images are right, and what training changed."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

import snella_jax as snella
from experiments.config.images import ImageConfig
from experiments.data.source import labels_of
from experiments.runs.images import ImageRun
from experiments.runs.result import Result
from experiments.training.classification import ByLoss

DELTA = "delta.safetensors"


@dataclasses.dataclass(frozen=True)
class Recorded(ImageRun):
    """A run whose results say of every test image if it is right.

    Attributes:
      keep: write `DELTA`, what training changed, of methods that merge into the base.
      seen: predicted class by method and index of the test image.
    """

    keep: bool = False
    seen: dict[str, dict[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def followed(self) -> None:
        """Nothing: else the best round's model would be tested besides the last's."""
        return None

    def look(self, method: str) -> Callable[[int, Any], None]:
        """Returns what notes each predicted class."""
        own = self.seen[method] = {}

        def note(index: int, output: Any) -> None:
            own[index] = int(output)

        return note

    def besides(self, method: str, model: Any) -> dict[str, Any]:
        """Returns which test images are right; writes what training changed."""
        if self.keep and self.config.settings[method].kept(self.base, model) == 0:
            snella.save_delta(delta(self.out, method), self.base, model)
        return self._right(method)

    def stepless(self, method: str) -> Result:
        """Fits the linear probe."""
        result = super().stepless(method)
        metrics = result.metrics | self._right(method)
        return dataclasses.replace(result, metrics=metrics)

    def _right(self, method: str) -> dict[str, Any]:
        labels, seen = labels_of(self.task.test), self.seen[method]
        right = [seen[index] == label for index, label in enumerate(labels.tolist())]
        return {"right": packed(right), "tested": len(right)}


@dataclasses.dataclass(frozen=True)
class Trial(ImageRun):
    """A run that is judged by its loss on validation."""

    @property
    def objective(self) -> ByLoss:
        """Cross entropy, which is followed, and accuracy."""
        return ByLoss(self.task.names)


def delta(run: Path, method: str) -> Path:
    """Returns the file of what a method's training changed, in the run's folder."""
    return run / f"{method}.{DELTA}"


def drawn(task: str, config: ImageConfig) -> str:
    """Returns the name of a run's images: of few images each seed draws its own.

    >>> drawn("birds", ImageConfig(seed=1)), drawn("birds", ImageConfig(per_class=5))
    ('birds', 'birds, seed 0')
    """
    return task if config.per_class is None else f"{task}, seed {config.seed}"


def packed(right: Sequence[bool]) -> str:
    """Returns a bit for every example as hexadecimal text.

    >>> packed([True, False, False, False, False, False, False, True, True])
    '8180'
    """
    return np.packbits(np.asarray(right, bool)).tobytes().hex()


def unpacked(text: str, count: int) -> Bool[np.ndarray, " count"]:
    """Returns the bits that `packed` made text of.

    >>> unpacked("8180", 9).tolist().count(True)
    3
    """
    data = np.frombuffer(bytes.fromhex(text), np.uint8)
    return np.unpackbits(data, count=count).astype(bool)
