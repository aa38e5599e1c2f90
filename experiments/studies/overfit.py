r"""Tests whether a model and a method can learn a few images by heart.

    python -m experiments.studies.overfit --config elpv_mono --model swin_b \
        --random_weights --image_size 32 --methods full --batch 16 \
        --warmup_epochs 2 --epochs 40 --full.lr 1e-4 --full.weight_decay 0 --clip 1

takes some training images of a task (`--images`, 64 by default), trains each method on
them and evaluates it on the same images after every epoch. A method that works reaches
100%; the command fails if one does not. All other options are those of
`experiments.vtab`. Writes `overfit.json` and `overfit.png` into `--out`.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from rich.table import Table

from experiments import hardware, terminal
from experiments.config import command_line
from experiments.config.presets import VTAB
from experiments.data import source
from experiments.methods import registry
from experiments.methods.first_stage import Staged
from experiments.reports import figures, result_files
from experiments.runs import images
from experiments.runs.images import ImageRun
from experiments.training.fit import fit

PROGRAM = "python -m experiments.studies.overfit"
VAL = "val_accuracy"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, and returns the content of `overfit.json`.

    Raises:
      SystemExit: an option is wrong, or a method did not learn every image.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    first = command_line.parser(PROGRAM)
    first.add_argument("--images", type=int, default=64)
    own, words = first.parse_known_args(words)
    name, config = command_line.parse(PROGRAM, VTAB, words)
    config = dataclasses.replace(config, out=config.out or Path("runs/overfit"))
    console = terminal.console()
    with terminal.exit_on_error(PROGRAM):
        prepared = _small(images.prepared(name, config, console), own.images)
        staged = [m for m in config.adapted if isinstance(config.settings[m], Staged)]
        if staged or not config.adapted:
            raise ValueError(
                f"methods={config.methods}: expected some without a stage."
            )
        if prepared.out.exists():
            raise ValueError(f"{prepared.out} exists: name another folder with --out.")
        prepared.out.mkdir(parents=True)
    rows: dict[str, list[dict[str, Any]]] = {
        method: _learnt(prepared, method) for method in config.adapted
    }
    found = {
        "model": config.model,
        "task": prepared.task.name,
        "images": own.images,
        "image_size": list(prepared.base.config.image_hw),
        "parameters": optax.tree.size(nnx.state(prepared.base, nnx.Param)),
        "accuracy": {method: _accuracies(own) for method, own in rows.items()},
        "device": hardware.describe(),
        "jax": jax.__version__,
    }
    titled = {registry.title(method): own for method, own in rows.items()}
    title = f"{config.model}, {prepared.task.name}"

    def draw(path: Path, _: Any) -> None:
        figures.curves(path, titled, title)

    result_files.write(prepared.out, "overfit", found, console, draw, _table(rows))
    if failed := [m for m, own in rows.items() if _accuracies(own)[-1] < 1]:
        raise SystemExit(f"{PROGRAM}: {', '.join(failed)} did not learn every image.")
    return found


def _small(prepared: ImageRun, count: int) -> ImageRun:
    """Returns a run that trains on and follows the same few images."""
    task, config = prepared.task, prepared.config
    if not config.batch <= count <= len(task.train):
        raise ValueError(
            f"images={count}: expected {config.batch} (a batch) to {len(task.train)}."
        )
    some, _ = source.split(task.train, config.seed, count)
    title = f"{task.name}, {count} images"
    task = dataclasses.replace(task, name=title, train=some, validation=some)
    config = dataclasses.replace(config, protocol="choose", search=False)
    return dataclasses.replace(prepared, task=task, config=config)


def _learnt(prepared: ImageRun, name: str) -> list[dict[str, Any]]:
    """Trains a method and returns the rows of its epochs."""
    method, session = prepared.config.settings[name], prepared.session(name)
    model = method.adapt(prepared.base, session.scope)
    rules = method.competition(model, session.scope)
    return fit(name, method.title, model, session, method.watch(), rules).rows


def _accuracies(rows: list[dict[str, Any]]) -> list[float]:
    return [row[VAL] for row in rows if VAL in row]


def _table(rows: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table("method", "accuracy", "first at 100%", "loss", "s/step")
    for method, own in rows.items():
        learnt = next((row["epoch"] for row in own if row.get(VAL) == 1), None)
        last = own[-1]
        table.add_row(
            registry.title(method),
            f"{last[VAL]:.1%}",
            "never" if learnt is None else f"epoch {learnt}",
            f"{last['train_loss']:.3g}",
            f"{last['seconds_per_step']:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
