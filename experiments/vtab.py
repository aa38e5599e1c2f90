"""Fine-tunes a pre-trained model on a task under the VTAB-1k protocol.

    python -m experiments.vtab --config quickstart

`quickstart` is scikit-learn's handwritten digits (no VTAB task) with the small ViT that
`experiments/pretrain.py` pre-trained on Fashion-MNIST. It trains a linear probe, LoRA
and SNELLA on 800 images, follows 200 for validation, tests once on the other 797,
prints a table and leaves a run folder: `config.json`, `metrics.jsonl`, `summary.json`
and `figures/allocation.png`.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import snella_jax as snella
from experiments import config as configs
from experiments import figures, small_vit, train
from experiments.config import RunConfig
from experiments.data import check, digits, pipeline
from experiments.data.task import InMemory
from experiments.methods import linear_probe, lora
from snella_jax.rules import select

TITLES = {"linear": "linear probe", "lora": "LoRA", "snella": "SNELLA"}


@dataclasses.dataclass(frozen=True)
class Result:
    """One method's line in the table and in `summary.json`.

    Attributes:
      test_accuracy: on the test split, of the last epoch.
      val_accuracy: on the validation split, of the last epoch.
      trainable: parameters that train, the head's among them.
      seconds_per_step: median; of an L-BFGS iteration for the linear probe.
      density: fraction of the adapted weights that may move; None for no adapter.
      weights_moved: weights of the base that differ after training.
    """

    test_accuracy: float
    val_accuracy: float
    trainable: int
    seconds_per_step: float
    density: float | None
    weights_moved: int


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parses the command line, runs, and returns what `summary.json` holds."""
    program = "python -m experiments.vtab"
    name, config = configs.parse(program, argv)
    builds = {"lora": _lora_model, "snella": _snella_model}
    try:  # the models' shapes alone: what does not fit is said before anything runs
        for method in set(config.methods) & builds.keys():
            nnx.eval_shape(lambda method=method: builds[method](config))
    except ValueError as error:
        raise SystemExit(f"{program}: {error}") from error
    return run(name, config)


def run(name: str, config: RunConfig) -> dict[str, Any]:
    """Trains every method of `config` and writes the run folder.

    Raises:
      SystemExit: the run folder holds something already.
    """
    out = config.out or Path("runs") / name / time.strftime("%Y%m%d-%H%M%S")
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: name another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "config.json", configs.as_dict(config))
    methods = {"linear": _linear, "lora": _lora, "snella": _snella}
    console = Console()
    task = check.checked(digits.load(), console)
    task = pipeline.in_memory(task, small_vit.TRANSFORM)
    results = {}
    for method in config.methods:
        results[method] = methods[method](config, task, out, console)
    summary = {
        "task": task.name,
        "seed": config.seed,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} host cores",
        "versions": {m.__name__: m.__version__ for m in (snella, jax, flax)},
        "methods": {m: dataclasses.asdict(r) for m, r in results.items()},
    }
    _write(out / "summary.json", summary)
    console.print(_table(task, results))
    console.print(f"Everything is in {out}", soft_wrap=True)
    return summary


def _linear(config: RunConfig, task: InMemory, out: Path, console: Console) -> Result:
    model = small_vit.load(config.seed)
    with console.status("linear probe"):
        probe = linear_probe.train(model, task, config.linear.strengths)
    _log(out, {"method": "linear", **dataclasses.asdict(probe)})
    return Result(
        test_accuracy=probe.test_accuracy,
        val_accuracy=probe.val_accuracy,
        trainable=probe.trainable,
        seconds_per_step=probe.seconds_per_step,
        density=None,
        weights_moved=0,
    )


def _lora(config: RunConfig, task: InMemory, out: Path, console: Console) -> Result:
    follow = _Follower("lora", out, console)
    epochs, model = follow.run(config, config.lora, task, _lora_model(config))
    return Result(
        test_accuracy=train.evaluate(model, task.test),
        val_accuracy=epochs[-1].val_accuracy,
        trainable=_size(model),
        seconds_per_step=_median_seconds(epochs),
        density=1.0,
        weights_moved=lora.weights_moved(model),
    )


