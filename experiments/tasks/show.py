"""Draws a contact sheet of a task's training images, as the model sees them.

    python -m experiments.tasks.show --task digits

`--task` is a name from `--list`, or the path of a folder or CSV file. Checks every
image, and writes a PNG of some training images with their labels, after augmentation
and normalisation (undone again for the eye).
"""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from experiments import plotting, terminal
from experiments.data import check, pipeline
from experiments.data.task import Task
from experiments.data.transforms import NORMALISATIONS, Transform
from experiments.paths import Given, shortened
from experiments.plotting import plt
from experiments.tasks import catalogue


@dataclasses.dataclass(frozen=True)
class ShowConfig:
    """Options of `python -m experiments.tasks.show`."""

    task: str = ""
    """Name of a task, or path of a folder or CSV file."""
    list: bool = False
    """Print all tasks with their licences, and nothing else."""
    data_dir: Path = catalogue.DATA_DIR
    """Folder with TFDS's prepared sets and unpacked archives."""
    size: int = 224
    """Height and width of an image in pixels."""
    crop: Literal["resize", "centre", "random"] = "resize"
    """VTAB resizes; FGVC crops at random (training) or the centre (evaluation)."""
    normalise: Literal["imagenet", "inception", "none"] = "imagenet"
    """Mean and standard deviation of the pixels."""
    images: int = 32
    """Number of images."""
    seed: int = 0
    """Seed of the order and the augmentation."""
    check: bool = True
    """Decode every image of every split first."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded, and count them."""
    out: Given | None = None
    """PNG to write. Default: runs/show/TASK.png."""


def main(argv: list[str] | None = None) -> Path | None:
    """Writes the sheet and returns its path; None after `--list`."""
    program, console = "python -m experiments.tasks.show", terminal.console()
    config = tyro.cli(ShowConfig, prog=program, args=argv, description=__doc__)
    if config.list:
        console.print(catalogue.listing())
        return None
    with terminal.exit_on_error(program):
        if not config.task:
            raise ValueError("--task is missing; --list prints what there is.")
        if config.images < 1:
            raise ValueError(f"images={config.images}: expected at least 1.")
        task = catalogue.load(config.task, config.data_dir)
        if config.check:
            task = check.checked(task, console, config.skip_corrupt)
        else:
            check.tell(task, console)
        mean, std = NORMALISATIONS[config.normalise]
        transform = Transform((config.size, config.size), config.crop, mean, std)
        path = (
            config.out
            or Path("runs/show") / f"{shortened(Path(config.task).stem, 240)}.png"
        )
        sheet(path, task, transform, config.images, config.seed)
    sizes = [len(s) for s in (task.train, task.validation, task.test)]
    console.print(
        f"{task.name}: {task.classes} classes; {sizes[0]} to train, {sizes[1]} to "
        f"validate, {sizes[2]} to test"
    )
    console.print(f"The sheet is {path}", soft_wrap=True)
    return path


def sheet(path: Path, task: Task, transform: Transform, images: int, seed: int) -> None:
    """Writes the first batch of a training stream as a picture."""
    count = min(images, len(task.train))
    stream = pipeline.training(task.train, transform, batch=count, epochs=1, seed=seed)
    batch = next(iter(stream))
    pixels = transform.unnormalised(batch["image"])
    columns = min(8, count)
    rows = -(-count // columns)
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(1.5 * columns, 1.8 * rows + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for axes in panels.flat:
        axes.axis("off")
    for axes, image, label in zip(panels.flat, pixels, batch["label"], strict=False):
        axes.imshow(np.squeeze(image), cmap="gray", vmin=0, vmax=255)
        title = task.names[label] if task.names else str(label)
        axes.set_title(plotting.label(title), fontsize=8)
    title = f"{task.name}, training images ({transform.crop})"
    figure.suptitle(plotting.label(title))
    plotting.save(figure, path, dpi=100)


if __name__ == "__main__":
    main()
