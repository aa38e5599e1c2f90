r"""Draws how models' features separate classes: t-SNE and NMI, the paper's Figure 13.

    python -m experiments.compare --config real_tasks --data DATA --tasks cars-20 \
        --methods linear lora snell snella --keep_models --out runs/cars
    python -m experiments.studies.clusters --runs runs/cars --out runs/clusters

The features are what the head sees of the test images, before tuning and after. k-means
divides them into as many clusters as there are classes, and the normalised mutual
information (NMI) of clusters and classes says how well they agree: 1 if they are the
same. Its mean over `--kmeans` starts and their deviation stand beside `chance`, the
same for classes that are shuffled, which is far from 0 where clusters are small.
Writes `clusters.json` and for each task `TASK.png` into `--out`, the t-SNE of the
first seed's models with a colour for each class.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import tyro
from jaxtyping import Float, Int
from rich.table import Table
from sklearn.cluster import KMeans
from sklearn.manifold import TSNE
from sklearn.metrics import normalized_mutual_info_score

from experiments import hardware, plotting, terminal
from experiments.data.source import labels_of
from experiments.methods.registry import LINEAR
from experiments.paths import Given, check_out, shortened, stem
from experiments.plotting import plt
from experiments.reports import result_files
from experiments.reports.text import MISSING
from experiments.studies.tuned import BEFORE, Tuned, TunedOptions, accuracies, mesh
from experiments.training import evaluation

PROGRAM = "python -m experiments.studies.clusters"


@dataclasses.dataclass(frozen=True)
class ClustersConfig(TunedOptions):
    """Options of `python -m experiments.studies.clusters`."""

    methods: tuple[str, ...] = ("lora", "snell", "snella")
    """Methods whose models are measured; only those that merge into the base are kept.
    """
    kmeans: int = 20
    """Random starts of k-means, each with an NMI of its own."""
    perplexity: float = 30.0
    """Number of neighbours that t-SNE keeps together, about."""
    out: Given = Path("runs/clusters")
    """Folder to write clusters.json and TASK.png into."""

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail later."""
        if self.kmeans < 1 or self.perplexity <= 0:
            raise ValueError(
                f"kmeans={self.kmeans}, perplexity={self.perplexity}: expected at "
                "least 1, and a positive number."
            )

    def check_size(self, task: str, images: int) -> None:
        """Raises a `ValueError` where a task is too small for t-SNE."""
        if images <= self.perplexity:
            raise ValueError(
                f"perplexity={self.perplexity}: expected less than the {images} test "
                f"images of {task}."
            )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, draws, and returns the content of `clusters.json`."""
    config = tyro.cli(ClustersConfig, prog=PROGRAM, args=argv, description=__doc__)
    console, rows = terminal.console(), []
    with terminal.exit_on_error(PROGRAM):
        config.check()
        check_out(config.out)
        for found, models in config.by_task(console):
            task, classes = models[0].cell.task, labels_of(models[0].task.test)
            config.check_size(task, len(classes))
            with console.status(task):
                seen = _features(models)
                own = [cell for cell in found if cell.row.method == LINEAR]
                own += [model.cell for model in models]
                row = {"task": task, **models[0].setup}
                row |= _measured(seen, classes, config.kmeans)
                rows.append(row | {"accuracy": accuracies(own)})
                path = config.out / f"{shortened(stem(task), 240)}.png"
                _draw(path, seen, classes, rows[-1], config.perplexity)
    result = {"device": hardware.describe(), "scikit-learn": sklearn.__version__,
              "tasks": rows}  # fmt: skip
    result_files.write(config.out, "clusters", result, console, table=_table(rows))
    return result


def _features(models: Sequence[Tuned]) -> dict[str, dict[int, np.ndarray]]:
    """Returns what heads see of the test images, by label and seed."""

    def of(model: Any, own: Tuned) -> np.ndarray:
        where = own.task.test, own.transform, mesh()
        return evaluation.features(model, *where)[0]

    first = models[0]
    seen = {BEFORE: {first.cell.seed: of(first.base, first)}}
    for own in models:
        seen.setdefault(own.cell.label, {})[own.cell.seed] = of(own.model(), own)
    return seen


def nmi(
    features: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    starts: int,
) -> tuple[list[float], list[float]]:
    """Returns the NMI of clusters with classes from each start, and with shuffled ones.

    Args:
      features: one row an example.
      labels: the classes, as many as there are to be clusters.
      starts: number of random starts of k-means.
    """
    tries: Any = {"n_clusters": len(np.unique(labels)), "n_init": 10}
    found, chance = [], []
    for start in range(starts):
        fitted = KMeans(**tries, random_state=start).fit_predict(features)
        shuffled = np.random.default_rng(start).permutation(labels)
        found.append(float(normalized_mutual_info_score(labels, fitted)))
        chance.append(float(normalized_mutual_info_score(shuffled, fitted)))
    return found, chance


def _measured(
    seen: dict[str, dict[int, np.ndarray]], labels: np.ndarray, starts: int
) -> dict[str, Any]:
    """Returns the NMI of a task's models, for JSON."""
    rows = {}
    for label, by_seed in seen.items():
        every = [nmi(own, labels, starts) for own in by_seed.values()]
        found, chance = (list(own) for own in zip(*every, strict=True))
        rows[label] = {"nmi": found, "chance": float(np.mean(chance))}
    classes = len(np.unique(labels))
    return {"test_images": len(labels), "classes": classes, "models": rows}


