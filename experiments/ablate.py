"""Runs the ablations: SNELLA with one setting changed at a time.

    python -m experiments.ablate --out runs/ablations

A study is a table of the paper or a question of our own: kernels, sparsity, importance,
budgets, schedules, masks, beta, allocation, gates, rank, sketches, means. The base's
learning rate is searched on validation (the lowest within a standard error of the
best), and so is that of every variant with another kernel, gate, path, precision, start
or means; the others share the base's. Then each variant is trained on training and
validation images, once for each seed, and tested once. A study that a choice is made
from, `centred`, never sees the test: its rates have the lowest validation loss, and its
seeds train on training images alone and are judged on validation. `results.json` in
`--out` keeps every finished search and seed: the same command goes on with the others,
also on another machine with only that file. Several processes may work in one folder
(`--cluster local --workers 4` starts four). Writes `report.md`, `report.json` and a
picture of each study with all finished seeds.

The default task and model are real and small (the quickstart's ViT on dSprites'
location, a minute a run); `--run.model dinov2_saliency --run.image_size 56` takes a
larger model.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from rich.console import Console

from experiments import files, paths, terminal
from experiments.config import command_line, run_config
from experiments.config.images import ImageConfig
from experiments.data.source import Source, labels_of
from experiments.methods.masked import MaskedSnella
from experiments.methods.snella import Snella
from experiments.paths import Given
from experiments.pretrained import base_models
from experiments.reports import finished
from experiments.runs import cluster, folder, images, search
from experiments.runs.images import ImageRun
from experiments.runs.run import begin
from experiments.runs.train_method import tune
from experiments.studies import ablation_report, table_store
from experiments.studies.ablations import BASE, SNELLA, STUDIES, Variant
from experiments.studies.recorded import Trial, drawn, packed
from experiments.training import evaluation, metric_log
from experiments.training.classification import Classification
from experiments.training.grid import Grid
from snella_jax.nnx.targets import select

PROGRAM = "python -m experiments.ablate"
SUMMARY = """\
Changes SNELLA a setting at a time: a table and a picture for each study.
--run.X: settings that all runs share. The same command goes on where it was."""
VAL = "val_accuracy"
Name = Literal[
    "kernels_sparsity",
    "kernels",
    "sparsification",
    "importance",
    "budget",
    "schedule",
    "masks",
    "beta",
    "allocation",
    "gates",
    "rank",
    "frequency",
    "sketches",
    "centred",
]
RUN = ImageConfig(
    task="dsprites_loc_rerendered",
    protocol="final",
    epochs=30,
    warmup_epochs=3,
    test_images=4000,
    grid=Grid(lr_factors=(0.3, 3.0), weight_decays=(), densities=()),
    settings={"snella": Snella(lr=1e-2), "snella_masked": MaskedSnella(lr=1e-2)},
    source="python -m experiments.ablate",
)


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Options of `python -m experiments.ablate`."""

    own: ClassVar[tuple[str, ...]] = (
        *("methods", "seed", "protocol", "search", "out", "dtype"),
    )

    studies: tuple[Name, ...] = tuple(STUDIES)  # pyright: ignore[reportAssignmentType]
    """Studies to run, in this order."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the factors and the order. (Searches have seed 0.)"""
    search_epochs: int = 10
    """Epochs of a trial of the search; with run.steps it has that many steps."""
    run: ImageConfig = RUN
    """Config that all variants share; `run.snella` is the base, of which only the rate
    and the weight decay may be set."""
    table_only: bool = False
    """Run nothing; write the tables of finished runs."""
    out: Given = Path("runs/ablations")
    """Folder to write results.json, the tables, the pictures and the runs into."""

    @property
    def variants(self) -> list[Variant]:
        """Variants of the studies, each once; first the base, if its rate is needed."""
        rows = [own for study in self.studies for own in STUDIES[study].variants]
        base = [] if all(own.searched for own in rows) else [SNELLA]
        named: dict[str, Variant] = {}
        for variant in (*base, *rows):
            named.setdefault(variant.name, variant)
        return list(named.values())

    def adapted(self) -> tuple[str, ...]:
        """Returns the methods that variants change."""
        return ("snella", "snella_masked")

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail later."""
        if not self.studies or not self.seeds:
            raise ValueError("expected at least one study and one seed.")
        steps, warmup = self.run.steps, self.run.warmup_epochs
        if steps is None and self.search_epochs <= warmup:
            raise ValueError(
                f"search_epochs={self.search_epochs}: expected more than the "
                f"{warmup} of the warm-up."
            )
        for name in self.own:
            if getattr(self.run, name) != getattr(RUN, name):
                raise ValueError(f"run.{name}: the ablation sets it by itself.")
        for method in self.adapted():
            own, usual = self.run.settings[method], RUN.settings[method]
            if own != dataclasses.replace(
                usual, lr=own.lr, weight_decay=own.weight_decay
            ):
                raise ValueError(
                    f"run.{method}: expected its lr and weight_decay alone to differ "
                    "from the default, or rows would not be what they are called."
                )
        if self.run.grid.weight_decays or self.run.grid.densities:
            raise ValueError("run.grid: only learning rates are searched.")
        trial = dataclasses.replace(self.run, epochs=self.search_epochs, search=True)
        for variant, run in itertools.product(self.variants, (self.run, trial)):
            variant.config(run, 0).check()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is left, and writes the tables."""
    workers, words = command_line.spread(PROGRAM, argv)
    config = command_line.parse_study(PROGRAM, Ablation(), words, SUMMARY)
    console = terminal.console()
    with terminal.exit_on_error(PROGRAM):
        cluster.prepare(workers)
        config.check()
        paths.check_out(config.out)
        if not config.table_only:
            if lacking := images.missing(config.run):
                raise ValueError(lacking)
            select(base_models.load(config.run, classes=2), config.run.targets)
        fields = run_config.as_dict(config.run)
        shared = {k: v for k, v in fields.items() if k not in finished.IRRELEVANT}
        shared["search_epochs"] = config.search_epochs
        store = table_store.Store(config.out, shared, run_config.as_dict(RUN))
    left = {}
    for variant in () if config.table_only else config.variants:
        name = config.run.task, variant.name
        do = functools.partial(_tried, variant, config, store, console)
        left[store.cell(*name)] = table_store.Part(name, config.seeds, do)
    failed = cluster.done(
        workers, table_store.work(PROGRAM, words, store, left), console
    )
    with store.locked():
        ablation_report.write(store, config.run.task, config.out, console)
    if failed:
        raise SystemExit("\n".join(failed))


