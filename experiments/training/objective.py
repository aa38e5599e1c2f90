"""Objectives: what a model learns, how it is measured and how outputs are drawn.

The trainer, the evaluation and the reports see no more of a task than batches, dicts of
arrays of any shape, and the names of metrics. `classification.py` is an objective.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.axes import Axes

Batch = Mapping[str, Array]
Sums = Mapping[str, float]
Score = Callable[[Any, Any], Sums]


@dataclasses.dataclass(frozen=True)
class Metric:
    """Metric of an evaluation.

    Attributes:
      name: stands in `test_NAME`, `val_NAME` and so on of a run's files.
      more_is_better: False for errors and losses.
      percent: True for shares, which are shown in percent.
    """

    name: str
    more_is_better: bool = True
    percent: bool = False

    def rank(self, value: float) -> float:
        """Returns the value, or its negative where less is better.

        >>> Metric("error", more_is_better=False).rank(0.25)
        -0.25
        """
        return value if self.more_is_better else -value

    def text(self, value: float, digits: int = 1) -> str:
        """Returns the value as it is shown.

        >>> Metric("accuracy", percent=True).text(0.9751), Metric("loss").text(0.12344)
        ('97.5%', '0.1234')
        """
        return f"{value:.{digits}%}" if self.percent else f"{value:.4g}"


class Objective(Protocol):
    """Kind of task: loss, metrics and pictures of a model's outputs."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Metrics of an evaluation, at least one.

        The first is followed: it decides which round and which trial is the best.
        """
        ...

    def loss(
        self, model: Any, batch: Batch, key: PRNGKeyArray | None
    ) -> Float[Array, ""]:
        """Returns the mean loss over a training batch's examples.

        Args:
          model: in training mode, its adapters seeded.
          batch: what the training data's `prepare` gives, stacked, and `index`.
          key: for the model's noise and the loss's own; None for none of both.
        """
        ...

    def outputs(self, model: Any, batch: Batch) -> Any:
        """Returns a model's outputs, a pytree of arrays `[B, ...]`.

        They hold what `sums`, `score` and `draw` need, and no more: a batch of them
        stays in the devices' memory.

        Args:
          model: in evaluation mode.
          batch: as for `loss`, and `valid`, bool `[B]`, False for what only fills it.
        """
        ...

    def sums(self, outputs: Any, batch: Batch) -> dict[str, Array]:
        """Returns scalars to be added up over batches, computed on the devices.

        Examples that are not `valid` must not count.
        """
        ...

    @property
    def score(self) -> Score | None:
        """Host stage, or None: sums of one example and its output, NumPy arrays.

        It is called for every valid example with what the source holds of it, in its
        own size. Without it no output leaves the devices.
        """
        ...

    def numbers(self, sums: Sums) -> dict[str, float]:
        """Returns the value of every metric, from the sums over a whole source.

        Args:
          sums: those of `sums` and of the host stage.
        """
        ...

    def draw(self, axes: Axes, example: Any, output: Any) -> None:
        """Draws a model's output for an example of a source, without axes."""
        ...


def followed(objective: Objective) -> Metric:
    """Returns the metric that decides which round and which trial is the best.

    Raises:
      ValueError: there is no metric.
    """
    if not objective.metrics:
        raise ValueError(
            f"{type(objective).__name__} has no metrics: expected at least one, the "
            "first of which is followed."
        )
    return objective.metrics[0]
