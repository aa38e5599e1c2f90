"""Pictures that the toy draws: a sheet of prompts.

    python -m experiments.pretrained.toy_pictures --out toy_sd3.png

The sheet has prompts of the training and, below, new combinations: emoji that were left
out of it, and pairs of an emoji and a place that were.
"""

import dataclasses
import textwrap
from pathlib import Path

import jax
import numpy as np
import tyro

from experiments import plotting, terminal
from experiments.paths import Given
from experiments.plotting import plt
from experiments.pretrained import toy_sd3
from experiments.pretrained.toy_sd3 import GUIDANCE, SIZE
from experiments.tasks.emoji import CREDIT, UNSEEN
from snella_jax.models.sd3 import Pipeline

PROGRAM = "python -m experiments.pretrained.toy_pictures"
TRAINED = (
    "dog face",
    "slice of pizza",
    "red heart",
    "a picture of rocket",
    "smiling face with sunglasses",
    "sunflower",
    "house with garden",
    "france flag",
    "fire engine",
    "a picture of octopus",
    "man astronaut",
    "evergreen tree",
    "woman cook",
    "robot face",
    "large red square",
    "guitar",
)
NEW = (
    *UNSEEN,
    "a dog on a red background",
    "teapot on a purple background",
    "a guitar on the beach",
    "penguin with a city in the background",
    "a frog in the desert",
    "rocket with a house in the background",
    "a boot on a blue background",
    "a red apple and a banana",
)
COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class SheetConfig:
    """Options of `python -m experiments.pretrained.toy_pictures`."""

    out: Given = Path("toy_sd3.png")
    """File for the sheet."""
    weights: Given = toy_sd3.WEIGHTS
    """Weights of the toy."""
    seed: int = 0
    """Seed of the noise."""


def main(argv: list[str] | None = None) -> None:
    """Draws the sheet."""
    config = tyro.cli(SheetConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        pipeline = toy_sd3.load(path=config.weights)
    sheet(pipeline, config.out, config.seed)


def sheet(pipeline: Pipeline, path: Path, seed: int = 0) -> None:
    """Draws a picture for each prompt, those of the training above the new ones."""
    prompts = (*TRAINED, *NEW)
    key = jax.random.key(seed)
    drawn = np.asarray(pipeline(prompts, size=SIZE, guidance=GUIDANCE, key=key))
    rows = len(prompts) // COLUMNS
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(COLUMNS * 1.2, rows * 1.55))
    for at, picture, prompt in zip(axes.flat, drawn, prompts, strict=True):
        at.imshow(picture)
        at.set_title("\n".join(textwrap.wrap(prompt, 20)), fontsize=6)
        at.axis("off")
    figure.suptitle(
        "Drawn by the toy: prompts it was trained on, and below new combinations",
        fontsize=8,
    )
    figure.text(0.5, 0.005, f"Trained on {CREDIT}", fontsize=5, ha="center")
    figure.tight_layout(rect=(0, 0.015, 1, 0.99))
    plotting.save(figure, path)


if __name__ == "__main__":
    main()
