"""Report of a run on a concept: a table of what the judges measured."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group

from experiments import files
from experiments.methods import registry
from experiments.reports.text import Titled, markdown_tables, number, printed_tables
from experiments.tasks.dreambooth import Concept
from experiments.training.objective import Metric

CAPTION = (
    "image alignment: mean cosine of the features of pictures and photographs. Vendi: "
    "effective number of kinds among the pictures of a prompt, on average, and among "
    "all of them. loss: flow matching on the photographs, at noise that stays the same."
)
FITS = {  # of pictures and prompts, by metric
    "text_alignment": "text alignment: mean cosine of a picture and its prompt, "
    "without the token.",
    "probe": "probe: mean probability of the class by a probe of features.",
}
TITLES = {"vendi_prompt": "Vendi, prompt", "vendi_concept": "Vendi, all"}


def made(
    results: Mapping[str, dict[str, Any]],
    metrics: Sequence[Metric],
    concept: Concept,
    model: str,
) -> dict[str, Any]:
    """Returns what the table says.

    Args:
      results: entries of `results.json`.
      metrics: those of the objective.
      concept: what was learnt.
      model: name of the model.

    Returns:
      `model`, `concept`, `class_name`, `photographs` (their number), `credit`,
      `metrics` (names), and `rows`, each with `method` (its title), the metrics,
      `density`, `trainable` and `seconds_per_step`, None where there is none.
    """
    own = ("density", "trainable", "seconds_per_step")
    rows = [
        {
            "method": registry.title(method),
            **{metric.name: result[f"test_{metric.name}"] for metric in metrics},
            **{key: result.get(key) for key in own},
        }
        for method, result in results.items()
    ]
    return {
        "model": Path(model).name,
        "concept": concept.name,
        "class_name": concept.class_name,
        "photographs": len(concept.photographs),
        "credit": concept.credit,
        "metrics": [metric.name for metric in metrics],
        "rows": rows,
    }


def printed(made: dict[str, Any]) -> Group:
    """Returns the table for the terminal."""
    return printed_tables(_tables(made), caption(made))


def caption(made: dict[str, Any]) -> str:
    """Returns a line on what was measured."""
    fits = [FITS[name] for name in made["metrics"] if name in FITS]
    return " ".join([f"{made['model']}.", *fits, CAPTION, made["credit"]]).strip()


def write(made: dict[str, Any], out: Path) -> None:
    """Writes `report.md` and `report.json` into a folder."""
    files.replace(out / "report.md", markdown_tables(_tables(made), caption(made)))
    files.write(out / "report.json", made)


def _tables(made: dict[str, Any]) -> Iterator[Titled]:
    metrics = [TITLES.get(name, name.replace("_", " ")) for name in made["metrics"]]
    header = ["", *metrics, "density", "trainable", "s/step"]
    rows = [
        [
            row["method"],
            *(number(row[name], ".3f") for name in made["metrics"]),
            number(row["density"], ".2f"),
            number(row["trainable"], ",d"),
            number(row["seconds_per_step"], ".3f"),
        ]
        for row in made["rows"]
    ]
    count = made["photographs"]
    yield f"{made['concept']} ({made['class_name']}), {count} photographs", header, rows