def _tried(
    variant: Variant, config: Ablation, store: table_store.Store, console: Console
) -> str | None:
    """Completes a row; returns what failed."""

    def choose(place: Path) -> table_store.Done:
        if variant.searched:
            return _searched(variant, config, store, place, console)
        return {"chosen": _base_choice(config, store, console)}

    def train(out: Path, seed: int, chosen: table_store.Done) -> table_store.Done:
        own = dataclasses.replace(variant.config(config.run, seed, **chosen), out=out)
        kind = Trial if variant.validated else ImageRun
        prepared = images.prepared(config.run.task, own, console, kind)
        store.begin(drawn(config.run.task, own), prepared.inputs, console)
        with folder.held(out, resume=True):
            begin(prepared)
            return measured(variant.method, prepared)

    cell = config.run.task, variant.name
    return table_store.attempt(
        PROGRAM, store, cell, config.seeds, choose, train, console
    )


def _base_choice(
    config: Ablation, store: table_store.Store, console: Console
) -> dict[str, float]:
    """Returns the base's rate; waits for a process that is searching it."""
    do = functools.partial(_tried, SNELLA, config, store, console)
    chosen = table_store.awaited(store, (config.run.task, BASE), ("chosen",), do)
    return {"lr": chosen["lr"]}


def _searched(
    variant: Variant,
    config: Ablation,
    store: table_store.Store,
    place: Path,
    console: Console,
) -> table_store.Done:
    """Searches; returns the trials of a variant and the rate that follows."""
    console.rule(f"{variant.name}, search")
    lr = variant.centre * config.run.settings[variant.method].lr
    own = variant.config(config.run, config.run.seed, lr=lr)
    own = dataclasses.replace(own, epochs=config.search_epochs, out=place)
    kind = Trial if variant.validated else ImageRun
    prepared = images.prepared(config.run.task, own, console, kind)
    store.begin(drawn(config.run.task, own), prepared.inputs, console)
    rate = search.chosen(variant.method, prepared).settings[variant.method].lr
    trials = files.read(place / search.FILE)[variant.method]
    if not variant.validated:
        rate = cautious(trials, len(prepared.task.validation))
    return {"trials": trials, "chosen": {"lr": rate}}


