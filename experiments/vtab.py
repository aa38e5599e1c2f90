"""Fine-tunes a pre-trained model on a task under the VTAB-1k protocol.

    python -m experiments.vtab --config quickstart
    python -m experiments.vtab --config quickstart --task DATA.csv --model ViT-B_16.npz

`quickstart` is scikit-learn's handwritten digits (no VTAB task) with the small ViT that
`experiments/pretrain.py` pre-trained on Fashion-MNIST; `--task` and `--model` put yours
in their place. It trains a linear probe, LoRA and SNELLA on 800 images, follows 200 for
validation, tests once on the other 797, prints a table and leaves a run folder:
`config.json`, `metrics.jsonl`, `summary.json`, `figures/allocation.png` and
`checkpoints`. A run that was killed goes on with

    python -m experiments.vtab --resume FOLDER

and ends with the numbers of one that was not.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from functools import cached_property
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
from experiments import figures, metrics, models, train
from experiments.checkpoints import Checkpoints
from experiments.config import RunConfig
from experiments.data import catalogue, check, pipeline
from experiments.data.task import Task
from experiments.data.transforms import Transform
from experiments.methods import linear_probe, lora
from snella_jax.models.vit import ViT
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
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument("--resume", type=Path)
    known, rest = first.parse_known_args(argv)
    resume = known.resume
    if resume is not None:
        if rest or not (resume / "config.json").is_file():
            raise SystemExit(
                f"{program}: --resume FOLDER stands alone, and FOLDER is that of an "
                "interrupted run, with its config.json."
            )
        rest = ["--config", str(resume / "config.json"), "--out", str(resume)]
    name, config = configs.parse(program, rest)
    console = Console()
    try:  # whatever does not fit is said before anything is written
        task = catalogue.load(config.task, config.data_dir)
        if config.batch > len(task.train):
            raise ValueError(
                f"batch={config.batch}: expected 1 to {len(task.train)} (training "
                "images)."
            )
        base = models.load(config, task.classes)
        for method in set(config.methods) & ADAPTED.keys():
            nnx.eval_shape(ADAPTED[method](config), base)
        task = check.checked(task, console, config.skip_corrupt)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"{program}: {error}") from error
    return run(Setting(name, config, task, base, console), resume is not None)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all methods of a run share.

    Attributes:
      name: of the folder among the runs, where `config.out` does not say it.
      base: the pre-trained model.
    """

    name: str
    config: RunConfig
    task: Task
    base: ViT
    console: Console

    @cached_property
    def transform(self) -> Transform:
        """Of the images."""
        return models.transform(self.config, self.base)

    @cached_property
    def out(self) -> Path:
        """The run folder."""
        now = time.strftime("%Y%m%d-%H%M%S")
        return self.config.out or Path("runs") / self.name / now


def run(setting: Setting, resume: bool = False) -> dict[str, Any]:
    """Trains every method and writes the run folder.

    Args:
      setting: what to run.
      resume: go on with the interrupted run in `config.out`. Methods that are in its
        `results.json` are not trained again.

    Raises:
      SystemExit: the run folder holds something already, or a loss was not finite.
    """
    config, task, out = setting.config, setting.task, setting.out
    results = _begin(out, config, resume)
    methods = {"linear": _linear, "lora": _lora, "snella": _snella}
    for method in config.methods:
        if method not in results:
            try:
                results[method] = methods[method](setting)
            except FloatingPointError as error:
                raise SystemExit(f"{TITLES[method]}: {error}.") from error
            except KeyboardInterrupt:
                raise SystemExit(f"Go on with it by --resume {out}") from None
            done = {name: dataclasses.asdict(each) for name, each in results.items()}
            _write(out / "results.json", done)
    summary = {
        "task": task.name,
        "seed": config.seed,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} host cores",
        "versions": {m.__name__: m.__version__ for m in (snella, jax, flax)},
        "methods": {m: dataclasses.asdict(results[m]) for m in config.methods},
    }
    _write(out / "summary.json", summary)
    setting.console.print(_table(task, results))
    setting.console.print(f"Everything is in {out}", soft_wrap=True)
    return summary


def _begin(out: Path, config: RunConfig, resume: bool) -> dict[str, Result]:
    """Makes the run folder, or reads what an interrupted run finished in it."""
    if resume:
        done = out / "results.json"
        results = json.loads(done.read_text()) if done.exists() else {}
        return {name: Result(**result) for name, result in results.items()}
    if out.exists() and any(p.suffix != ".partial" for p in out.iterdir()):
        raise SystemExit(
            f"{out} is not empty: name another folder with --out, or go on with the "
            f"run in it with --resume {out}."
        )
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "config.json", configs.as_dict(config))
    return {}


