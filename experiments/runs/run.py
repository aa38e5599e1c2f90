"""One run: every method of a config on its task, into a run folder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx
from rich.table import Table

import snella_jax as snella
from experiments import files
from experiments.config import run_config
from experiments.data import fingerprint
from experiments.methods import linear_probe, registry
from experiments.reports import figures, finished
from experiments.runs import folder, search
from experiments.runs.setup import Prepared
from experiments.runs.train_method import tune
from experiments.training import evaluation, metric_log
from experiments.training.fit import Fitted
from experiments.training.objective import Metric, Objective
from experiments.training.recipe import Recipe
from snella_jax.nnx.selection import has_adapters
from snella_jax.nnx.targets import select

KINDS = ("test", "val", "best_val", "best_test", "ema_test")  # of metrics in results
SHOWN = 6  # predictions in a picture


class RunFailed(SystemExit):
    """A method could not be trained; what the run finished is in its folder."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of one method: its line in the table and its entry in `summary.json`.

    Attributes:
      metrics: for every metric of the objective, by name, with None for what there is
        not: `test_NAME`, on the test split, of the last round: the one to compare;
        `ema_test_NAME`, the same of the running mean of the weights; `val_NAME`, on the
        validation split, of the last round (for the linear probe, of the head that was
        fitted without it), None where it was trained on; `best_val_NAME` and
        `best_test_NAME`, of the best round. Where validation was followed, the latter
        is early stopping; where the test split was (`protocol=released`), it was chosen
        by what it measures, as in the paper.
      trainable: number of parameters that train, the head's among them.
      seconds_per_step: median; of an L-BFGS iteration for the linear probe; None, as
        whatever else only the rows of `metrics.jsonl` say, where these are lost.
      weights_moved: number of weights of the targeted kernels that differ after
        training.
      best_epoch: the best round on what was followed, of equals the last; None where
        nothing was.
      density: fraction of the adapted weights that may move; None without budgets.
      decayed: number of parameters that weight decay is for; None in older folders.
      settings: rate, decay and density that were used, perhaps those of a search.
    """

    metrics: dict[str, float | None]
    trainable: int
    seconds_per_step: float | None
    weights_moved: int
    best_epoch: int | None = None
    density: float | None = None
    decayed: int | None = None
    settings: dict[str, float] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns the entry of `results.json`, with the metrics beside the rest."""
        values = dataclasses.asdict(self)
        return values.pop("metrics") | values


def run(setting: Prepared, resume: bool = False) -> dict[str, Any]:
    """Trains every method, writes the run folder, and returns `summary.json`.

    Args:
      setting: what to run.
      resume: go on with the interrupted run in `setting.out`. Methods that are in its
        `results.json` are not trained again.

    Raises:
      RunFailed: a loss was not finite, a fit did not converge, memory ran out, or
        what began in the folder had other data or weights.
      SystemExit: the folder holds something already or cannot be written to, or the run
        was interrupted; says how to go on.
    """
    out = setting.out
    try:
        return complete(setting, resume)
    except files.MismatchError as error:
        raise RunFailed(str(error)) from error
    except OSError as error:
        raise SystemExit(
            f"{error}\nWhat is done is in {out}; go on with --resume {out} once that "
            "is mended."
        ) from error
    except KeyboardInterrupt:
        raise SystemExit(f"Go on with it by --resume {out}") from None


def complete(setting: Prepared, resume: bool = False) -> dict[str, Any]:
    """`run` for programs that know better how to go on: errors are what they are."""
    with folder.held(setting.out, resume):
        return _run(setting)


def _run(setting: Prepared) -> dict[str, Any]:
    config, task, out = setting.config, setting.task, setting.out
    began = begin(setting)
    done = files.read(out / "results.json") or {}
    for method in config.methods:
        if method not in done:
            done[method] = _result(method, setting).as_dict()
            files.write(out / "results.json", done)
    results = {name: done[name] for name in config.methods}
    summary = {
        "task": task.name,
        "name": config.task,
        "seed": config.seed,
        "followed": setting.followed,
        "metrics": [dataclasses.asdict(m) for m in setting.objective.metrics],
        **began,
        "methods": results,
    }
    if files.is_primary():
        _draw(setting)
    files.write(out / "summary.json", summary)
    setting.console.print(_table(setting, results))
    setting.console.print(f"Everything is in {out}", soft_wrap=True)
    return summary


