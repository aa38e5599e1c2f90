"""One run: every method of a config on its task, into a run folder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx

import snella_jax as snella
from experiments import files
from experiments.config import run_config
from experiments.data import fingerprint
from experiments.methods import registry
from experiments.reports import figures, finished
from experiments.runs import folder, search
from experiments.runs.result import Result, absent
from experiments.runs.setup import Prepared
from experiments.runs.train_method import tune
from experiments.training import evaluation, metric_log
from experiments.training.fit import Fitted
from experiments.training.objective import followed
from experiments.training.recipe import Recipe
from experiments.training.stopping import Stopped, at_once
from snella_jax.nnx.coverage import coverage


class RunFailed(SystemExit):
    """A method could not be trained; what the run finished is in its folder."""


def run(prepared: Prepared, resume: bool = False) -> dict[str, Any]:
    """Trains every method, writes the run folder, and returns `summary.json`.

    Args:
      prepared: what to run.
      resume: go on with the interrupted run in `prepared.out`. Methods that are in its
        `results.json` are not trained again.

    Raises:
      RunFailed: a loss was not finite, a fit did not converge, memory ran out, or
        what began in the folder had other data or weights.
      SystemExit: the folder holds something already or cannot be written to, or the run
        was interrupted; says how to go on.
      Stopped: a signal told it to stop.
    """
    out = prepared.out
    try:
        with at_once():
            return complete(prepared, resume)
    except Stopped as stop:
        again = f"{stop} Go on with it by --resume {out}"
        prepared.console.print(again, soft_wrap=True)
        raise
    except files.MismatchError as error:
        raise RunFailed(str(error)) from error
    except OSError as error:
        raise SystemExit(
            f"{error}\nWhat is done is in {out}; go on with --resume {out} once that "
            "is mended."
        ) from error
    except KeyboardInterrupt:
        raise SystemExit(f"Go on with it by --resume {out}") from None


def complete(prepared: Prepared, resume: bool = False) -> dict[str, Any]:
    """`run` for programs that know better how to go on: errors are what they are."""
    with folder.held(prepared.out, resume):
        return _run(prepared)


def _run(prepared: Prepared) -> dict[str, Any]:
    config, task, out = prepared.config, prepared.task, prepared.out
    began = begin(prepared)
    done = files.read(out / "results.json") or {}
    for method in config.methods:
        if method not in done:
            done[method] = _result(method, prepared).as_dict()
            files.write(out / "results.json", done)
    results = {name: done[name] for name in config.methods}
    summary = {
        "task": task.name,
        "name": prepared.name,
        "seed": config.seed,
        "followed": prepared.followed,
        "metrics": [dataclasses.asdict(m) for m in prepared.objective.metrics],
        **began,
        "methods": results,
    }
    if files.is_primary():
        _draw(prepared)
    files.write(out / "summary.json", summary)
    prepared.report(results)
    prepared.console.print(f"Everything is in {out}", soft_wrap=True)
    return summary


def begin(prepared: Prepared) -> dict[str, Any]:
    """Writes what runs and on what, or reads what began; gives the environment.

    Prints how much of the base the targets cover.

    Raises:
      MismatchError: what began in the folder has other settings, data or weights, or
        a method in its midst that trained otherwise then.
    """
    config, path = prepared.config, prepared.out / "config.json"
    known = files.read(path)
    if known is None:
        files.write(path, run_config.as_dict(config))
    elif other := run_config.differing(known, config):
        raise files.MismatchError(
            f"{prepared.out} was begun with another {', '.join(other)}: expected those "
            f"of {path}. Without that folder it begins anew."
        )
    _same_inputs(prepared, begun=known is not None)
    if config.adapted:
        found = coverage(prepared.base, config.targets)
        whole = f"; trains whole: {config.trainable}" if config.trainable else ""
        prepared.console.print(f"Targets: {found}{whole}", soft_wrap=True)
    return folder.started(prepared.out, prepared.mesh, prepared.console)


def _same_inputs(prepared: Prepared, begun: bool) -> None:
    """Writes fingerprints of the data and the weights, or compares them."""
    path, now = prepared.out / "inputs.json", prepared.inputs
    known = files.read(path)
    if known is None:
        if begun:
            _check_decay(prepared)
        files.write(path, now)
        if begun:
            prepared.console.print(
                f"{prepared.out} has no {path.name}: it goes on, whether its "
                f"{prepared.unit}, labels and weights are those that it began with "
                "or not.",
                style="yellow",
                soft_wrap=True,
            )
    elif found := fingerprint.differences(known, now):
        raise files.MismatchError(
            f"{prepared.out} was begun with others: {'; '.join(found)}. It goes on "
            "only with what it began with; with these, begin another run."
        )


def _check_decay(prepared: Prepared) -> None:
    """Raises where a method would end with decay that began without it.

    A folder without fingerprints may be from before LoRA's factors decayed in all.
    """
    config, out = prepared.config, prepared.out
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


def _result(method: str, prepared: Prepared) -> Result:
    try:
        if method in prepared.config.stepless:
            return prepared.stepless(method)
        return _by_steps(method, prepared)
    except (FloatingPointError, RuntimeError) as error:
        name = prepared.task.name
        raise RunFailed(f"{name}, {registry.title(method)}: {error}.") from error


def _by_steps(method: str, prepared: Prepared) -> Result:
    if prepared.config.search:
        config = search.chosen(method, prepared)
        prepared = dataclasses.replace(prepared, config=config)
    fitted, own = tune(method, prepared), prepared.config.settings[method]
    _save_adapter(method, prepared, fitted.model)
    merged, best = own.merged(fitted.model), fitted.best_row
    return Result(
        metrics=_metrics(method, prepared, fitted, merged)
        | prepared.besides(method, merged),
        trainable=optax.tree.size(nnx.state(fitted.model, nnx.Param)),
        decayed=_decayed(prepared.config.recipe(method), fitted.model),
        seconds_per_step=metric_log.median(fitted.rows, "seconds_per_step"),
        best_epoch=best["epoch"] if best else None,
        density=fitted.last_row.get("density"),
        weights_moved=own.moved(prepared.base, merged, prepared.config.scope()),
        settings=own.searched,
    )


def _save_adapter(method: str, prepared: Prepared, model: Any) -> None:
    """Writes a method's adapter, if it has one: a LoRA as PEFT's, if that can be."""
    own, like = prepared.config.settings[method], prepared.published
    if (adapted := own.adapter(model)) is None:
        return
    place, base = prepared.out / "adapters" / method, prepared.model
    if own.low_rank:
        try:
            snella.save(adapted, place, format="peft", like=like, base=base)
            return
        except ValueError as reason:
            if like is not None:
                prepared.console.print(
                    f"{registry.title(method)}: {place} is in the library's own format "
                    f"and not in PEFT's. {reason}",
                    style="yellow",
                    soft_wrap=True,
                )
    snella.save(adapted, place, base=base)


def _metrics(
    method: str, prepared: Prepared, fitted: Fitted, merged: Any
) -> dict[str, float | None]:
    """Returns the metrics of the last round, the best one and the mean weights."""
    own, objective = prepared.config.settings[method], prepared.objective
    last, best = fitted.last_row, fitted.best_row
    names = [metric.name for metric in objective.metrics]

    def tested(model: Any) -> Mapping[str, float]:
        where = prepared.task.test, prepared.data.transform, prepared.mesh
        return evaluation.evaluate(model, *where, objective).metrics

    found = absent(objective)

    def note(kind: str, values: Mapping[str, float | None]) -> None:
        found.update({f"{kind}_{name}": values.get(name) for name in names})

    final = prepared.tested(method, merged)
    note("test", final)
    note("val", {name: last.get(f"val_{name}") for name in names})
    if fitted.ema_model is not None:
        note("ema_test", tested(own.merged(fitted.ema_model)))
    if best is not None:
        of_best = {name: best.get(f"test_{name}") for name in names}
        if None in of_best.values():  # validation was followed
            same = best["epoch"] == last["epoch"]
            of_best = final if same else tested(own.merged(fitted.best_model))
        note("best_test", of_best)
        note("best_val", {name: best.get(f"val_{name}") for name in names})
    return found


def _draw(prepared: Prepared) -> None:
    """Draws a run's curves; says of which rounds there is nothing to draw."""
    config, pictures = prepared.config, prepared.out / "figures"
    unit, examples = "epoch", len(prepared.data.train)
    rows: dict[str, list[dict[str, Any]]] = {
        method: metric_log.of(prepared.out, method) for method in config.adapted
    }
    for method, own in rows.items():
        recipe = config.recipe(method)
        unit = recipe.unit
        if lost := metric_log.lacking(own, recipe.rounds(examples).count, unit):
            prepared.console.print(
                f"{registry.title(method)}: {prepared.out / metric_log.NAME} has lost "
                f"{lost}, which curves and results lack.",
                style="yellow",
                soft_wrap=True,
            )
    if rows:
        titled = {registry.title(method): own for method, own in rows.items()}
        metric = followed(prepared.objective)
        figures.curves(
            pictures / "curves.png", titled, prepared.task.name, metric, unit
        )
    moves = [row for row in rows.get("snella", ()) if "importance" in row]
    if moves:
        figures.allocation(pictures / "allocation.png", moves, unit)
        name = prepared.task.name
        how = name, unit, prepared.block_of
        figures.sparsity(pictures / "sparsity.png", moves[-1], *how)


def _decayed(recipe: Recipe, model: nnx.Module) -> int:
    state = nnx.state(model, nnx.Param)
    sizes = jax.tree.map(lambda x, decays: x.size * decays, state, recipe.decays(state))
    return sum(jax.tree.leaves(sizes))
