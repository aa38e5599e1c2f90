"""A search over several tasks: one rate for a method, by pooled validation losses.

Every rate is tried on the training split of every task of the pool. The one with the
lowest mean of the tasks' validation losses (of the last epoch) is the method's, on all
tasks; of equals the lowest. A rate at which training diverged on one task is none.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from experiments import files
from experiments.runs import folder
from experiments.runs.run import begin
from experiments.runs.train_method import tune
from experiments.studies.recorded import Trial


@dataclasses.dataclass(frozen=True)
class Tried:
    """A trial: a row of the table, a rate and a task."""

    row: str
    task: str
    lr: float

    @property
    def cell(self) -> tuple[str, str]:
        """Task and row in `results.json`.

        >>> Tried("lora", "birds", 1e-3).cell
        ('birds', 'lora@0.001')
        """
        return self.task, f"{self.row}@{self.lr:.3g}"


def measured(method: str, prepared: Trial) -> dict[str, Any]:
    """Trains and returns `val_loss`, `val_accuracy` and `train_loss`; None: diverged.

    Raises:
      MismatchError: the folder has lost the last row of its `metrics.jsonl`.
    """
    names = "val_loss", "val_accuracy", "train_loss"
    with folder.held(prepared.out, resume=True):
        begin(prepared)
        try:
            last = tune(method, prepared).last_row
        except FloatingPointError as error:
            return dict.fromkeys(names) | {"diverged": str(error)}
    if "val_loss" not in last:
        raise files.MismatchError(
            f"{prepared.out} has lost the loss of its last epoch: delete that folder "
            "for it to begin anew."
        )
    return {name: last[name] for name in names}


def losses(results: Sequence[tuple[float, dict[str, Any]]]) -> dict[float, float]:
    """Returns the pooled loss of every rate: inf where one of its trials diverged.

    Args:
      results: rate and result of every trial of a row.

    >>> a, b, c = ({"val_loss": loss} for loss in (0.5, 0.7, None))
    >>> losses([(0.1, a), (0.1, b), (0.2, a), (0.2, c)])
    {0.1: 0.6, 0.2: inf}
    """
    found: dict[float, list[float]] = {}
    for lr, result in results:
        loss = result["val_loss"]
        whole = loss if loss is not None and math.isfinite(loss) else math.inf
        found.setdefault(lr, []).append(whole)
    return {lr: statistics.fmean(own) for lr, own in found.items()}


def shown(results: Mapping[Tried, dict[str, Any]]) -> Table:
    """Returns a table of finished trials: the pooled loss, accuracy on each task.

    A method's best rate has a star. Pools that are not complete have no loss.
    """
    tasks = list(dict.fromkeys(trial.task for trial in results))
    own: dict[str, dict[float, dict[str, dict[str, Any]]]] = {}
    for trial, result in results.items():
        own.setdefault(trial.row, {}).setdefault(trial.lr, {})[trial.task] = result
    made = Table(title="Validation: mean loss, and accuracy in percent")
    for name in ("method", "rate", "loss", *tasks):
        made.add_column(name, justify="left" if name == "method" else "right")
    for row, rates in own.items():
        whole = [
            (lr, result)
            for lr, found in rates.items()
            if len(found) == len(tasks)
            for result in found.values()
        ]
        means = losses(whole)
        least = min(means.values(), default=math.inf)
        for lr, found in rates.items():
            star = "*" if means.get(lr) == least < math.inf else ""
            loss = f"{means[lr]:.3f}{star}" if lr in means else ""
            accuracies = [found.get(task, {}).get("val_accuracy") for task in tasks]
            cells = ["" if a is None else f"{100 * a:.1f}" for a in accuracies]
            made.add_row(row, f"{lr:.3g}", loss, *cells)
    return made


def best(pooled: dict[float, float]) -> float:
    """Returns the rate with the lowest loss, of equals the lowest.

    Raises:
      RuntimeError: all diverged.

    >>> best({0.1: 0.6, 0.03: 0.5, 0.3: 0.5})
    0.03
    """
    if math.isinf(min(pooled.values())):
        raise RuntimeError("training diverged at every rate: lower the method's lr.")
    return min(sorted(pooled), key=lambda lr: pooled[lr])