def begin(setting: Prepared) -> dict[str, Any]:
    """Writes what runs and on what, or reads what began; gives the environment.

    Raises:
      MismatchError: what began in the folder has other settings, data or weights, or
        a method in its midst that trained otherwise then.
    """
    config, path = setting.config, setting.out / "config.json"
    known = files.read(path)
    if known is None:
        files.write(path, run_config.as_dict(config))
    elif other := run_config.differing(known, config):
        raise files.MismatchError(
            f"{setting.out} was begun with another {', '.join(other)}: expected those "
            f"of {path}. Without that folder it begins anew."
        )
    _same_inputs(setting, begun=known is not None)
    return folder.started(setting.out, setting.mesh, setting.console)


def _same_inputs(setting: Prepared, begun: bool) -> None:
    """Writes fingerprints of the data and the weights, or compares them."""
    path, now = setting.out / "inputs.json", setting.inputs
    known = files.read(path)
    if known is None:
        if begun:
            _check_decay(setting)
        files.write(path, now)
        if begun:
            setting.console.print(
                f"{setting.out} has no {path.name}: it goes on, whether its images, "
                "labels and weights are those that it began with or not.",
                style="yellow",
                soft_wrap=True,
            )
    elif found := fingerprint.differences(known, now):
        raise files.MismatchError(
            f"{setting.out} was begun with others: {'; '.join(found)}. It goes on only "
            "with what it began with; with these, begin another run."
        )


def _check_decay(setting: Prepared) -> None:
    """Raises where a method would end with decay that began without it.

    A folder without fingerprints may be from before LoRA's factors decayed in all.
    """
    config, out = setting.config, setting.out
    done = files.read(out / "results.json") or {}
    for method in finished.UNDECAYED:
        tried = config.grid.weight_decays if config.search else ()
        decays = any((config.settings[method].weight_decay, *tried))
        if method not in config.methods or method in done or not decays:
            continue
        # NOAH's supernet has checkpoints of its own.
        left = f"checkpoints/{method}*/[0-9]*", f"search/{method}"
        if any(found for pattern in left for found in out.glob(pattern)):
            raise files.MismatchError(
                f"{registry.title(method)} began in {out} when weight decay did not "
                "reach its LoRA factors, and would end with it: expected a folder in "
                "which it has not begun, or is finished. Begin another run."
            )


def _result(method: str, setting: Prepared) -> Result:
    try:
        return (
            _linear(setting)
            if method == registry.LINEAR
            else _by_steps(method, setting)
        )
    except (FloatingPointError, RuntimeError) as error:
        name = setting.task.name
        raise RunFailed(f"{name}, {registry.title(method)}: {error}.") from error


def _linear(setting: Prepared) -> Result:
    config = setting.config
    with setting.console.status("linear probe"):
        probe = linear_probe.train(
            setting.base,
            setting.task,
            setting.transforms[1],
            setting.mesh,
            config.linear.strengths,
            config.grid.lr_extensions,
            refit=config.trains_on_all,
            weights=config.model,
        )
    if files.is_primary():
        metric_log.keep(setting.out, "linear", 0)
        metric_log.log(setting.out, {"method": "linear", **dataclasses.asdict(probe)})
    found = {"test_accuracy": probe.test_accuracy, "val_accuracy": probe.val_accuracy}
    return Result(
        metrics=_absent(setting.objective) | found,
        trainable=probe.trainable,
        seconds_per_step=probe.seconds_per_step,
        weights_moved=0,
        settings={"strength": probe.strength},
    )


def _by_steps(method: str, setting: Prepared) -> Result:
    if setting.config.search:
        config = search.chosen(method, setting)
        setting = dataclasses.replace(setting, config=config)
    fitted, own = tune(method, setting), setting.config.settings[method]
    if has_adapters(fitted.model):
        name, place = setting.config.model, setting.out / "adapters" / method
        snella.save(fitted.model, place, base=name)
    merged, best = own.merged(fitted.model), fitted.best_row
    return Result(
        metrics=_metrics(method, setting, fitted, merged),
        trainable=optax.tree.size(nnx.state(fitted.model, nnx.Param)),
        decayed=_decayed(setting.config.recipe(method), fitted.model),
        seconds_per_step=metric_log.median(fitted.rows, "seconds_per_step"),
        best_epoch=best["epoch"] if best else None,
        density=fitted.last_row.get("density"),
        weights_moved=own.moved(setting.base, merged, setting.config.scope()),
        settings=own.searched,
    )


def _absent(objective: Objective) -> dict[str, float | None]:
    """Returns a None for each of a result's metrics."""
    return {f"{kind}_{m.name}": None for m in objective.metrics for kind in KINDS}


