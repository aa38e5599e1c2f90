"""The ablations' tables and pictures, made from the finished runs."""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy import stats

from experiments import files, plotting
from experiments.paths import stem
from experiments.plotting import plt
from experiments.reports.text import MISSING, markdown_lines
from experiments.studies import paired
from experiments.studies.ablations import STUDIES, Study, Variant
from experiments.studies.recorded import unpacked
from experiments.studies.table_store import Done, Store

COLUMNS = {  # of a table: measure, factor and format
    "as trained, %": ("unmerged_accuracy", 100, ".1f"),
    "train loss": ("train_loss", 1, ".3f"),
    "moved, %": ("density", 100, ".1f"),
    "dead, %": ("dead", 100, ".0f"),
    "full, %": ("full", 100, ".0f"),
    "rank": ("rank", 1, ".0f"),
    "change, %": ("change", 100, ".1f"),
    "moves": ("moves", 1, ".0f"),
}
EXPLAINED = (
    "Test accuracy of the last epoch, mean and deviation over the seeds in brackets, "
    "of the merged model; as trained: before merging, which rounds in bfloat16. Rates "
    "are searched on validation, or those of the base; what that choice adds to the "
    "noise is in no deviation. Studies on validation: accuracy of its images, which do "
    "not train. Above: points with the 95% interval, paired by image and seed. Dead "
    "and full: matrices of which less than 0.1% and more than 99.9% moved. Rank: "
    "singular values of an update above 1% of the largest, mean over matrices. Change: "
    "the update's norm by the weight's. Moves: reallocations."
)


def write(store: Store, task: str, out: Path, console: Console) -> None:
    """Writes `report.md`, `report.json`, and a PNG for each study with results."""
    done = store.rows(task)
    tables = {name: table(study, done) for name, study in STUDIES.items()}
    shared = store.shared
    size = f", {shared['image_size']} pixels" if shared["image_size"] else ""
    setup = f"{task}, {stem(shared['model'])}{size}, {shared['epochs']} epochs"
    results = [r for own in done.values() for r in own.get("seeds", {}).values()]
    where = sorted({f"{r['device']}, jax {r['versions']['jax']}" for r in results})
    made_by = f"By `python -m experiments.ablate`, on {'; '.join(where)}."
    lines = [f"# Ablations: {setup}", "", made_by, "", EXPLAINED, ""]
    for name, made in tables.items():
        lines += [f"## {heading(STUDIES[name])}", "", *_markdown(made), ""]
        lines += [f"- {sentence}" for sentence in made["order"]] + [""]
        if sum(bool(row["seeds"]) for row in made["rows"]) > 1:
            lines += [f"![{STUDIES[name].title}]({name}.png)", ""]
            picture(out / f"{name}.png", STUDIES[name], made, setup)
    if failed := store.failures():
        lines += [
            "## Failed, and in no mean",
            "",
            *(f"- {text}" for text in failed),
            "",
        ]
    text = "\n".join(lines)
    files.replace(out / "report.md", text)
    files.write(out / "report.json", tables, indent=1)
    console.print(f"report.md and report.json are in {out}", soft_wrap=True)


def heading(study: Study) -> str:
    """Returns the title of a study with the paper's table."""
    title = study.title[0].upper() + study.title[1:]
    return f"{title} (the paper's {study.source})" if study.source else title


def table(study: Study, done: dict[str, Done]) -> dict[str, Any]:
    """Returns a study's rows, and whether the paper's orders hold.

    Returns:
      `rows`, each with `title`, `paper` (the paper's number, or None), `seeds`
      (accuracies by seed, in percent), `mean`, `deviation`, `lr`, `searched` (True if
      the rate is the row's own), the measures of `COLUMNS`, and `gradient_norms`;
      `gap` (points above the first row, paired by image and seed, where it is known);
      `order`, a sentence for each order of the paper.
    """
    rights = [_rights(done.get(own.name, {})) for own in study.variants]
    rows = [
        _row(variant, study, done.get(variant.name, {})) for variant in study.variants
    ]
    for row, right in zip(rows, rights, strict=True):
        if gap := paired.difference(right, rights[0]):
            row["gap"] = gap.as_dict()
    by_title = {row["title"]: row for row in rows}
    orders = [[by_title[title] for title in order] for order in study.order]
    return {"rows": rows, "order": [_verdict(order) for order in orders]}


def _row(variant: Variant, study: Study, own: Done) -> dict[str, Any]:
    seeds = dict(sorted(own.get("seeds", {}).items()))
    judged = "val_accuracy" if variant.validated else "test_accuracy"
    accuracies = {seed: 100 * r[judged] for seed, r in seeds.items()}
    values = list(accuracies.values())
    results = list(seeds.values())
    curves = zip(*(r["gradient_norms"] for r in results), strict=True)
    return {
        "title": variant.title,
        "paper": study.paper.get(variant.title),
        "seeds": accuracies,
        "mean": statistics.mean(values) if values else None,
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "lr": own.get("chosen", {}).get("lr"),
        "searched": variant.searched,
        **{
            measure: statistics.mean(r[measure] for r in results) if results else None
            for measure, _, _ in COLUMNS.values()
        },
        "gradient_norms": [statistics.mean(norms) for norms in curves],
    }