def cautious(trials: Sequence[dict[str, Any]], images: int) -> float:
    """Returns the lowest rate within a standard error of the best on so many images.

    Above the best rate training soon diverges, and near it variants differ by that.

    >>> trials = [{"lr": 3e-2, VAL: 0.75}, {"lr": 1e-2, VAL: 0.73}]
    >>> cautious(trials, images=200), cautious(trials, images=20_000)
    (0.01, 0.03)
    """
    found = {t["lr"]: t[VAL] for t in trials if t[VAL] is not None}
    best = max(found.values())
    error = (best * (1 - best) / images) ** 0.5
    return min(lr for lr, accuracy in found.items() if accuracy >= best - error)


def measured(
    method: Literal["snella", "snella_masked"], prepared: ImageRun
) -> table_store.Done:
    """Trains a variant and measures it.

    Returns:
      `test_accuracy` (the last epoch's, merged; under the protocol "choose"
      `val_accuracy` and `val_loss` instead), `right` (which of the images are right,
      as `recorded.packed`), `tested` (how many there are), `unmerged_accuracy` (as it
      was trained: in float32 the same), `train_loss` (its mean), `seconds_per_step`,
      `moves` (how often budgets moved), `gradient_norms` (of the epochs), `density`,
      `dead` and `full` (shares of the matrices with less than 0.1% and with all but
      0.1% of their weights moved), `rank` (mean numerical rank of the updates: singular
      values above 1% of the largest), `change` (mean `||delta|| / ||W0||`), `budgets`
      and `scores` (the last of each matrix, in one order), `device` and `versions`.

    Raises:
      MismatchError: rows of the folder's `metrics.jsonl` are lost.
    """
    fitted = tune(method, prepared)
    if lost := metric_log.lacking(fitted.rows, fitted.last_row["epoch"]):
        raise files.MismatchError(
            f"{prepared.out} has lost {lost} of {metric_log.NAME}: delete that folder "
            "for the seed to begin anew."
        )
    merged = prepared.config.settings[method].merged(fitted.model)

    validated = prepared.config.protocol == "choose"
    source = prepared.task.validation if validated else prepared.task.test
    right = unmerged = _right(merged, source, prepared)
    if prepared.config.dtype != "float32":  # where merging rounds
        unmerged = _right(fitted.model, source, prepared)
    return {
        f"{'val' if validated else 'test'}_accuracy": sum(right) / len(right),
        **({"val_loss": fitted.last_row["val_loss"]} if validated else {}),
        "right": packed(right),
        "tested": len(right),
        "unmerged_accuracy": sum(unmerged) / len(unmerged),
        "train_loss": fitted.last_row["train_loss"],
        "seconds_per_step": metric_log.median(fitted.rows, "seconds_per_step"),
        "gradient_norms": [row["gradient_norm"] for row in fitted.rows],
        "moves": sum(row.get("moves", 0) for row in fitted.rows),
        "budgets": metric_log.of_matrices(fitted.rows, "budget"),
        "scores": metric_log.of_matrices(fitted.rows, "importance"),
        **_updates(prepared, merged),
        **folder.environment(prepared.mesh),
    }


def _right(model: Any, source: Source, prepared: ImageRun) -> list[bool]:
    """Returns for every image if a model gets it right."""
    seen: dict[int, int] = {}

    def note(index: int, output: Any) -> None:
        seen[index] = int(output)

    where = source, prepared.data.transform, prepared.mesh, Classification()
    evaluation.evaluate(model, *where, look=note)
    return [seen[i] == label for i, label in enumerate(labels_of(source).tolist())]


def _updates(prepared: ImageRun, merged: Any) -> dict[str, float]:
    """Measures how training changed the targeted kernels."""
    base = select(prepared.base, prepared.config.targets)
    ranks, densities, changes, weights = [], [], [], []
    for path, layer in select(merged, "|".join(base)).items():
        before, after = (np.asarray(x.kernel[...]) for x in (base[path], layer))
        *_, n, m = before.shape
        delta = (after - before).reshape(-1, n, m)
        values = np.linalg.svd(delta, compute_uv=False)
        ranks += (values > 0.01 * values.max(1, keepdims=True)).sum(1).tolist()
        densities += (delta != 0).mean((1, 2)).tolist()
        sizes = np.linalg.norm(delta, axis=(1, 2))
        changes += (
            sizes / np.linalg.norm(before.reshape(-1, n, m), axis=(1, 2))
        ).tolist()
        weights += [n * m] * len(delta)
    moved = np.array(densities)
    return {
        "density": float(np.average(moved, weights=weights)),
        "dead": float((moved < 0.001).mean()),
        "full": float((moved > 0.999).mean()),
        "rank": float(np.mean(ranks)),
        "change": float(np.mean(changes)),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
