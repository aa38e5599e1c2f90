r"""Draws where models look before and after tuning: Grad-CAM, the paper's Figure 15.

    python -m experiments.compare --tasks tuxpaint --methods linear lora snella \
        --controls --rates experiments/results/comparison/results.json \
        --keep_models --out runs/tuxpaint
    python -m experiments.studies.grad_cam --runs runs/tuxpaint --out runs/grad_cam

The model before tuning gets the head of the comparison's linear probe. The heat is that
of each test image's own class. Where a task's images have masks, the share of the heat
inside the mask is measured on all test images, as a mean with its 95% interval over
images (and seeds, where there are several): the model before tuning beside the tuned
ones, and their differences image by image. Writes `grad_cam.json` and for each task
`TASK.png` into `--out`: the first test images of the classes in turn, and the heat of
the first seed's models.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Float, UInt8
from PIL import Image
from rich.table import Table
from sklearn.linear_model import LogisticRegression

from experiments import hardware, plotting, terminal
from experiments.data.source import labels_of
from experiments.methods.registry import LINEAR
from experiments.paths import Given, check_out, shortened, stem
from experiments.plotting import plt
from experiments.reports import result_files
from experiments.studies import heat, paired
from experiments.studies.cells import Cell
from experiments.studies.tuned import BEFORE, Tuned, TunedOptions, accuracies, mesh
from experiments.training import evaluation

PROGRAM = "python -m experiments.studies.grad_cam"
SIDE = 112  # pixels of a picture in the sheet
Heats = dict[str, dict[int, np.ndarray]]  # by label and seed


@dataclasses.dataclass(frozen=True)
class GradCamConfig(TunedOptions):
    """Options of `python -m experiments.studies.grad_cam`."""

    runs: tuple[Given, ...]
    """Folders of `experiments.compare --keep_models`, with the linear probe."""
    block: int = -1
    """Block whose first norm gives the features, from 1; -1 is the last."""
    examples: int = 10
    """Test images in the sheet of a task."""
    out: Given = Path("runs/grad_cam")
    """Folder to write grad_cam.json and TASK.png into."""

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail later."""
        if self.examples < 1:
            raise ValueError(f"examples={self.examples}: expected at least 1.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, draws, and returns the content of `grad_cam.json`."""
    config = tyro.cli(GradCamConfig, prog=PROGRAM, args=argv, description=__doc__)
    console, rows = terminal.console(), []
    with terminal.exit_on_error(PROGRAM):
        config.check()
        check_out(config.out)
        for found, models in config.by_task(console):
            probe = _probe(found, models[0])
            with console.status(probe.cell.task):
                heats = _heats(probe, models, config.block)
            rows.append(_measured(probe, models, heats))
            name = shortened(stem(probe.cell.task), 240)
            _draw(config.out / f"{name}.png", probe, heats, config.examples)
    result = {"block": config.block, "device": hardware.describe(),
              "jax": jax.__version__, "tasks": rows}  # fmt: skip
    result_files.write(config.out, "grad_cam", result, console, table=_table(rows))
    return result


def _probe(found: Sequence[Cell], tuned: Tuned) -> Tuned:
    """Returns a task's linear probe, with the data and the base of a tuned model.

    Raises:
      ValueError: there is none, or images were cropped.
    """
    probes = [cell for cell in found if cell.row.method == LINEAR]
    if not probes:
        raise ValueError(
            f"{tuned.cell.task} has no linear probe, whose head the model before "
            "tuning gets: add linear to the comparison's --methods."
        )
    if tuned.transform.crop != "resize":
        raise ValueError(
            f"{tuned.cell.folder} crops its images: expected --run.crop resize, so "
            "that masks lie on what the model sees."
        )
    return dataclasses.replace(tuned, cell=probes[0])


def _heats(probe: Tuned, models: Sequence[Tuned], block: int) -> Heats:
    """Returns the heat of all test images, of every model."""
    seeds = sorted({own.cell.seed for own in models})
    index = heat.block_of(probe.base, block)

    def of(model: Any) -> np.ndarray:
        where = probe.task.test, probe.transform, mesh(), index
        return heat.of_source(model, *where)

    heats: Heats = {BEFORE: dict.fromkeys(seeds, of(probed(probe)))}
    for own in models:
        heats.setdefault(own.cell.label, {})[own.cell.seed] = of(own.model())
    return heats


def probed(probe: Tuned) -> Any:
    """Returns the model before tuning, with the linear probe's head.

    Args:
      probe: the probe's cell, with the config of a run beside it: what both were
        trained on is the same.
    """
    config, task = probe.config, probe.task
    source = task.full if config.trains_on_all else task.train
    seen = evaluation.features(probe.base, source, probe.transform, mesh())
    strength = probe.cell.result["settings"]["strength"]
    fitted: Any = LogisticRegression(C=strength, max_iter=10_000).fit(*seen)
    kernel, bias = fitted.coef_.T, fitted.intercept_
    if len(fitted.classes_) == 2:  # scikit-learn has one logit, the second class's
        kernel, bias = (np.concatenate([-x, x], -1) / 2 for x in (kernel, bias))
    model = nnx.clone(probe.base)
    seen = fitted.classes_  # no other is ever predicted
    model.head.kernel[...] = jnp.zeros_like(model.head.kernel).at[:, seen].set(kernel)
    model.head.bias[...] = jnp.full_like(model.head.bias, -jnp.inf).at[seen].set(bias)
    return model


def _measured(probe: Tuned, models: Sequence[Tuned], heats: Heats) -> dict[str, Any]:
    """Returns what a task's models look at, for JSON.

    An image without heat under one of the models is left out, for all of them alike.
    """
    test = probe.task.test
    found: dict[str, Any] = {
        "task": probe.cell.task,
        **probe.setup,
        "test_images": len(test),
        "accuracy": accuracies([probe.cell, *(own.cell for own in models)]),
    }
    if "mask" not in test[0]:
        return found
    grid = next(iter(heats[BEFORE].values())).shape[1:]
    masks = (test[index]["mask"] for index in range(len(test)))
    cover = np.stack([heat.covered(mask, grid) for mask in masks])
    shares = {
        label: {seed: heat.inside(own, cover) for seed, own in by_seed.items()}
        for label, by_seed in heats.items()
    }
    every = [own for by_seed in shares.values() for own in by_seed.values()]
    whole = np.isfinite(every).all(0)
    return found | {
        "without_heat": int((~whole).sum()),
        "mask": paired.mean(cover.mean((1, 2))[None, whole]).as_dict(),
        **compared({
            label: {seed: own[whole] for seed, own in by_seed.items()}
            for label, by_seed in shares.items()
        }),
    }  # fmt: skip


def compared(
    shares: Mapping[str, Mapping[int, Float[np.ndarray, " N"]]],
) -> dict[str, Any]:
    """Returns the mean share of each model, and the differences of pairs, in percent.

    Args:
      shares: of the heat inside the mask, by label, seed and image.
    """
    means = {
        label: paired.mean(np.stack(list(own.values()))).as_dict()
        for label, own in shares.items()
    }
    pairs = [
        {"model": one, "other": other, **gap.as_dict()}
        for one, other in paired.pairs(list(shares))
        if (gap := paired.difference(shares[one], shares[other])) is not None
    ]
    return {"inside": means, "differences": pairs}


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns the table of all tasks; without masks there are accuracies alone."""
    table = Table(
        title="Grad-CAM: heat inside the mask, % (95% interval)",
        caption="difference: paired by image, from the model before tuning",
    )
    for name in ("task", "model", "test accuracy", "inside", "difference"):
        table.add_column(name)
    for row in rows:
        gaps = {
            gap["model"]: gap
            for gap in row.get("differences", ())
            if gap["other"] == BEFORE
        }
        for label, accuracy in row["accuracy"].items():
            told = row.get("inside", {}).get(label), gaps.get(label)
            found = f"{100 * accuracy:.1f}%"
            table.add_row(row["task"], label, found, *map(_interval, told))
        if "mask" in row:
            table.add_row(row["task"], "the mask itself", "", _interval(row["mask"]))
    return table


def _interval(mean: dict[str, float] | None) -> str:
    if mean is None:
        return ""
    return f"{mean['value']:.1f} ({mean['low']:.1f} to {mean['high']:.1f})"


def in_turn(labels: Sequence[int], count: int) -> list[int]:
    """Returns indices of examples: the first of each class, then the second, ...

    >>> in_turn([0, 0, 0, 1, 2, 2], 5)
    [0, 3, 4, 1, 5]
    """
    seen: dict[int, int] = {}
    order = []
    for index, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        order.append((seen[label], label, index))
    return [index for *_, index in sorted(order)[:count]]


def _draw(path: Path, probe: Tuned, heats: Heats, count: int) -> None:
    """Draws a column for each example: the image, then the heat of each model."""
    task = probe.task
    picked = in_turn(labels_of(task.test).tolist(), count)
    shape = 1 + len(heats), len(picked)
    figure, grid = plt.subplots(
        *shape,
        figsize=(1.25 * shape[1], 1.3 * shape[0]),
        squeeze=False,
        layout="constrained",
    )
    for column, index in zip(grid.T, picked, strict=True):
        example = task.test[index]
        image = _seen(example["image"])
        for axes in column:
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
            if "mask" in example:
                mask = heat.covered(example["mask"], (SIDE, SIDE)) > 0.5
                axes.contour(mask, levels=[0.5], colors="lime", linewidths=0.7)
        name = task.names[example["label"]] if task.names else str(example["label"])
        column[0].set_title(plotting.label(name), fontsize=8)
        for axes, by_seed in zip(column[1:], heats.values(), strict=True):
            own = by_seed[min(by_seed)][index]
            extent = (-0.5, SIDE - 0.5, SIDE - 0.5, -0.5)
            how = {"cmap": "inferno", "alpha": 0.6, "interpolation": "bilinear"}
            axes.imshow(own / max(own.max(), 1e-12), extent=extent, **how)
    for axes, name in zip(grid[:, 0], ["image", *heats], strict=True):
        axes.set_ylabel(name.split(",")[0], fontsize=8)
    plotting.save(figure, path, dpi=80)  # pictures make large PNGs


def _seen(pixels: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "side side 3"]:
    """Returns an image with the square shape that the model sees, to draw."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return np.asarray(picture.convert("RGB").resize((SIDE, SIDE)))


if __name__ == "__main__":
    main()
