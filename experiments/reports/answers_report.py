"""Report of a run on questions: a table of accuracies, and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from experiments import files, plotting
from experiments.methods import registry
from experiments.plotting import plt
from experiments.reports.text import MISSING, markdown_lines

MAJORITY = "majority answer"
SCORES = {"label": "accuracy", "text": "text", "text_norm": "text_norm"}
TITLES = {
    "label": "accuracy by labels",
    "text": "accuracy by the likelihood of the choices' texts",
    "text_norm": "the same over their numbers of characters",
}


def made(
    results: Mapping[str, dict[str, Any]],
    tests: Sequence[str],
    majority: Mapping[str, float],
    model: str,
) -> dict[str, Any]:
    """Returns what the table says.

    Args:
      results: entries of `results.json`.
      tests: names of the tests.
      majority: share of the most frequent answer, by test.
      model: name of the model.

    Returns:
      `model`; `tests`; `rows`, each with `score`, `method`, `accuracies` (by test, and
      `mean`), `val_loss`, `perplexity`, `trainable` and `seconds_per_step`, None where
      there is none; `unparsed`, by test, where texts were scored.
    """
    constant = {test: majority[test] for test in tests}
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
    return {
        "score": score,
        "method": method,
        "accuracies": {**accuracies, "mean": float(np.mean(known)) if known else None},
        **{
            name: result.get(name)
            for name in ("val_loss", "perplexity", "trainable", "seconds_per_step")
        },
    }


def printed(made: dict[str, Any]) -> Table:
    """Returns the table for the terminal."""
    header, rows = _lines(made)
    shown = Table(caption=caption(made), caption_justify="left")
    for index, title in enumerate(header):
        shown.add_column(title, justify="right" if index else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def caption(made: dict[str, Any]) -> str:
    """Returns a line on the kinds of numbers."""
    scores = dict.fromkeys(row["score"] for row in made["rows"])
    text = f"{made['model']}, test accuracy in %. "
    text += "; ".join(f"{score}: {TITLES[score]}" for score in scores) + ". "
    text += (
        f"{MAJORITY}: the most frequent answer of each test, for every question; mean: "
        "of the tests."
    )
    lost = {test: count for test, count in made["unparsed"].items() if count}
    if lost:
        counts = ", ".join(f"{test} {count}" for test, count in lost.items())
        text += f" Questions without parsed texts: {counts}."
    return text


def write(made: dict[str, Any], out: Path) -> None:
    """Writes `report.md`, `report.json` and `figures/accuracies.png` into a folder."""
    header, rows = _lines(made)
    lines = [*markdown_lines(header, rows), "", caption(made), ""]
    files.replace(out / "report.md", "\n".join(lines))
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


def _lines(made: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    several = len({row["score"] for row in made["rows"]}) > 1
    prose = any(row["perplexity"] is not None for row in made["rows"])
    header = ["", *made["tests"], "mean", "val loss", *["perplexity"] * prose]
    header += ["trainable", "s/step"]

    def number(value: float | None, form: str) -> str:
        return MISSING if value is None else f"{value:{form}}"

    rows = []
    for row in made["rows"]:
        name = row["method"] + f", {row['score']}" * several
        own = row["accuracies"]
        cells = [
            number(None if own[t] is None else 100 * own[t], ".1f")
            for t in (*made["tests"], "mean")
        ]
        cells += [number(row["val_loss"], ".4f")]
        cells += [number(row["perplexity"], ".2f")] * prose
        cells += [
            number(row["trainable"], ",d"),
            number(row["seconds_per_step"], ".2f"),
        ]
        rows.append([name, *cells])
    return header, rows
