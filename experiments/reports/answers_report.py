"""Report of a run on questions: a table of accuracies, and a figure."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group

from experiments import files, plotting
from experiments.data.questions import Questions
from experiments.methods import registry
from experiments.plotting import plt
from experiments.reports.text import (
    Titled,
    markdown_tables,
    number,
    printed_tables,
)

MAJORITY = "majority answer"
SCORES = {  # names of their metrics
    "label": "accuracy",
    "text": "text",
    "text_norm": "text_norm",
    "generated": "generated",
}
TITLES = {
    "label": "Test accuracy by labels, %",
    "text": "Test accuracy by the likelihood of the choices' texts, %",
    "text_norm": "The same, the likelihood over the number of characters",
    "generated": "Test accuracy by generated answers, %",
}


def made(
    results: Mapping[str, dict[str, Any]], task: Questions, model: str
) -> dict[str, Any]:
    """Returns what the tables say.

    Args:
      results: entries of `results.json`.
      task: the records.
      model: name of the model.

    Returns:
      `model`; `tests`; `sizes`, of the splits; `notes`; `rows`, each with `score`,
      `method`, `accuracies` (by test, and `mean`), `val_loss`, `perplexity`,
      `trainable`, `seconds_per_step` and `keywordless` (number of generated answers
      without a keyword), None where there is none; `unparsed`, by test, where texts
      were scored.
    """
    tests, constant = task.tests, task.majority
    rows = [_row("label", MAJORITY, constant, {})]
    for score, name in SCORES.items():
        for method, result in results.items():
            found = {t: result.get(f"test_{name}_{t}") for t in tests}
            if result.get(f"test_{name}") is not None:
                rows.append(_row(score, registry.title(method), found, result))
    unparsed = next((r["unparsed"] for r in results.values() if "unparsed" in r), {})
    return {
        "model": Path(model).name,
        "tests": list(tests),
        "sizes": {
            split: len(getattr(task, split))
            for split in ("train", "validation", "test")
        },
        "notes": list(task.notes),
        "rows": rows,
        "unparsed": unparsed,
    }


def _row(
    score: str,
    method: str,
    accuracies: Mapping[str, float | None],
    result: Mapping[str, Any],
) -> dict[str, Any]:
    known = [value for value in accuracies.values() if value is not None]
    lost = result.get("keywordless")
    return {
        "score": score,
        "method": method,
        "accuracies": {**accuracies, "mean": float(np.mean(known)) if known else None},
        **{
            name: result.get(name)
            for name in ("val_loss", "perplexity", "trainable", "seconds_per_step")
        },
        "keywordless": None if lost is None else sum(lost.values()),
    }


def printed(made: dict[str, Any]) -> Group:
    """Returns the tables for the terminal, a column a method."""
    turned = []
    for title, *lines in _tables(made):
        header, *rows = map(list, zip(*[lines[0], *lines[1]], strict=True))
        turned.append((title, header, rows))
    return printed_tables(turned, caption(made))


def caption(made: dict[str, Any]) -> str:
    """Returns a line on what was measured."""
    sizes = made["sizes"]
    text = (
        f"{made['model']}: {sizes['train']} records to train on, {sizes['validation']} "
        f"to validate, {sizes['test']} to test. {MAJORITY}: the most frequent answer "
        "of each test, for every question. mean: of the tests."
    )
    lost = {test: count for test, count in made["unparsed"].items() if count}
    if lost:
        counts = ", ".join(f"{test} {count}" for test, count in lost.items())
        text += f" Questions without parsed texts: {counts}."
    return " ".join([text, *made["notes"]])


def write(made: dict[str, Any], out: Path) -> None:
    """Writes `report.md`, `report.json` and `figures/accuracies.png` into a folder."""
    files.replace(out / "report.md", markdown_tables(_tables(made), caption(made)))
    files.write(out / "report.json", made)
    draw(out / "figures" / "accuracies.png", made)


def draw(path: Path, made: dict[str, Any]) -> None:
    """Draws the accuracies by labels: a group of bars a test, a bar a method.

    The accuracy of the majority answer is a line across the group.
    """
    rows = [row for row in made["rows"] if row["score"] == "label"]
    constant, methods = rows[0], rows[1:]
    groups = [*made["tests"], "mean"]
    figure, axes = plt.subplots(
        figsize=(1.5 + 1.3 * len(groups), 4), layout="constrained"
    )
    places, width = np.arange(len(groups)), 0.8 / max(1, len(methods))
    for index, row in enumerate(methods):
        values = [100 * (row["accuracies"][group] or 0) for group in groups]
        aside = (index + 0.5) * width - 0.4
        axes.bar(places + aside, values, width, label=plotting.label(row["method"]))
    for place, group in zip(places, groups, strict=True):
        value = 100 * constant["accuracies"][group]
        label = MAJORITY if place == 0 else "_"  # one line of the legend
        axes.hlines(value, place - 0.45, place + 0.45, "black", "--", label=label)
    axes.set_xticks(places, [plotting.label(group) for group in groups])
    axes.set(ylabel="test accuracy, %", title=plotting.label(made["model"]))
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    plotting.save(figure, path)


def _tables(made: dict[str, Any]) -> Iterator[Titled]:
    """Yields title, header and rows of the table of each score, a row a method."""
    prose = any(row["perplexity"] is not None for row in made["rows"])
    groups = (*made["tests"], "mean")
    for score, title in TITLES.items():
        rows = []
        for row in made["rows"]:
            if row["score"] != score:
                continue
            own = row["accuracies"]
            cells = [number(own[group], ".1f", 100) for group in groups]
            if score == "label":
                cells += [number(row["val_loss"], ".4f")]
                cells += [number(row["perplexity"], ".2f")] * prose
                cells += [number(row["trainable"], ",d")]
                cells += [number(row["seconds_per_step"], ".2f")]
            if score == "generated":
                cells += [number(row["keywordless"], "d")]
            rows.append([row["method"], *cells])
        header = ["", *groups]
        if score == "label":
            header += ["val loss", *["perplexity"] * prose, "trainable", "s/step"]
        if score == "generated":
            header += ["no keyword"]
        if rows:
            yield title, header, rows
