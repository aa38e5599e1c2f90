r"""Says what sketched gradients cost, over the tasks of several ablations.

    python -m experiments.ablate --studies sketches --out runs/sketches/dsprites
    python -m experiments.ablate --studies sketches --run.task FOLDER \
        --run.model dinov2_saliency --run.image_size 84 --out runs/sketches/birds
    python -m experiments.polyp --methods snella --snella.sketch 4 \
        --out runs/sketches/polyps_4_seed0
    python -m experiments.studies.sketches --runs runs/sketches/*

compares every row of the study with the exact one of the same task and seed: the mean
difference of test accuracies (of masks: of Dice coefficients) and its 95% interval
(Student's t), the rank correlation (Spearman) of the last budgets, that of the last
scores, and how much higher these are, as they grow with the gradient's noise. A run on
masks or texts is one cell; its settings say of which row. Beside the correlations stand
those of exact runs that differ in their seeds. A row is advised if there are six pairs,
its interval lies above -1 point and its budgets correlate no less than those. Writes
`report.md` and `report.json` into `--out`.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
from scipy import stats

from experiments import files, terminal
from experiments.paths import Given, check_out
from experiments.reports.text import markdown_tables, number, printed_tables
from experiments.studies.ablations import SNELLA, STUDIES, Variant
from experiments.studies.table_store import FILE
from experiments.training import metric_log

PROGRAM = "python -m experiments.studies.sketches"
STUDY = STUDIES["sketches"]
LEAST = -1.0  # points, below which the interval of an advised row may not reach
PAIRS = 6  # of a task and a seed, the fewest that advise a row
Results = dict[tuple[str, str], dict[str, Any]]  # of a row, by task and seed
HEADER = (
    *("", "pairs", "accuracy, %", "difference", "95% interval", "train loss"),
    *("budgets", "scores", "score ratio", "advised"),
)
CAPTION = (
    "Difference: mean over pairs of a task and a seed of the row's test accuracy less "
    "the exact one's, in points. Budgets, scores: Spearman's rank correlation over the "
    "matrices at the end of training with the exact run of the same seed, mean over "
    "pairs; of the first row that of exact runs with different seeds. Score ratio: the "
    "median matrix's score over that of the exact run, geometric mean over pairs. The "
    "seeds of a task share its test images, so where tasks differ the interval is "
    "too narrow for other tasks and too wide for these. Advised: of "
    f"{PAIRS} pairs or more, the interval lies above -1 point and the budgets "
    "correlate no less than in the first row."
)


@dataclasses.dataclass(frozen=True)
class SketchesConfig:
    """Options of `python -m experiments.studies.sketches`."""

    runs: tuple[Given, ...]
    """Folders of `experiments.ablate`, each of a task, or of runs with snella."""
    out: Given = Path("runs/sketches_report")
    """Folder to write report.md and report.json into."""


def main(argv: Sequence[str] | None = None) -> None:
    """Compares, prints, and writes the report."""
    config = tyro.cli(SketchesConfig, prog=PROGRAM, args=argv, description=__doc__)
    console = terminal.console()
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        found = _found(config.runs)
        rows = compared(found)
    tasks = {task for results in found.values() for task, _ in results}
    title = f"Sketched gradients; tasks: {len(tasks)}"
    tables = [(title, list(HEADER), [_cells(row) for row in rows])]
    console.print(printed_tables(tables, CAPTION))
    config.out.mkdir(parents=True, exist_ok=True)
    files.write(config.out / "report.json", rows, indent=1)
    files.replace(config.out / "report.md", markdown_tables(tables, CAPTION))


def _found(folders: Iterable[Path]) -> dict[str, Results]:
    """Returns the finished runs of each row.

    Raises:
      ValueError: a folder has neither an ablation nor a run of a row; no run of a task
        is exact; a run is older than budgets in results; two are of one cell.
    """
    found: dict[str, Results] = {variant.name: {} for variant in STUDY.variants}
    for folder in folders:
        cells = _of_run(folder) if _is_run(folder) else _of_ablation(folder)
        for (name, task, seed), result in cells.items():
            own = found[name].setdefault((task, seed), result)
            if own is not result:
                raise ValueError(f"{folder}: {name}, {task}, {seed} was given before.")
    exact = {task for task, _ in found[SNELLA.name]}
    if lacking := {task for own in found.values() for task, _ in own} - exact:
        raise ValueError(
            f"{sorted(lacking)} has no exact run: expected one to compare."
        )
    return found


def _is_run(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def _of_ablation(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Returns the results of an ablation by name of the row, task and seed."""
    tasks = (files.read(folder / FILE) or {}).get("rows", {})
    runs = {
        (variant.name, task, seed): result
        for task, rows in tasks.items()
        for variant in STUDY.variants
        for seed, result in rows.get(variant.name, {}).get("seeds", {}).items()
    }
    if not runs or not all(run.get("budgets") for run in runs.values()):
        raise ValueError(
            f"{folder} has no run of a row, or one without budgets: expected a new "
            "folder of python -m experiments.ablate --studies sketches, or of a run."
        )
    return runs


