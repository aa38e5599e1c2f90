r"""Compares the updates of concepts, weight by weight: the paper's Figure 12.

    for s in dog cat teapot; do python -m experiments.dreambooth --config toy \
        --methods snella --subject $s --data_dir DATA --out runs/$s; done
    python -m experiments.studies.concepts --deltas runs/*/deltas/snella.safetensors

reads the files of differences that SNELLA leaves of concepts that it taught the toy
(those in `deltas/` of `experiments.studies.personalise`, too) and writes into `--out`

- `concepts.png`: one matrix's updates of three concepts, and how many concepts move
  each of its weights; the similarity of updates in every block; how many weights are
  moved by how many concepts, beside what chance would give;
- `concepts.json`: the numbers.

The factors of a run are drawn by its seed, and updates start there. So files of one
seed have a common start; `--others` takes files of the same concepts, in the same
order, of which each has a seed of its own, and tells what the start alone does.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from flax import nnx
from jaxtyping import Float, Int
from matplotlib.axes import Axes

import snella_jax as snella
from experiments import plotting, terminal
from experiments.config.dreambooth import TOY
from experiments.paths import Given, check_out
from experiments.plotting import plt
from experiments.pretrained import sd3_models
from experiments.reports import figures, result_files
from experiments.reports.text import number
from snella_jax.nnx.variables import variables_of

PROGRAM = "python -m experiments.studies.concepts"
OF_DELTAS = "snella"  # name of a file in a run folder
TITLES = {  # of the means in concepts.json
    "similarity": "two concepts, one start",
    "other_starts": "two concepts, two starts",
    "same_concept": "one concept, two starts",
}
SHOWN = 3  # concepts whose updates are drawn
Updates = Mapping[str, Float[np.ndarray, "concepts n m"]]


@dataclasses.dataclass(frozen=True)
class ConceptsConfig:
    """Options of `python -m experiments.studies.concepts`."""

    deltas: tuple[Given, ...]
    """Files of differences, one a concept."""
    others: tuple[Given, ...] = ()
    """The same concepts with seeds of their own."""
    matrix: str | None = None
    """Matrix to draw, such as blocks/image/attn/q[3]. Default: the query of the image
    in the last but one block, as in the paper."""
    out: Given = Path("runs/concepts")
    """Folder to write concepts.json and concepts.png into."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compares, and returns the content of `concepts.json`."""
    config = tyro.cli(ConceptsConfig, prog=PROGRAM, args=argv, description=__doc__)
    console = terminal.console()
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        if len(config.deltas) < 2:
            raise ValueError("--deltas: expected files of at least two concepts.")
        if config.others and len(config.others) != len(config.deltas):
            raise ValueError(
                f"{len(config.others)} others and {len(config.deltas)} deltas: "
                "expected a file of each concept in both."
            )
        base = sd3_models.load(TOY).transformer
        updates = read(base, config.deltas)
        matrix = config.matrix or f"blocks/image/attn/q[{base.config.depth - 2}]"
        if matrix not in updates:
            raise ValueError(
                f"--matrix {matrix}: expected one of {', '.join(updates)}."
            )
        others = read(base, config.others) if config.others else None
    result = compared(updates, others, base.config.depth)
    names = [_name(path) for path in config.deltas]
    result = {"concepts": names, "matrix": matrix} | result

    def draw(path: Path, result: dict[str, Any]) -> None:
        _draw(path, result, updates[matrix])

    result_files.write(config.out, "concepts", result, console, draw)
    for key in TITLES:
        if key in result:
            console.print(f"mean cosine, {TITLES[key]}: {number(result[key], '.3f')}")
    return result