def _linear(setting: Setting) -> Result:
    loaded = pipeline.in_memory(setting.task, setting.transform)
    with setting.console.status("linear probe"):
        strengths = setting.config.linear.strengths
        probe = linear_probe.train(setting.base, loaded, strengths)
    metrics.keep(setting.out, "linear", 0)
    metrics.log(setting.out, {"method": "linear", **dataclasses.asdict(probe)})
    return Result(
        test_accuracy=probe.test_accuracy,
        val_accuracy=probe.val_accuracy,
        trainable=probe.trainable,
        seconds_per_step=probe.seconds_per_step,
        density=None,
        weights_moved=0,
    )


def _lora(setting: Setting) -> Result:
    model = ADAPTED["lora"](setting.config)(setting.base)
    rows, model = _followed("lora", setting, model)
    return Result(
        test_accuracy=train.evaluate(model, setting.task.test, setting.transform),
        val_accuracy=rows[-1]["val_accuracy"],
        trainable=_size(model),
        seconds_per_step=_median_seconds(rows),
        density=1.0,
        weights_moved=lora.weights_moved(model),
    )


def _snella(setting: Setting) -> Result:
    config, settings = setting.config, setting.config.snella
    model = ADAPTED["snella"](config)(setting.base)
    adapter = settings.adapter(config.targets, config.trainable)
    weights = snella.adapted_weights(model)
    rows, model = _followed(
        "snella",
        setting,
        model,
        watch=(snella.track_importance(settings.beta1, settings.beta2),),
        schedule=adapter.schedule(weights, config.epochs, power=settings.power),
    )
    if moves := [row for row in rows if "importance" in row]:
        figures.allocation(setting.out / "figures" / "allocation.png", moves)
    plain = snella.merge(model)
    return Result(
        test_accuracy=train.evaluate(plain, setting.task.test, setting.transform),
        val_accuracy=rows[-1]["val_accuracy"],
        trainable=_size(model),
        seconds_per_step=_median_seconds(rows),
        density=rows[-1]["density"],
        weights_moved=_moved(setting.base, plain, config.targets),
    )


def _with_lora(config: RunConfig) -> Callable[[ViT], Any]:
    where = config.targets, config.trainable
    seed, rank = config.seed + 1, config.lora.rank
    return lambda base: lora.adapt(base, *where, rank, nnx.Rngs(seed))


def _with_snella(config: RunConfig) -> Callable[[ViT], Any]:
    adapter = config.snella.adapter(config.targets, config.trainable)
    return lambda base: snella.adapt(base, adapter, rngs=nnx.Rngs(config.seed + 1))


ADAPTED = {"lora": _with_lora, "snella": _with_snella}


def _followed(
    method: str, setting: Setting, model: Any, **options: Any
) -> tuple[list[dict[str, Any]], Any]:
    """Trains behind a progress bar and logs every epoch.

    Returns:
      The rows of all epochs, and the model as the last one left it.
    """
    config, out = setting.config, setting.out
    settings = getattr(config, method)
    recipe = train.Recipe(
        epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        batch=config.batch,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        seed=config.seed,
    )
    with contextlib.closing(Checkpoints(out / "checkpoints" / method)) as saved:
        trainer = train.Trainer(
            model, setting.task, recipe, setting.transform, checkpoints=saved, **options
        )
        metrics.keep(out, method, trainer.passed)
        _watched(method, trainer, out, setting.console)
    return metrics.of(out, method), trainer.model


def _watched(method: str, trainer: train.Trainer, out: Path, console: Console) -> None:
    """Runs the epochs that are left, with a bar and a row for each."""
    with Progress(
        TextColumn(f"{TITLES[method]:12}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        total = trainer.recipe.epochs * trainer.steps
        passed = trainer.passed * trainer.steps
        shown = bar.add_task("compiling", total=total, completed=passed)
        for epoch in trainer.epochs(lambda _: bar.advance(shown)):
            metrics.log(out, _row(method, epoch))
            bar.update(shown, description=_brief(epoch, trainer.recipe.epochs))


def _row(method: str, epoch: train.Epoch) -> dict[str, Any]:
    row = {"method": method, **vars(epoch)}
    moved = row.pop("moved")
    if moved is not None:
        row["importance"] = dict(zip(moved.names, moved.scores.tolist(), strict=True))
        row["budget"] = dict(zip(moved.names, moved.budgets.tolist(), strict=True))
        capacities = moved.capacities.tolist()
        row["capacity"] = dict(zip(moved.names, capacities, strict=True))
    return row


def _brief(epoch: train.Epoch, epochs: int) -> str:
    density = "" if epoch.density is None else f"  density {epoch.density:.2f}"
    return (
        f"epoch {epoch.epoch}/{epochs}  loss {epoch.train_loss:.3f}  "
        f"val {epoch.val_accuracy:.1%}{density}"
    )


def _table(task: Task, results: dict[str, Result]) -> Table:
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


def _median_seconds(rows: list[dict[str, Any]]) -> float:
    return float(np.median([row["seconds_per_step"] for row in rows]))


def _moved(base: nnx.Module, plain: nnx.Module, targets: str) -> int:
    before, after = (select(model, targets) for model in (base, plain))
    return sum(
        int(jnp.sum(before[path].kernel[...] != after[path].kernel[...]))
        for path in before
    )


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
