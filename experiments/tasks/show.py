"""Draws a contact sheet of a task's training images, as the model sees them.

    python -m experiments.tasks.show digits

The task is a name from `--list`, or the path of a folder or CSV file; images with masks
are recognised. Checks every image, and writes a PNG of some training images with their
labels or their masks, after augmentation and normalisation (undone again for the eye).
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.axes import Axes
from rich.console import Console

from experiments import plotting, terminal
from experiments.data import check, pair_check, pipeline
from experiments.data.mask_transforms import MaskTransform
from experiments.data.source import Source
from experiments.data.task import Splits
from experiments.data.transforms import NORMALISATIONS, Transform
from experiments.paths import Given, shortened, stem
from experiments.plotting import plt
from experiments.tasks import catalogue, segmentation_catalogue


@dataclasses.dataclass(frozen=True)
class ShowConfig:
    """Options of `python -m experiments.tasks.show`."""

    given: tyro.conf.Positional[str] = ""
    """Name of a task, or path of a folder or CSV file."""
    task: str = ""
    """The same, as other commands take it."""
    list: bool = False
    """Print all tasks with their licences, and nothing else."""
    data_dir: Path = catalogue.DATA_DIR
    """Folder with TFDS's prepared sets and unpacked archives."""
    size: int = 224
    """Height and width of an image in pixels."""
    crop: Literal["resize", "centre", "random"] = "resize"
    """VTAB resizes; FGVC crops at random (training) or the centre (evaluation)."""
    fit: Literal["squash", "pad"] = "squash"
    """The same of images with masks, which are mirrored at random."""
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
        console.print(segmentation_catalogue.listing())
        return None
    with terminal.exit_on_error(program):
        if config.given and config.task:
            raise ValueError(f"{config.given} and --task {config.task}: expected one.")
        config = dataclasses.replace(config, task=config.task or config.given)
        if not config.task:
            raise ValueError("--task is missing; --list prints what there is.")
        if config.images < 1:
            raise ValueError(f"images={config.images}: expected at least 1.")
        path = (
            config.out or Path("runs/show") / f"{shortened(stem(config.task), 240)}.png"
        )
        masks = segmentation_catalogue.knows(config.task)
        said = (show_masks if masks else show_classes)(path, config, console)
    console.print(said)
    console.print(f"The sheet is {path}", soft_wrap=True)
    return path


def show_classes(path: Path, config: ShowConfig, console: Console) -> str:
    """Draws images with their labels; returns a line about the task."""
    task = catalogue.load(config.task, config.data_dir)
    if config.check:
        task = check.checked(task, console, config.skip_corrupt)
    else:
        check.tell(task, console)
    mean, std = NORMALISATIONS[config.normalise]
    transform = Transform((config.size, config.size), config.crop, mean, std)
    batch = _batch(task.train, transform, config)
    pixels = transform.unnormalised(batch["image"])
    title = f"{task.name}, training images ({transform.crop})"
    with _sheet(path, title, len(pixels)) as panels:
        for axes, image, label in zip(panels, pixels, batch["label"], strict=False):
            axes.imshow(np.squeeze(image), cmap="gray", vmin=0, vmax=255)
            title = task.names[label] if task.names else str(label)
            axes.set_title(plotting.label(title), fontsize=8)
    return f"{task.name}: {task.classes} classes; {_sizes(task)}"


def show_masks(path: Path, config: ShowConfig, console: Console) -> str:
    """Draws images with their masks; returns a line about the task."""
    task = segmentation_catalogue.load(config.task, config.data_dir)
    if config.check:
        task = pair_check.checked(task, console, config.skip_corrupt)
    else:
        check.tell(task, console)
    mean, std = NORMALISATIONS[config.normalise]
    transform = MaskTransform(config.size, config.fit, flip=True, mean=mean, std=std)
    kind, source = ("training", task.train) if len(task.train) else ("test", task.test)
    batch = _batch(source, transform, config)
    pixels = transform.unnormalised(batch["image"])
    title = f"{task.name}, {kind} images ({transform.fit}) with masks"
    with _sheet(path, title, len(pixels)) as panels:
        for axes, image, mask in zip(panels, pixels, batch["mask"], strict=False):
            plotting.overlay(axes, image, mask > 0, mask > 0)
    return f"{task.name}: images with masks; {_sizes(task)}"


def _sizes(task: Splits) -> str:
    sizes = [len(source) for source in (task.train, task.validation, task.test)]
    return f"{sizes[0]} to train, {sizes[1]} to validate, {sizes[2]} to test"


def _batch(
    source: Source, transform: Transform | MaskTransform, config: ShowConfig
) -> dict[str, np.ndarray]:
    """Returns the first batch of a training stream."""
    count, seed = min(config.images, len(source)), config.seed
    return next(
        iter(pipeline.training(source, transform, batch=count, epochs=1, seed=seed))
    )


@contextlib.contextmanager
def _sheet(path: Path, title: str, count: int) -> Iterator[list[Axes]]:
    """Opens a figure with a panel for each of some images; writes it at the end."""
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
    yield list(panels.flat)
    figure.suptitle(plotting.label(title))
    plotting.save(figure, path, dpi=100)


if __name__ == "__main__":
    main()
