"""The plan of a training: its length, and the budget of every epoch."""

import dataclasses
from collections.abc import Mapping
from operator import index
from typing import Any

from snella_jax.core.config import SnellaConfig
from snella_jax.core.weight import BudgetsNeverMoved


@dataclasses.dataclass(frozen=True)
class Plan:
    """Length of a training, and the budget of every epoch; static, equal by value.

    Attributes:
      epochs: number of epochs.
      steps: steps of an epoch.
      totals: weights that may move in each epoch; None where budgets are fixed.
      must_move: True if budgets have to be reallocated before merging.
    """

    epochs: int
    steps: int
    totals: tuple[int, ...] | None
    must_move: bool

    def total(self, passed: int, taken: int) -> int | None:
        """Returns the budget of the epoch to come; None where none comes.

        Args:
          passed: number of epochs that have ended before.
          taken: steps since the start.

        Raises:
          ValueError: the epoch is not over, or longer than it should be, or more
            epochs have ended than there are.
        """
        if passed >= self.epochs:
            raise ValueError(
                f"{passed} epochs have ended, and there are {self.epochs}: expected "
                "the epochs that this state was made with."
            )
        if passed == self.epochs - 1 and taken >= self.epochs * self.steps:
            return None
        since = taken - passed * self.steps
        if since == self.steps:
            return self.totals[passed + 1] if self.totals else 0
        if not since and passed:
            raise ValueError(
                f"end_of_epoch was called for epoch {passed} of {self.epochs} already, "
                f"and no step was taken since. Call it once after the {self.steps} "
                "steps of each epoch."
            )
        raise ValueError(
            f"end_of_epoch after {since} steps of epoch {passed + 1} of {self.epochs}: "
            f"expected it after {self.steps}, the steps_per_epoch of create, each time."
        )

    def check_ended(self, passed: int, taken: int) -> None:
        """Raises `BudgetsNeverMoved` if the end of an epoch was left out.

        Args:
          passed, taken: as in `total`.
        """
        due = min(taken // self.steps, self.epochs - 1)
        if self.totals is not None and passed < due:
            raise BudgetsNeverMoved(
                f"end_of_epoch was called after {passed} of {due} epochs, so the model "
                "is not as sparse as its config says. Call state = "
                f"state.end_of_epoch() after the {self.steps} steps of each epoch; to "
                "merge the model as it is, give merge unmoved_budgets=True."
            )
        if self.must_move and not passed:
            raise BudgetsNeverMoved(
                f"No epoch has ended: {taken} of its {self.steps} steps were taken, "
                "and the model is not as sparse as its config says. Call state = "
                "state.end_of_epoch() after each epoch; to merge the model as it is, "
                "give merge unmoved_budgets=True."
            )


def plan(
    config: SnellaConfig,
    weights: int,
    epochs: int,
    steps_per_epoch: int,
    schedule: Mapping[str, Any] | None,
) -> Plan:
    """Makes the plan of a training.

    Args:
      config: densities, and if budgets move.
      weights: number of adapted weights.
      epochs, steps_per_epoch: its length.
      schedule: options of `budget_schedule`; None for none.

    Raises:
      ValueError: an epoch or a step too few, or as `budget_schedule`.
      TypeError: a number that is no integer.
    """
    epochs, steps = index(epochs), index(steps_per_epoch)
    if min(epochs, steps) < 1:
        raise ValueError(
            f"epochs={epochs}, steps_per_epoch={steps}: expected at least 1 of each."
        )
    if config.allocation == "fixed":
        if schedule:
            raise ValueError(
                f'schedule={schedule!r} with allocation="fixed": expected none, since '
                "budgets stay."
            )
        return Plan(epochs, steps, None, config.must_move)
    if config.must_move and epochs == 1:
        raise ValueError(
            "epochs=1: budgets move after each epoch but the last, so expected at "
            'least 2, or allocation="fixed".'
        )
    course = config.schedule(weights, epochs, **(schedule or {}))
    return Plan(epochs, steps, tuple(map(course, range(epochs))), config.must_move)