def read(base: Any, paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Returns the updates of each matrix that any of the files changes, by its name.

    All of them are in memory at once.

    Args:
      base: the model that all files are for.
      paths: files of `snella.save_delta`.

    Raises:
      FileNotFoundError, CheckpointError: as `snella.apply_delta`.
    """
    params = variables_of(base, nnx.Param)
    before = {name: np.asarray(variable[...]) for name, variable in params}
    tuned = [snella.apply_delta(before, path) for path in paths]
    found: dict[str, np.ndarray] = {}
    for name, old in before.items():
        changes = np.stack([np.asarray(after[name]) - old for after in tuned])
        if not name.endswith("/kernel") or not changes.any():
            continue
        plain = name.removesuffix("/kernel")
        if changes.ndim == 3:
            found[plain] = changes
        else:  # blocks are stacked
            found |= {f"{plain}[{i}]": changes[:, i] for i in range(changes.shape[1])}
    return {name: changes for name, changes in found.items() if changes.any()}


def compared(updates: Updates, others: Updates | None, depth: int) -> dict[str, Any]:
    """Returns how like one another the updates of concepts are.

    Args:
      updates: by matrix, of each concept.
      others: of the same concepts, from other starts; None for none.
      depth: blocks of the model; what is in none of the stack is in the last.

    Returns:
      `similarity`, the mean cosine of the updates of two concepts, over all pairs and
      matrices; with `others` also `other_starts`, the same among them, and
      `same_concept`, that of a concept's two updates. `matrices`, each with `name`,
      `block`, these numbers and `density`, the share of its weights that move;
      `frequency`, the share of their weights that 0, 1, ... concepts move, and
      `chance`, the same if each concept chose as many in each matrix at random.
    """
    rows: list[dict[str, Any]] = []
    for name, own in updates.items():
        numbers = {
            "density": float((own != 0).mean()),
            "similarity": mean_cosine(itertools.combinations(own, 2)),
        }
        if others is not None:
            other = others.get(name, np.zeros_like(own))
            numbers["other_starts"] = mean_cosine(itertools.combinations(other, 2))
            numbers["same_concept"] = mean_cosine(zip(own, other, strict=True))
        rounded = {k: None if v is None else round(v, 4) for k, v in numbers.items()}
        rows.append({"name": name, "block": _block(name, depth), **rounded})
    sizes = [own[0].size for own in updates.values()]
    shares = [(frequency(own), chance(own)) for own in updates.values()]
    found, random = np.average(shares, axis=0, weights=sizes)
    means = {key: _mean(rows, key) for key in TITLES if key in rows[0]}
    return {
        **means,
        "matrices": sorted(rows, key=lambda row: (row["block"], row["name"])),
        "frequency": found.round(5).tolist(),
        "chance": random.round(5).tolist(),
    }


def mean_cosine(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """Returns the mean cosine of pairs of updates; None if one of each pair is 0.

    >>> one, other = np.array([[1.0, 0.0]]), np.array([[0.6, 0.8]])
    >>> round(mean_cosine([(one, other), (one, one), (one, 0 * one)]), 3)
    0.8
    """
    found = [
        float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
        for a, b in pairs
        if a.any() and b.any()
    ]
    return float(np.mean(found)) if found else None


def frequency(
    updates: Float[np.ndarray, "concepts n m"],
) -> Float[np.ndarray, " concepts+1"]:
    """Returns the share of weights that are moved by 0, 1, ... all concepts."""
    counts = moved_by(updates)
    return np.bincount(counts.ravel(), minlength=len(updates) + 1) / counts.size


def moved_by(updates: Float[np.ndarray, "concepts n m"]) -> Int[np.ndarray, "n m"]:
    """Returns by how many concepts each weight is moved."""
    return (updates != 0).sum(0)


def chance(
    updates: Float[np.ndarray, "concepts n m"],
) -> Float[np.ndarray, " concepts+1"]:
    """Returns `frequency` if each concept had chosen as many weights at random.

    >>> half = np.array([[[0.0, 1.0]], [[2.0, 0.0]]])
    >>> chance(half).tolist()
    [0.25, 0.5, 0.25]
    """
    found = np.ones(1)
    for density in (updates != 0).mean((1, 2)):
        found = np.convolve(found, [1 - density, density])
    return found


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = [row[key] for row in rows if row[key] is not None]
    return round(float(np.mean(known)), 4) if known else None


def _block(name: str, depth: int) -> int:
    block = figures.block_of(name)
    return depth - 1 if block is None else block[0]


def _name(path: Path) -> str:
    """Returns a concept's name: that of its file, or of its run's folder.

    >>> _name(Path("deltas/dog.safetensors"))
    'dog'
    >>> _name(Path("runs/dog/deltas/snella.safetensors"))
    'dog'
    """
    in_run = path.stem == OF_DELTAS and len(path.parts) > 2
    return path.parent.parent.name if in_run else path.stem


def _draw(path: Path, result: dict[str, Any], own: np.ndarray) -> None:
    shown = min(SHOWN, len(own))
    figure = plt.figure(figsize=(12, 6.4), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    above, below = halves
    panels = above.subplots(1, shown + 1)
    limit = float(np.quantile(abs(own[:shown]), 0.999)) or 1.0
    how: Any = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
    drawn = [
        axes.imshow(one, **how) for axes, one in zip(panels, own[:shown], strict=False)
    ]
    for axes, name in zip(panels[:shown], result["concepts"], strict=False):
        axes.set_title(plotting.label(name), fontsize=9)
    above.colorbar(drawn[0], ax=panels[:shown], label="update", fraction=0.05)
    counts = panels[shown].imshow(moved_by(own), cmap="viridis", vmin=0, vmax=len(own))
    panels[shown].set_title("concepts that move a weight", fontsize=9)
    above.colorbar(counts, ax=panels[shown], fraction=0.05)
    for axes in panels:
        axes.set(xticks=[], yticks=[])
    above.suptitle(plotting.label(result["matrix"]), fontsize=10)
    left, right = below.subplots(1, 2)
    _draw_similarity(left, result)
    places = np.arange(len(result["frequency"]))
    right.bar(places, result["frequency"], color="tab:blue", alpha=0.6, label="found")
    right.plot(places, result["chance"], "o-", color="black", label="by chance")
    right.set(xlabel="concepts that move a weight", ylabel="share of weights")
    right.legend(fontsize=8)
    plotting.save(figure, path)


def _draw_similarity(axes: Axes, result: dict[str, Any]) -> None:
    rows = result["matrices"]
    blocks = sorted({row["block"] for row in rows})
    for index, (key, title) in enumerate(TITLES.items()):
        if key not in rows[0]:
            continue
        every = [(r["block"], r[key]) for r in rows if r[key] is not None]
        axes.plot(*zip(*every, strict=True), ".", color=f"C{index}", alpha=0.5)
        known = [block for block in blocks if any(b == block for b, _ in every)]
        means = [np.mean([v for b, v in every if b == block]) for block in known]
        axes.plot(known, means, color=f"C{index}", label=title)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="block", ylabel="cosine of updates", xticks=blocks)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
