"""Figures of a run on masks: a sheet of cases as in the paper's Figure 8, and Dice.

The Dice of every image is also written down, for statistics over several runs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import files, plotting
from experiments.data.source import Source
from experiments.methods import registry
from experiments.plotting import plt
from experiments.reports import predicted
from experiments.reports.predicted import Masks
from experiments.training.segmentation import dice_and_iou

CASES, WORST = 6, 2
SIDE = 1.6  # inches of a picture
DICE = "dice.json"
Scores = Float[np.ndarray, " N"]  # Dice of the images of a set


def draw(
    out: Path, sets: Mapping[str, tuple[str, Source]], methods: Sequence[str]
) -> None:
    """Draws the figures of a run folder, of what it holds of the methods' predictions.

    `figures/sheet.png` is of the first set, `figures/sheet_SET.png` of another, and
    `figures/dice.png` of all of them; `dice.json` has the Dice of every image, in
    [0, 1], by set and method. Methods whose predictions are lost are left out
    (of several processes each has only some of them).

    Args:
      out: the run folder.
      sets: title and images of every set, by name.
      methods: names of the methods, in the figures' order.
    """
    every: dict[str, dict[str, Scores]] = {}
    written: dict[str, dict[str, list[float]]] = {}
    for number, (name, (title, source)) in enumerate(sets.items()):
        truths = [source[index]["mask"] > 0 for index in range(len(source))]
        found = {}
        for method in methods:  # of which one alone is in memory
            masks = predicted.read(out, method, name)
            if masks is not None and len(masks) == len(truths):
                pairs = ((masks[index], truth) for index, truth in enumerate(truths))
                found[method] = np.array([dice_and_iou(*pair)[0] for pair in pairs])
        if not found:
            continue
        chosen = cases(np.mean([*found.values()], 0))
        shown = {}
        for method, own in found.items():
            masks = predicted.read(out, method, name) or {}
            picked = {index: masks[index] for index in chosen}
            shown[registry.title(method)] = picked, own
        file = "sheet.png" if number == 0 else f"sheet_{name}.png"
        sheet(out / "figures" / file, title, source, chosen, shown)
        every[title] = {registry.title(method): own for method, own in found.items()}
        written[name] = {method: own.round(5).tolist() for method, own in found.items()}
    if every:
        files.replace(out / DICE, json.dumps(written) + "\n")
        dice(out / "figures" / "dice.png", every)


def cases(found: Scores) -> list[int]:
    """Returns images for a sheet: those with the least Dice, and others.

    The others are as far apart in the order as can be, the best one the last.

    >>> cases(np.array([0.9, 0.1, 0.8, 0.7, 0.2, 0.6, 0.5, 0.4]))
    [1, 4, 7, 5, 3, 0]
    """
    order = np.argsort(found, kind="stable")
    worst, rest = order[:WORST], order[WORST:]
    others = np.linspace(0, len(rest) - 1, min(CASES - WORST, len(rest)))
    return [*worst.tolist(), *rest[others.round().astype(int)].tolist()]


def sheet(
    path: Path,
    title: str,
    source: Source,
    chosen: Sequence[int],
    methods: Mapping[str, tuple[Masks, Scores]],
) -> None:
    """Draws image, truth and the methods' masks side by side, a row for each case.

    The contour is that of the true mask.

    Args:
      path: the PNG to write.
      title: name of the set.
      source: its images.
      chosen: indices of the cases.
      methods: the cases' masks, and the Dice of all images, by the methods' titles.
    """
    columns = ["image", "truth", *methods]
    figure, grid = plt.subplots(
        len(chosen),
        len(columns),
        figsize=(SIDE * len(columns), SIDE * len(chosen) + 0.9),
        squeeze=False,
        layout="constrained",
    )
    for line, index in zip(grid, chosen, strict=True):
        example: Any = source[index]
        image, truth = example["image"], example["mask"] > 0
        for axes in line:
            axes.axis("off")
        line[0].imshow(image)
        line[0].set_title(plotting.label(example["name"])[:18], fontsize=6)
        plotting.overlay(line[1], image, truth, truth)
        for axes, (masks, own) in zip(line[2:], methods.values(), strict=True):
            plotting.overlay(axes, image, masks[index], truth)
            axes.set_title(f"{100 * own[index]:.1f}", fontsize=8)
    for axes, name in zip(grid[0], columns, strict=True):
        score = axes.get_title()
        axes.set_title(f"{plotting.label(name)}\n{score}", fontsize=8)
    figure.suptitle(
        f"{plotting.label(title)}: Dice, %\nthe two worst by mean,\n"
        "others to the best\nblue: mask, yellow: truth",
        fontsize=8,
    )
    plotting.save(figure, path)


def dice(path: Path, sets: Mapping[str, Mapping[str, Scores]]) -> None:
    """Draws the Dice of all images by every method: quartiles, 5% to 95%, and the mean.

    Args:
      path: the PNG to write.
      sets: Dice of every image, by the title of the set and of the method.
    """
    most = max(len(own) for own in sets.values())
    figure, row = plt.subplots(
        1,
        len(sets),
        figsize=(1.5 + 3.6 * len(sets), 1.4 + 0.36 * most),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for axes, (title, methods) in zip(row[0], sets.items(), strict=True):
        labels = [
            f"{plotting.label(name)}  {100 * own.mean():.1f}"
            for name, own in methods.items()
        ]
        axes.boxplot(
            [100 * own for own in methods.values()],
            orientation="horizontal",
            whis=(5, 95),
            showmeans=True,
            tick_labels=labels,
            widths=0.6,
            flierprops={"markersize": 2},
            meanprops={"marker": "D", "markersize": 4},
        )
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(plotting.label(title), fontsize=9)
        axes.set_xlabel("Dice of an image, % (diamond: mean)")
    plotting.save(figure, path)
