"""When budgets move while a model trains, and by which scores."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from scipy import stats

import snella_jax as snella

Metric = Literal["sensitivity", "magnitude", "merged_magnitude"]
Every = Literal["epoch", "step", "settled"]
Scores = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Competition:
    """How matrices compete for weights that may move.

    Attributes:
      schedule: the total budget by epochs passed, from 0; those may be fractional.
      metric: "sensitivity" or "magnitude", as the optimizer tracks it, or
        "merged_magnitude", the mean `|delta|` (Table X).
      every: "epoch" or "step" (Table X); or "settled": where the ranking of the scores
        has settled, and where the schedule ends.
      settled: rank correlation (Spearman's) of scores `window` steps apart from which
        on the ranking counts as settled.
      window: steps; the memory of the scores' running mean, say. In short epochs at
        most half of one: scores are compared within an epoch.
      exponent: of the scores: 1 in the paper, 0.5 for their square root.
      floor: share of the total that is divided evenly, see `snella.allocate`.
      floor_every: epochs from one with the floor to the next: 1 for always. Where it is
        more, matrices without a budget get a chance to show a gradient that often,
        but not once the schedule has ended.
      final: the epoch, from 0, at which the schedule ends; None for the last of all.
    """

    schedule: Callable[[float], int]
    metric: Metric = "sensitivity"
    every: Every = "epoch"
    settled: float = 0.9
    window: int = 7
    exponent: float = 1.0
    floor: float = 0.0
    floor_every: int = 1
    final: int | None = None

    def begin(self, epoch: int, epochs: int, steps: int) -> "Round":
        """The competition in an epoch of `epochs`, from 0, with so many steps."""
        final = epochs - 1 if self.final is None else self.final
        return Round(self, epoch, epoch >= final, steps)

    def scores(self, opt_state: Any, model: Callable[[], Any]) -> Scores:
        """What matrices compete by, float64 by adapter path."""
        if self.metric == "merged_magnitude":
            found = snella.merged_magnitude(model())
        else:
            found = snella.importance(opt_state)
        return {p: np.asarray(s, np.float64) ** self.exponent for p, s in found.items()}


class Round:
    """An epoch of a competition; nothing of it outlasts the epoch's end.

    Attributes:
      moves: how often budgets moved in it.
      moved: the last time.
    """

    def __init__(self, rules: Competition, epoch: int, last: bool, steps: int):
        self.rules, self.epoch, self.last, self.steps = rules, epoch, last, steps
        self.seen: Scores | None = None
        self.moves = 0
        self.moved: snella.Reallocation | None = None

    def before(
        self, step: int, budgets: Any, opt_state: Any, model: Callable[[], Any]
    ) -> Any:
        """The budgets for a step of the epoch, from 0; moved, or as they are.

        Raises:
          ValueError: scores that are not finite.
        """
        if not (self.epoch or step) or not self._may_move(step):
            return budgets
        scores = self.rules.scores(opt_state, model)
        if not self._is_due(step, scores):
            return budgets
        total = self.rules.schedule(self.epoch + step / self.steps)
        budgets, self.moved = snella.reallocate(
            budgets, opt_state, total, scores=scores, floor=self._floor()
        )
        self.moves += 1
        return budgets

    def _may_move(self, step: int) -> bool:
        match self.rules.every:
            case "epoch":
                return step == 0
            case "step":
                return True
            case "settled":
                window = min(self.rules.window, max(1, self.steps // 2))
                return step % window == 0

    def _is_due(self, step: int, scores: Scores) -> bool:
        if self.rules.every != "settled":
            return True
        before, self.seen = self.seen, scores
        if self.last and step == 0:
            return True
        return before is not None and agreement(before, scores) >= self.rules.settled

    def _floor(self) -> float:
        every = self.rules.floor_every
        if every > 1 and (self.last or self.epoch % every):
            return 0.0
        return self.rules.floor


def agreement(one: Scores, other: Scores) -> float:
    """Spearman's rank correlation of two scores of the same matrices.

    >>> agreement({"fc1": np.array([1.0, 2, 3])}, {"fc1": np.array([2.0, 3, 9])})
    1.0
    """
    flat = [np.concatenate([np.ravel(s[p]) for p in one]) for s in (one, other)]
    if any(np.ptp(values) == 0 for values in flat):
        return 1.0 if all(np.ptp(values) == 0 for values in flat) else 0.0
    found: Any = stats.spearmanr(flat[0], flat[1])
    return round(float(found.statistic), 12)