def _rights(own: Done) -> dict[int, np.ndarray]:
    """Returns which images are right, by seed; of older seeds nothing."""
    return {
        int(seed): unpacked(result["right"], result["tested"])
        for seed, result in own.get("seeds", {}).items()
        if "right" in result
    }


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Says whether an order of the paper holds, with the differences between rows.

    It holds, or does not, if the 95% confidence intervals (Student's t, over the
    differences of seeds) leave no doubt.
    """
    order = " > ".join(row["title"] for row in rows)
    if any(not row["seeds"] for row in rows):
        return f"The paper has {order}; here not all of it was run."
    parts, low, high = [], [], []
    for better, worse in itertools.pairwise(rows):
        same = sorted(better["seeds"].keys() & worse["seeds"].keys())
        gaps = [better["seeds"][seed] - worse["seeds"][seed] for seed in same]
        gap = statistics.mean(gaps) if gaps else better["mean"] - worse["mean"]
        error = math.inf
        if len(gaps) > 1:
            spread = statistics.stdev(gaps) / len(gaps) ** 0.5
            error = spread * float(stats.t.ppf(0.975, len(gaps) - 1))
        parts.append(f"{gap:+.1f}" + (f" ± {error:.1f}" if error < math.inf else ""))
        low.append(gap - error)
        high.append(gap + error)
    if min(low) > 0:
        verdict = "this holds here"
    elif min(high) < 0:
        verdict = "this does not hold here"
    else:
        verdict = "here it cannot be told"
    return f"The paper has {order}; {verdict} ({', '.join(parts)} points)."


def _markdown(made: dict[str, Any]) -> list[str]:
    rows, paired_up = [], any("gap" in row for row in made["rows"][1:])
    for row in made["rows"]:
        measures = [
            MISSING if row[measure] is None else format(row[measure] * factor, style)
            for measure, factor, style in COLUMNS.values()
        ]
        paper = "" if row["paper"] is None else f"{row['paper']:g}"
        rate = MISSING if row["lr"] is None else f"{row['lr']:.2g}"
        rate += "" if row["searched"] else " (base)"
        gaps = [_gap(row.get("gap"))] * paired_up
        rows.append([row["title"], paper, accuracy(row), *gaps, rate, *measures])
    gaps = [f"above {made['rows'][0]['title']}"] * paired_up
    return markdown_lines(["", "paper", "accuracy, %", *gaps, "rate", *COLUMNS], rows)


def _gap(gap: dict[str, Any] | None) -> str:
    if gap is None:
        return MISSING
    return f"{gap['value']:+.1f} ({gap['low']:+.1f} to {gap['high']:+.1f})"


def accuracy(row: dict[str, Any]) -> str:
    """Returns a row's accuracy as tables have it."""
    if row["mean"] is None:
        return MISSING
    deviation = "" if row["deviation"] is None else f" ± {row['deviation']:.1f}"
    return f"{row['mean']:.1f}{deviation} ({len(row['seeds'])})"


def picture(path: Path, study: Study, made: dict[str, Any], setup: str) -> None:
    """Draws a study's accuracies, its seeds as dots, and gradient norms over epochs.

    The norms of the kernels are the paper's Figure 4(c).
    """
    rows = [row for row in made["rows"] if row["seeds"]]
    height = 1.5 + 0.35 * max(len(rows), 6)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, height), layout="constrained"
    )
    for index, row in enumerate(rows):
        values = list(row["seeds"].values())
        color, style = f"C{index % 10}", "-" if index < 10 else "--"
        left.plot(values, [index] * len(values), "o", color=color, alpha=0.5)
        left.plot([row["mean"]], [index], "|", color=color, markersize=18)
        epochs = range(1, len(row["gradient_norms"]) + 1)
        right.plot(epochs, row["gradient_norms"], style, color=color,
                   label=row["title"])  # fmt: skip
    left.set_yticks(range(len(rows)), [row["title"] for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.grid(axis="x", color="lightgrey", linewidth=0.6)
    left.set_axisbelow(True)
    split = "validation" if study.variants[0].validated else "test"
    left.set(
        xlabel=f"{split} accuracy, %", title="accuracy of each seed, and their mean"
    )
    right.set(xlabel="epoch", yscale="log", title="norm of the factors' gradient")
    right.legend(fontsize=7)
    figure.suptitle(f"{heading(study)}\n{plotting.label(setup)}", fontsize=10)
    plotting.save(figure, path)