def told(row: dict[str, Any]) -> str:
    """Returns a model's NMI: its mean, and the deviation over k-means' starts.

    >>> told({"nmi": [[0.5, 0.7]]}), told({"nmi": [[0.5, 0.5], [0.7, 0.7]]})
    ('0.600 ± 0.141', '0.600 ± 0.000')
    """
    values = np.asarray(row["nmi"])
    starts = values.shape[1]
    spread = values.std(1, ddof=min(1, starts - 1)).mean()
    return f"{values.mean():.3f} ± {spread:.3f}"


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        title="NMI of k-means with the classes, test images",
        caption="mean, and deviation over k-means' starts; chance: shuffled classes",
    )
    for name in ("task", "model", "seeds", "test accuracy", "NMI", "chance"):
        table.add_column(name)
    for task in rows:
        for label, row in task["models"].items():
            right, chance = task["accuracy"].get(label), f"{row['chance']:.3f}"
            accuracy = MISSING if right is None else f"{100 * right:.1f}%"
            seeds = str(len(row["nmi"]))
            table.add_row(task["task"], label, seeds, accuracy, told(row), chance)
    return table


def _draw(
    path: Path,
    seen: dict[str, dict[int, np.ndarray]],
    labels: np.ndarray,
    measured: dict[str, Any],
    perplexity: float,
) -> None:
    """Draws a panel for each model: a dot for each test image."""
    figure, panels = plt.subplots(
        1,
        len(seen),
        figsize=(3.3 * len(seen), 3.7),
        squeeze=False,
        layout="constrained",
    )
    for axes, (label, by_seed), row in zip(
        panels[0], seen.items(), measured["models"].values(), strict=True
    ):
        features = by_seed[min(by_seed)]
        flat = TSNE(perplexity=perplexity, random_state=0).fit_transform(features)
        axes.scatter(*flat.T, c=labels, cmap="tab20", s=10)
        axes.set(xticks=[], yticks=[], title=f"{label}\nNMI {told(row)}")
        axes.title.set_fontsize(9)
    figure.suptitle(
        f"{plotting.label(measured['task'])}: t-SNE of {measured['test_images']} test "
        f"images of {measured['classes']} classes",
        fontsize=10,
    )
    plotting.save(figure, path)


if __name__ == "__main__":
    main()
