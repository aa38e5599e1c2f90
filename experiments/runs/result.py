"""Result of one method of a run."""

import dataclasses
from typing import Any

from experiments.training.objective import Objective

KINDS = ("test", "val", "best_val", "best_test", "ema_test")  # of metrics in results


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of one method: its line in the table and its entry in `summary.json`.

    Attributes:
      metrics: for every metric of the objective, by name, with None for what there is
        not: `test_NAME`, on the test split, of the last round: the one to compare;
        `ema_test_NAME`, the same of the running mean of the weights; `val_NAME`, on the
        validation split, of the last round (for the linear probe, of the head that was
        fitted without it), None where it was trained on; `best_val_NAME` and
        `best_test_NAME`, of the best round. Where validation was followed, the latter
        is early stopping; where the test split was (`protocol=released`), it was chosen
        by what it measures, as in the paper.
      trainable: number of parameters that train, the head's among them.
      seconds_per_step: median; of an L-BFGS iteration for the linear probe; None, as
        whatever else only the rows of `metrics.jsonl` say, where these are lost.
      weights_moved: number of weights of the targeted kernels that differ after
        training.
      best_epoch: the best round on what was followed, of equals the last; None where
        nothing was.
      density: fraction of the adapted weights that may move; None without budgets.
      decayed: number of parameters that weight decay is for; None in older folders.
      settings: rate, decay and density that were used, perhaps those of a search.
    """

    metrics: dict[str, Any]
    trainable: int
    seconds_per_step: float | None
    weights_moved: int
    best_epoch: int | None = None
    density: float | None = None
    decayed: int | None = None
    settings: dict[str, float] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns the entry of `results.json`, with the metrics beside the rest."""
        values = dataclasses.asdict(self)
        return values.pop("metrics") | values


def absent(objective: Objective) -> dict[str, float | None]:
    """Returns a None for each of a result's metrics."""
    return {f"{kind}_{m.name}": None for m in objective.metrics for kind in KINDS}