def _of_run(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Returns the result of a run's SNELLA by name of the row, task and seed."""
    summary, config = (files.read(folder / f"{n}.json") for n in ("summary", "config"))
    sketch, activation = config["snella"].get("sketch", 1), config["activation"]
    row = Variant(
        "",
        {"sketch": sketch} if sketch > 1 else {},
        {"activation": "gelu2"} if activation.endswith("2") else {},
    )
    rows = metric_log.of(folder, "snella")
    budgets = metric_log.of_matrices(rows, "budget")
    if row.name not in {variant.name for variant in STUDY.variants} or not budgets:
        raise ValueError(
            f"{folder}: expected a finished snella whose budgets moved, with settings "
            f"of a row of the study; found sketch={sketch}, activation={activation}."
        )
    task = Path(config.get("task") or config["data"]).name
    measure = next(own["name"] for own in summary["metrics"] if own["percent"])
    result = {
        "test_accuracy": summary["methods"]["snella"][f"test_{measure}"],
        "train_loss": rows[-1]["train_loss"],
        "budgets": budgets,
        "scores": metric_log.of_matrices(rows, "importance"),
    }
    return {(row.name, task, str(summary["seed"])): result}


def compared(found: dict[str, Results]) -> list[dict[str, Any]]:
    """Compares each row with the exact one.

    Args:
      found: results by name of the row, as `experiments.ablate.measured` returns them.

    Returns:
      Rows with `title`, `pairs` (their number), `accuracy` (percent), `difference` and
      `error` (half the interval; points, None for fewer than two pairs), `train_loss`,
      `budgets` and `scores` (correlations), `score_ratio` and `advised` (None for fewer
      than six pairs); of the exact row only accuracy, loss and the correlations between
      its seeds.
    """
    exact = found[SNELLA.name]
    between = {
        measure: _mean(
            _correlation(one[measure], other[measure])
            for one, other in _across_seeds(exact)
        )
        for measure in ("budgets", "scores")
    }
    rows = []
    for variant in STUDY.variants:
        own = found[variant.name]
        pairs = [(own[cell], exact[cell]) for cell in sorted(own.keys() & exact.keys())]
        row: dict[str, Any] = {
            "title": variant.title,
            "pairs": len(pairs),
            "accuracy": _mean(100 * r["test_accuracy"] for r, _ in pairs),
            "train_loss": _mean(r["train_loss"] for r, _ in pairs),
        }
        rows.append(row | (between if own is exact else _against(pairs, between)))
    return rows


def _against(
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], between: dict[str, Any]
) -> dict[str, Any]:
    gaps = [100 * (r["test_accuracy"] - e["test_accuracy"]) for r, e in pairs]
    correlations = {
        name: _mean(_correlation(r[name], e[name]) for r, e in pairs)
        for name in between
    }
    difference, error, advised = _mean(gaps), None, None
    if len(gaps) > 1:
        spread = statistics.stdev(gaps) / math.sqrt(len(gaps))
        error = spread * float(stats.t.ppf(0.975, len(gaps) - 1))
    if error is not None and len(gaps) >= PAIRS:
        budgets, seeds = correlations["budgets"], between["budgets"]
        same = budgets is not None and seeds is not None and budgets >= seeds
        advised = statistics.mean(gaps) - error > LEAST and same
    return {
        "difference": difference,
        "error": error,
        "advised": advised,
        "score_ratio": _geometric(_ratio(r["scores"], e["scores"]) for r, e in pairs),
        **correlations,
    }


def _ratio(scores: Sequence[float], exact: Sequence[float]) -> float | None:
    """Returns the median score over that of the exact run; None unless both are > 0."""
    own, other = statistics.median(scores), statistics.median(exact)
    return own / other if own > 0 and other > 0 else None


def _geometric(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if known else None


def _across_seeds(results: Results) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields all pairs of runs that differ in their seeds alone."""
    for one, other in itertools.combinations(sorted(results), 2):
        if one[0] == other[0]:
            yield results[one], results[other]


def _correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Returns Spearman's correlation; None where one of them is constant."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    found: Any = stats.spearmanr(one, other)
    return float(found.statistic)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _cells(row: dict[str, Any]) -> list[str]:
    interval = ""
    if row.get("error") is not None:
        low, high = (row["difference"] + sign * row["error"] for sign in (-1, 1))
        interval = f"{low:+.1f} to {high:+.1f}"
    advised = {True: "yes", False: "no", None: ""}[row.get("advised")]
    return [
        row["title"],
        str(row["pairs"]),
        number(row["accuracy"], ".1f"),
        number(row.get("difference"), "+.1f"),
        interval,
        number(row["train_loss"], ".3f"),
        number(row["budgets"], ".2f"),
        number(row["scores"], ".2f"),
        number(row.get("score_ratio"), ".2f"),
        advised,
    ]


if __name__ == "__main__":
    main()
