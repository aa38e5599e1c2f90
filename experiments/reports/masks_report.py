"""Report of a run on masks: a table of both kinds of measures for every set."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group

from experiments import files
from experiments.methods import registry
from experiments.reports.text import (
    Titled,
    markdown_tables,
    number,
    printed_tables,
)
from experiments.training.objective import Metric

TEST = "test"  # the test split, among the sets that are tested
TITLES = {  # of the metrics
    "dice": "Dice",
    "iou": "IoU",
    "recall_pooled": "recall_pooled",
    "dice_of_recall": "dice_of_recall",
}
CAPTION = (
    "Dice, IoU: the mean over images, each at its own size. recall_pooled, "
    "dice_of_recall: what the released script prints as mIoU and mDice; false alarms "
    "cost nothing there, and they are not comparable with Dice and IoU."
)


def made(
    results: Mapping[str, dict[str, Any]],
    metrics: Sequence[Metric],
    sets: Mapping[str, tuple[str, int]],
    notes: Sequence[str],
    model: str,
) -> dict[str, Any]:
    """Returns what the tables say.

    Args:
      results: entries of `results.json`.
      metrics: those of the objective.
      sets: title and number of images of every set, the test split first.
      notes: remarks on the data.
      model: name of the model.

    Returns:
      `model`; `sets`, title and size of each by name; `notes`; `rows`, each with `set`,
      `method` (its title), the metrics, and `val_dice`, `density`, `trainable` and
      `seconds_per_step`, None where there is none.
    """
    rows = []
    for name in sets:
        for method, result in results.items():
            found = {m.name: result[f"test_{m.name}"] for m in metrics}
            found = found if name == TEST else result["tests"][name]
            own = ("val_dice", "density", "trainable", "seconds_per_step")
            rows.append(
                {
                    "set": name,
                    "method": registry.title(method),
                    **found,
                    **{key: result.get(key) for key in own},
                }
            )
    return {
        "model": Path(model).name,
        "sets": {n: {"title": t, "images": count} for n, (t, count) in sets.items()},
        "notes": list(notes),
        "rows": rows,
    }


def printed(made: dict[str, Any]) -> Group:
    """Returns the tables for the terminal."""
    return printed_tables(_tables(made), caption(made))


def caption(made: dict[str, Any]) -> str:
    """Returns a line on what was measured."""
    return " ".join([f"{made['model']}. {CAPTION}", *made["notes"]])


def write(made: dict[str, Any], out: Path) -> None:
    """Writes `report.md` and `report.json` into a folder."""
    files.replace(out / "report.md", markdown_tables(_tables(made), caption(made)))
    files.write(out / "report.json", made)


def _tables(made: dict[str, Any]) -> Iterator[Titled]:
    """Yields title, header and rows of each set's table, and of one on training."""
    rows = made["rows"]
    for name, own in made["sets"].items():
        header = ["", *(f"{title}, %" for title in TITLES.values())]
        cells = [
            [row["method"], *(number(row[metric], ".2f", 100) for metric in TITLES)]
            for row in rows
            if row["set"] == name
        ]
        yield f"{own['title']}, {own['images']} images", header, cells
    header = ["", "Dice on validation, %", "density", "trainable", "s/step"]
    cells = [
        [
            row["method"],
            number(row["val_dice"], ".2f", 100),
            number(row["density"], ".2f"),
            number(row["trainable"], ",d"),
            number(row["seconds_per_step"], ".3f"),
        ]
        for row in rows
        if row["set"] == TEST
    ]
    yield "training", header, cells
