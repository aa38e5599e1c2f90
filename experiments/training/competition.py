"""Competition: reallocation of budgets during training, by scores of the matrices."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np

import snella_jax as snella
from experiments.training.rounds import Rounds

Metric = Literal["sensitivity", "magnitude", "merged_magnitude"]
Every = Literal["epoch", "step", "settled"]
Scores = Mapping[str, np.ndarray]


class Schedule(Protocol):
    """Makes the total budget's course: `SnellaConfig.schedule`, given the weights."""

    def __call__(self, *, steps: int, cooldown: int) -> Callable[[float], int]:
        """Returns the total budget by rounds passed, which may be fractional.

        Args:
          steps: number of rounds.
          cooldown: number of rounds at the end that keep the last budget.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Competition:
    """Rules by which matrices compete for weights that may move.

    Attributes:
      schedule: course of the total budget (Eq. 12), for any number of rounds.
      metric: "sensitivity" or "magnitude", as the optimizer tracks it, or
        "merged_magnitude", the mean `|delta|` (Table X).
      every: "epoch" (at the start of each round) or "step" (Table X); or "settled":
        where the ranking of the scores has settled, and where the schedule ends.
      settled: rank correlation (Spearman's) of scores `window` steps apart from which
        on the ranking counts as settled.
      window: steps; the memory of the scores' running mean, say. In short rounds at
        most half of one: scores are compared within a round.
      exponent: applied to the scores: 1 in the paper, 0.5 for their square root.
      floor: share of the total that is divided evenly, see `snella.allocate`.
      floor_every: rounds from one with the floor to the next: 1 for always. Where it is
        more, matrices without a budget get a chance to show a gradient that often,
        but not once the schedule has ended.
    """

    schedule: Schedule
    metric: Metric = "sensitivity"
    every: Every = "epoch"
    settled: float = 0.9
    window: int = 7
    exponent: float = 1.0
    floor: float = 0.0
    floor_every: int = 1

    def begin(self, index: int, rounds: Rounds) -> "Moves":
        """Returns the reallocations of a round, from 0, to be.

        Raises:
          ValueError: there are too few rounds to move the budget.
        """
        return Moves(self, index, rounds)

    def scores(self, opt_state: Any, model: Callable[[], Any]) -> Scores:
        """Returns the scores that matrices compete by, float64 by adapter path."""
        if self.metric == "merged_magnitude":
            found = snella.merged_magnitude(model())
        else:
            found = snella.importance(opt_state)
        return {p: np.asarray(s, np.float64) ** self.exponent for p, s in found.items()}


class Moves:
    """Reallocations in one round; nothing of them outlasts the round's end.

    Attributes:
      count: how often budgets moved so far.
      last: the last reallocation; None where there was none.
    """

    def __init__(self, rules: Competition, index: int, rounds: Rounds):
        self.rules, self.index, self.steps = rules, index, rounds.size
        self.total = rules.schedule(steps=rounds.count, cooldown=rounds.cooldown)
        self.ends = index >= rounds.last
        self.seen: Scores | None = None
        self.count = 0
        self.last: snella.Reallocation | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns what later steps of the round and its row need, for `take_up`."""
        seen = self.seen and {path: own.tolist() for path, own in self.seen.items()}
        last = self.last and {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in dataclasses.asdict(self.last).items()
        }
        return {"count": self.count, "seen": seen, "last": last}

    def take_up(self, found: dict[str, Any]) -> None:
        """Begins with the moves of a round that was interrupted."""
        self.count = found["count"]
        if (seen := found["seen"]) is not None:
            self.seen = {path: np.asarray(own, float) for path, own in seen.items()}
        if (last := found["last"]) is not None:
            kinds = {"scores": np.float64, "budgets": np.int64, "capacities": np.int64}
            arrays = {
                name: np.asarray(last[name], kind) for name, kind in kinds.items()
            }
            texts = {name: tuple(last[name]) for name in ("names", "died")}
            self.last = snella.Reallocation(**(last | arrays | texts))

    def before(
        self, step: int, budgets: Any, opt_state: Any, model: Callable[[], Any]
    ) -> Any:
        """Returns the budgets for a step of the round, from 0; moved, or as they are.

        Raises:
          ValueError: scores that are not finite.
        """
        if not (self.index or step) or not self._may_move(step):
            return budgets
        scores = self.rules.scores(opt_state, model)
        if not self._is_due(step, scores):
            return budgets
        total = self.total(self.index + step / self.steps)
        budgets, self.last = snella.reallocate(
            budgets, opt_state, total, scores=scores, floor=self._floor()
        )
        self.count += 1
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
        if self.ends and step == 0:
            return True
        return before is not None and agreement(before, scores) >= self.rules.settled

    def _floor(self) -> float:
        every = self.rules.floor_every
        if every > 1 and (self.ends or self.index % every):
            return 0.0
        return self.rules.floor


def agreement(one: Scores, other: Scores) -> float:
    """Returns Spearman's rank correlation of two scores of the same matrices.

    >>> agreement({"fc1": np.array([1.0, 2, 3])}, {"fc1": np.array([2.0, 3, 9])})
    1.0
    """
    from scipy import stats  # slow to import, and every program would wait for it

    flat = [np.concatenate([np.ravel(s[p]) for p in one]) for s in (one, other)]
    if any(np.ptp(values) == 0 for values in flat):
        return 1.0 if all(np.ptp(values) == 0 for values in flat) else 0.0
    found: Any = stats.spearmanr(flat[0], flat[1])
    return round(float(found.statistic), 12)