def _metrics(
    method: str, setting: Prepared, fitted: Fitted, merged: Any
) -> dict[str, float | None]:
    """Returns the metrics of the last round, the best one and the mean weights."""
    own, objective = setting.config.settings[method], setting.objective
    last, best = fitted.last_row, fitted.best_row
    names = [metric.name for metric in objective.metrics]

    def tested(model: Any, show: int = 0) -> evaluation.Evaluation:
        where = setting.task.test, setting.transforms[1], setting.mesh
        return evaluation.evaluate(model, *where, objective, show)

    found = _absent(objective)

    def note(kind: str, values: Mapping[str, float | None]) -> None:
        found.update({f"{kind}_{name}": values[name] for name in names})

    final = tested(merged, show=SHOWN)
    note("test", final.metrics)
    note("val", {name: last.get(f"val_{name}") for name in names})
    if files.is_primary():
        path = setting.out / "figures" / f"predictions_{method}.png"
        figures.predictions(path, objective, setting.task.test, final.shown)
    if fitted.ema_model is not None:
        note("ema_test", tested(own.merged(fitted.ema_model)).metrics)
    if best is not None:
        of_best = {name: best.get(f"test_{name}") for name in names}
        if None in of_best.values():  # validation was followed
            same = best["epoch"] == last["epoch"]
            of_best = (final if same else tested(own.merged(fitted.best_model))).metrics
        note("best_test", of_best)
        note("best_val", {name: best.get(f"val_{name}") for name in names})
    return found


def _draw(setting: Prepared) -> None:
    """Draws a run's curves; says of which rounds there is nothing to draw."""
    config, pictures = setting.config, setting.out / "figures"
    unit, examples = "epoch", len(setting.data.train)
    rows: dict[str, list[dict[str, Any]]] = {
        method: metric_log.of(setting.out, method) for method in config.adapted
    }
    for method, own in rows.items():
        recipe = config.recipe(method)
        unit = recipe.unit
        if lost := metric_log.lacking(own, recipe.rounds(examples).count, unit):
            setting.console.print(
                f"{registry.title(method)}: {setting.out / metric_log.NAME} has lost "
                f"{lost}, which curves and results lack.",
                style="yellow",
                soft_wrap=True,
            )
    if rows:
        titled = {registry.title(method): own for method, own in rows.items()}
        followed = setting.objective.metrics[0]
        figures.curves(
            pictures / "curves.png", titled, setting.task.name, followed, unit
        )
    moves = [row for row in rows.get("snella", ()) if "importance" in row]
    if moves:
        figures.allocation(pictures / "allocation.png", moves, unit)
        name = setting.task.name
        figures.sparsity(pictures / "sparsity.png", moves[-1], name, unit)


def _table(setting: Prepared, results: dict[str, dict[str, Any]]) -> Table:
    """Returns the table that a run ends with, of the entries of `results.json`."""
    task = setting.task
    sizes = "/".join(str(len(s)) for s in (task.train, task.validation, task.test))
    all_of = ", trained on the first two" if setting.config.trains_on_all else ""
    table = Table(title=f"{task.name}, {sizes} images to train/validate/test{all_of}")
    columns = [
        (title, kind, metric)
        for metric in setting.objective.metrics
        for title, kind in (
            ("test", "test"),
            ("best on test", "best_test"),
            ("mean weights", "ema_test"),
            ("val", "val"),
        )
        if any(r.get(f"{kind}_{metric.name}") is not None for r in results.values())
        and (kind != "best_test" or setting.followed == "test")
    ]
    many = len(setting.objective.metrics) > 1
    names = [
        f"{title} {metric.name}" if many else title for title, _, metric in columns
    ]
    layers = select(setting.base, setting.config.targets)
    targeted = sum(layer.kernel.size for layer in layers.values())
    for column in ("", *names, "trainable", "s/step", "weights moved"):
        table.add_column(column, justify="left" if not column else "right")
    for method, result in results.items():
        moved, seconds = result["weights_moved"], result["seconds_per_step"]
        table.add_row(
            registry.title(method),
            *(_shown(result, kind, metric) for _, kind, metric in columns),
            f"{result['trainable']:,}",
            "" if seconds is None else f"{seconds:.4f}",
            f"{moved:,} ({moved / targeted:.0%})",
        )
    if "linear" in results:
        table.caption = "a step of the linear probe is an L-BFGS iteration on features"
    return table


def _shown(result: dict[str, Any], kind: str, metric: Metric) -> str:
    value = result.get(f"{kind}_{metric.name}")
    return "" if value is None else metric.text(value, 2 if kind == "test" else 1)


def _decayed(recipe: Recipe, model: nnx.Module) -> int:
    state = nnx.state(model, nnx.Param)
    sizes = jax.tree.map(lambda x, decays: x.size * decays, state, recipe.decays(state))
    return sum(jax.tree.leaves(sizes))