def _snella(config: RunConfig, task: InMemory, out: Path, console: Console) -> Result:
    settings, model = config.snella, _snella_model(config)
    adapter = settings.adapter(config.targets, config.trainable)
    weights = snella.adapted_weights(model)
    follow = _Follower("snella", out, console)
    epochs, model = follow.run(
        config,
        settings,
        task,
        model,
        watch=(snella.track_importance(settings.beta1, settings.beta2),),
        schedule=adapter.schedule(weights, config.epochs, power=settings.power),
    )
    moves = [(epoch.moved, epoch.epoch) for epoch in epochs if epoch.moved]
    if moves:
        reports, numbers = zip(*moves, strict=True)
        figures.allocation(out / "figures" / "allocation.png", reports, numbers)
    plain = snella.merge(model)
    return Result(
        test_accuracy=train.evaluate(plain, task.test),
        val_accuracy=epochs[-1].val_accuracy,
        trainable=_size(model),
        seconds_per_step=_median_seconds(epochs),
        density=epochs[-1].density,
        weights_moved=_moved(small_vit.load(config.seed), plain, config.targets),
    )


def _lora_model(config: RunConfig) -> Any:
    base = small_vit.load(config.seed, config.drop_path, config.dtype)
    rank, rngs = config.lora.rank, nnx.Rngs(config.seed + 1)
    return lora.adapt(base, config.targets, config.trainable, rank, rngs)


def _snella_model(config: RunConfig) -> Any:
    base = small_vit.load(config.seed, config.drop_path, config.dtype)
    adapter = config.snella.adapter(config.targets, config.trainable)
    return snella.adapt(base, adapter, rngs=nnx.Rngs(config.seed + 1))


class _Follower:
    """Runs the trainer behind a progress bar and logs every epoch."""

    def __init__(self, method: str, out: Path, console: Console):
        self.method, self.out, self.console = method, out, console

    def run(
        self, config: RunConfig, method: Any, task: InMemory, model: Any, **options: Any
    ) -> tuple[list[train.Epoch], Any]:
        """All epochs, and the model as the last one left it."""
        recipe = train.Recipe(
            epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            batch=config.batch,
            lr=method.lr,
            weight_decay=method.weight_decay,
            seed=config.seed,
        )
        epochs, trained = [], model
        with Progress(
            TextColumn(f"{TITLES[self.method]:12}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
        ) as bar:
            steps = config.epochs * (len(task.train) // config.batch)
            shown = bar.add_task("compiling", total=steps)
            options["on_step"] = lambda *_: bar.advance(shown)
            for epoch, now in train.fit(model, task, recipe, **options):
                trained = now
                epochs.append(epoch)
                _log(self.out, _row(self.method, epoch))
                bar.update(shown, description=_brief(epoch, config.epochs))
        return epochs, trained


def _row(method: str, epoch: train.Epoch) -> dict[str, Any]:
    row = {"method": method, **vars(epoch)}
    moved = row.pop("moved")
    if moved is not None:
        row["importance"] = dict(zip(moved.names, moved.scores.tolist(), strict=True))
        row["budget"] = dict(zip(moved.names, moved.budgets.tolist(), strict=True))
    return row


def _brief(epoch: train.Epoch, epochs: int) -> str:
    density = "" if epoch.density is None else f"  density {epoch.density:.2f}"
    return (
        f"epoch {epoch.epoch}/{epochs}  loss {epoch.train_loss:.3f}  "
        f"val {epoch.val_accuracy:.1%}{density}"
    )


def _table(task: InMemory, results: dict[str, Result]) -> Table:
    sizes = "/".join(str(len(s)) for s in (task.train, task.validation, task.test))
    table = Table(title=f"{task.name}, {sizes} images to train/validate/test")
    for column in ("", "test", "val", "trainable", "s/step", "weights moved"):
        table.add_column(column, justify="left" if not column else "right")
    for method, result in results.items():
        density = "" if result.density is None else f" ({result.density:.0%})"
        table.add_row(
            TITLES[method],
            f"{result.test_accuracy:.2%}",
            f"{result.val_accuracy:.1%}",
            f"{result.trainable:,}",
            f"{result.seconds_per_step:.4f}",
            f"{result.weights_moved:,}{density}",
        )
    if "linear" in results:
        table.caption = "a step of the linear probe is an L-BFGS iteration on features"
    return table


def _size(model: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _median_seconds(epochs: list[train.Epoch]) -> float:
    return float(np.median([epoch.seconds_per_step for epoch in epochs]))


def _moved(base: nnx.Module, plain: nnx.Module, targets: str) -> int:
    before, after = (select(model, targets) for model in (base, plain))
    return sum(
        int(jnp.sum(before[path].kernel[...] != after[path].kernel[...]))
        for path in before
    )


def _log(out: Path, row: dict[str, Any]) -> None:
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
