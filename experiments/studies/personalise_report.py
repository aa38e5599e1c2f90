"""Table and sheet of the concepts that the toy was taught."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from experiments import files, plotting
from experiments.methods import registry
from experiments.plotting import plt
from experiments.reports.dreambooth_report import TITLES
from experiments.reports.text import Titled, markdown_tables, number, printed_tables
from experiments.studies import table_store
from experiments.studies.table_store import Store
from experiments.tasks import dreambooth, emoji
from experiments.training import pictures

METRICS = ("image_alignment", "probe", "vendi_prompt", "vendi_concept")
CAPTION = (
    "Mean over the concepts of a group, with the deviation over seeds of that mean. "
    "image alignment: mean cosine of the features of pictures and of what was learnt "
    "(ViT-S/14); probe: mean probability of the class by a probe of these features; "
    "Vendi: effective number of kinds of pictures. "
)
SHOWN = (2, 7)  # prompts of the sheet: on the beach, with a mountain
LEARNT = 3  # pictures of the sheet that were learnt


def made(
    store: Store, concepts: Sequence[str], chosen: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Returns what the tables say.

    Args:
      store: finished runs.
      concepts: those of the table.
      chosen: the search, by method.

    Returns:
      `rates` (the search) and `rows`, one for each concept and method with a finished
      seed: `concept`, `group`, `method`, and for each metric the list of its seeds.
    """
    rows: list[dict[str, Any]] = []
    for concept in concepts:
        for method, done in store.rows(concept).items():
            seeds = done.get("seeds", {})
            if not seeds or method not in (*registry.OF_MMDIT, registry.UNTUNED):
                continue
            group = "emoji" if concept in emoji.FAMILIES else "photographs"
            own: dict[str, Any] = {"concept": concept, "group": group, "method": method}
            for name in METRICS:
                own[name] = [seeds[seed][f"test_{name}"] for seed in sorted(seeds)]
            rows.append(own)
    return {"rates": chosen, "rows": rows}


def write(made: dict[str, Any], out: Path, console: Console) -> None:
    """Writes `report.md`, `report.json` and `sheet.png`, and prints the tables."""
    tables = list(_tables(made))
    caption = f"{CAPTION}{emoji.CREDIT}. {dreambooth.CREDIT}."
    console.print(printed_tables(tables, caption))
    files.replace(out / "report.md", markdown_tables(tables, caption))
    files.write(out / "report.json", made)
    draw(made, out)


def _tables(made: dict[str, Any]) -> Iterator[Titled]:
    methods = list(dict.fromkeys(row["method"] for row in made["rows"]))
    titles = [TITLES.get(name, name.replace("_", " ")) for name in METRICS]
    for group in dict.fromkeys(row["group"] for row in made["rows"]):
        rows = []
        for method in methods:
            own = _of(made, group=group, method=method)
            cells = [summed([row[name] for row in own]) for name in METRICS]
            rows.append([registry.title(method), f"{len(own)}", *cells])
        yield group, ["", "concepts", *titles], rows
    header = ["", *(registry.title(method) for method in methods)]
    for name, title in zip(METRICS[:2], titles, strict=False):
        rows = []
        for concept in dict.fromkeys(row["concept"] for row in made["rows"]):
            found = {r["method"]: r[name] for r in _of(made, concept=concept)}
            means = [np.mean(found[m]) if m in found else None for m in methods]
            rows.append([concept, *(number(mean, ".3f") for mean in means)])
        yield f"{title} of each concept", header, rows
    rows = [
        [registry.title(method), *(number(x, ".3f") for x in own["trials"].values())]
        for method, own in made["rates"].items()
    ]
    if rows:
        rates = next(iter(made["rates"].values()))["trials"]
        yield "image alignment + probe of the search, by rate", ["", *rates], rows


def _of(made: dict[str, Any], **wanted: str) -> list[dict[str, Any]]:
    return [
        row
        for row in made["rows"]
        if all(row[key] == value for key, value in wanted.items())
    ]


def summed(concepts: Sequence[Sequence[float]]) -> str:
    """Returns mean and deviation of a metric, from the seeds of each concept.

    The seeds' means over the concepts are what deviates; with one seed, or seeds that
    some concept lacks, nothing does.

    >>> summed([[0.1, 0.3], [0.3, 0.5]]), summed([[0.5], [0.7]])
    ('0.300 ± 0.141', '0.600')
    """
    if not concepts:
        return number(None, "")
    mean = np.mean([np.mean(seeds) for seeds in concepts])
    counts = {len(seeds) for seeds in concepts}
    if counts == {1} or len(counts) > 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {np.std(np.mean(concepts, 0), ddof=1):.3f}"


def draw(made: dict[str, Any], out: Path) -> None:
    """Draws `sheet.png`: of each concept what was learnt, and each method's pictures.

    Concepts whose first seed's pictures are not in the folder are left out.
    """
    methods = list(dict.fromkeys(row["method"] for row in made["rows"]))
    lines = []
    for concept in dict.fromkeys(row["concept"] for row in made["rows"]):
        found = {m: table_store.place(out, concept, m) / "seed0" for m in methods}
        if all((run / "summary.json").exists() for run in found.values()):
            lines.append((concept, _learnt(found[methods[-1]]), _drawn(found)))
    if not lines:
        return
    columns = LEARNT + len(SHOWN) * len(methods)
    figure, grid = plt.subplots(
        len(lines),
        columns,
        figsize=(0.95 * columns + 1, 0.95 * len(lines) + 0.9),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, (concept, learnt, drawn) in zip(grid, lines, strict=True):
        axes[0].set_ylabel(plotting.label(concept), fontsize=7)
        for at, picture in zip(axes, learnt, strict=False):
            at.imshow(picture, interpolation="nearest")
        for at, picture in zip(axes[LEARNT:], drawn, strict=True):
            at.imshow(picture, interpolation="nearest")
    grid[0, 0].set_title("learnt", fontsize=7, loc="left")
    for place, method in enumerate(methods):
        at = grid[0, LEARNT + len(SHOWN) * place]
        at.set_title(registry.title(method), fontsize=7, loc="left")
    figure.supxlabel(f"{emoji.CREDIT}. {dreambooth.CREDIT}.", fontsize=6)
    plotting.save(figure, out / "sheet.png")


def _learnt(run: Path) -> list[np.ndarray]:
    """Returns some of the pictures that a run learnt from."""
    config = files.read(run / "config.json")
    where = Path(config["data_dir"]), config["size"], config["seed"]
    concept = dreambooth.load(config["subject"], *where, config["class_name"])
    return list(concept.photographs.images[:LEARNT])


def _drawn(runs: Mapping[str, Path]) -> Iterator[np.ndarray]:
    """Yields the pictures of the sheet's prompts, by method."""
    for method, run in runs.items():
        for prompt in SHOWN:
            with Image.open(pictures.path(run / "pictures" / method, prompt, 0)) as one:
                yield np.asarray(one.convert("RGB"))
