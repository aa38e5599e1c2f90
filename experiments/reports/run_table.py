"""The table that a run ends with: a row for each of its methods."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from experiments.methods import registry
from experiments.training.objective import Metric

COLUMNS = {
    "test": "test",
    "best_test": "best on test",
    "ema_test": "mean weights",
    "val": "val",
}


def table(
    title: str,
    results: Mapping[str, dict[str, Any]],
    metrics: Sequence[Metric],
    targeted: int,
    followed: str | None,
) -> Table:
    """Returns the table.

    Args:
      title: stands above it.
      results: entries of `results.json`.
      metrics: those of the objective.
      targeted: number of weights of the targeted kernels.
      followed: name of the split that was followed.
    """
    shown = Table(title=title)
    columns = [
        (title, kind, metric)
        for metric in metrics
        for kind, title in COLUMNS.items()
        if any(r.get(f"{kind}_{metric.name}") is not None for r in results.values())
        and (kind != "best_test" or followed == "test")
    ]
    many = len(metrics) > 1
    names = [
        f"{title} {metric.name}" if many else title for title, _, metric in columns
    ]
    for column in ("", *names, "trainable", "s/step", "weights moved"):
        shown.add_column(column, justify="left" if not column else "right")
    for method, result in results.items():
        moved, seconds = result["weights_moved"], result["seconds_per_step"]
        shown.add_row(
            registry.title(method),
            *(_text(result, kind, metric) for _, kind, metric in columns),
            f"{result['trainable']:,}",
            "" if seconds is None else f"{seconds:.4f}",
            f"{moved:,} ({moved / targeted:.0%})",
        )
    return shown


def _text(result: dict[str, Any], kind: str, metric: Metric) -> str:
    value = result.get(f"{kind}_{metric.name}")
    return "" if value is None else metric.text(value, 2 if kind == "test" else 1)
