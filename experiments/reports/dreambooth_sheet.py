"""Sheet of a run on a concept, as the paper's Figure 9: a row for each method."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from experiments import plotting
from experiments.methods import registry
from experiments.plotting import plt
from experiments.tasks.dreambooth import Concept
from experiments.training import pictures

COLUMNS = 7  # prompts of a sheet
SIDE = 1.5  # inches of a picture
Row = Sequence[UInt8[np.ndarray, "H W 3"]]


def draw(
    out: Path,
    concept: Concept,
    prompts: Sequence[str],
    methods: Sequence[str],
    each: int,
) -> None:
    """Draws `figures/sheet.png` of a run folder, of the pictures that it holds.

    Args:
      out: the run folder.
      concept: what was learnt; its photographs stand above.
      prompts: those of the pictures.
      methods: names of the methods, in the sheet's order.
      each: pictures of a prompt, the first of which is shown.
    """
    chosen = spread(len(prompts))
    rows = {}
    for method in methods:
        drawn = pictures.read(out / "pictures" / method, len(prompts), each)
        rows[registry.title(method)] = [drawn[prompt, 0] for prompt in chosen]
    photographs = [
        concept.photographs.images[i] for i in range(len(concept.photographs))
    ]
    titles = [prompts[prompt] for prompt in chosen]
    sheet(out / "figures" / "sheet.png", photographs, titles, rows, concept.credit)


def spread(count: int) -> list[int]:
    """Returns some of so many prompts, as far apart as can be.

    >>> spread(25)
    [0, 4, 8, 12, 16, 20, 24]
    """
    places = np.linspace(0, count - 1, min(COLUMNS, count))
    return places.round().astype(int).tolist()


def sheet(
    path: Path,
    photographs: Row,
    prompts: Sequence[str],
    methods: Mapping[str, Row],
    credit: str,
) -> None:
    """Draws photographs above, and below them a row of pictures for each method.

    Args:
      path: the PNG to write.
      photographs: those that were learnt; as many are shown as there are prompts.
      prompts: titles of the columns.
      methods: a picture of each prompt, by the method's title.
      credit: line below; "" for none.
    """
    columns = len(prompts)
    rows = {"photographs": photographs[:columns], **methods}
    figure, grid = plt.subplots(
        len(rows),
        columns,
        figsize=(SIDE * columns + 0.6, SIDE * len(rows) + 0.7),
        squeeze=False,
        layout="constrained",
    )
    for line, (title, own) in zip(grid, rows.items(), strict=True):
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, picture in zip(line, own, strict=False):
            axes.imshow(picture, interpolation="nearest")
        line[0].set_ylabel(plotting.label(title), fontsize=8)
    for axes, prompt in zip(grid[1], prompts, strict=True):
        axes.set_title(textwrap.fill(plotting.label(prompt), 22), fontsize=7)
    if credit:
        figure.supxlabel(plotting.label(credit), fontsize=7)
    plotting.save(figure, path)
