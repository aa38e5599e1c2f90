"""A search on validation: the learning rate, then the weight decay, then the density.

Every trial trains on the training split and is judged on the validation split, by the
objective's first metric, after its last round; the test split is not looked at. Of
rates that tie, the lowest is taken (above the best ones all are at chance); of other
settings the first that was tried, the method's own. `search.json` holds every trial.
"""

import dataclasses
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments import files
from experiments.config.run_config import RunConfig
from experiments.methods.method import Method
from experiments.runs.setup import Prepared
from experiments.runs.train_method import tune
from experiments.training.grid import beyond
from experiments.training.objective import Metric, followed

FILE = "search.json"


def chosen(method: str, prepared: Prepared) -> RunConfig:
    """Returns the config with the best settings of a method.

    Trials that an interrupted run finished are not repeated, and one that it began goes
    on. One whose loss is not finite counts as failed.

    Raises:
      FloatingPointError: all trials failed.
      MismatchError: what is left of an interrupted trial does not say how good it was.
    """
    path = prepared.out / FILE
    found = files.read(path) or {}
    trials: list[dict[str, Any]] = found.setdefault(method, [])
    settings = prepared.config.settings[method]
    grid, metric = prepared.config.grid, followed(prepared.objective)
    _tidy(prepared.out, method, len(trials))

    def tried(name: str, values: Iterable[float]) -> Method:
        """Returns the best settings after some values of one of them."""
        for value in values:
            changed: Any = {name: value}
            new = dataclasses.replace(settings, **changed)
            if not any(_same(trial, new) for trial in trials):
                trials.append(_trial(method, prepared, new, len(trials)))
                files.write(path, found)
                _tidy(prepared.out, method, len(trials))
        best: Any = _best(settings, trials, metric)
        return dataclasses.replace(settings, **best)

    rates = [settings.lr * factor for factor in (1.0, *grid.lr_factors)]
    settings = tried("lr", rates)
    for _ in range(grid.lr_extensions):
        further = beyond(rates, settings.lr)
        rates += further
        settings = tried("lr", further)
    settings = tried("weight_decay", grid.weight_decays)
    if settings.has_density:
        settings = tried("target_density", grid.densities)
    best = metric.rank(max(_score(trial, metric) for trial in trials))
    prepared.console.print(
        f"{settings.title}: of {len(trials)} settings {_text(settings.searched)}"
        f" is best on validation ({metric.text(best)})",
        soft_wrap=True,
    )
    return prepared.config.with_settings(**{method: settings})


def _trial(
    method: str, prepared: Prepared, settings: Method, index: int
) -> dict[str, Any]:
    out = prepared.out / "search" / method / str(index)
    metric = followed(prepared.objective)
    key = f"val_{metric.name}"
    config = prepared.config.trial().with_settings(**{method: settings})
    prepared.console.print(f"trial {index + 1}: {_text(settings.searched)}")
    trial = dataclasses.replace(prepared, config=config, out=out, located=out.parent)
    try:
        last = tune(method, trial).last_row
        if key not in last:
            raise files.MismatchError(
                f"{out} has lost the {metric.name} of its last epoch, by which a "
                "trial is judged: delete that folder for it to begin anew."
            )
        result = {key: last[key], "train_loss": last["train_loss"]}
    except FloatingPointError as error:
        prepared.console.print(f"failed: {error}", style="yellow", soft_wrap=True)
        result = {key: None, "failed": str(error)}
    return {**settings.searched, **result}


def _tidy(out: Path, method: str, trials: int) -> None:
    """Removes the checkpoints of trials that are on record; their curves stay."""
    if files.is_primary():
        for index in range(trials):
            checkpoints = out / "search" / method / str(index) / "checkpoints"
            shutil.rmtree(checkpoints, ignore_errors=True)


def _best(
    settings: Method, trials: list[dict[str, Any]], metric: Metric
) -> dict[str, float]:
    best = max(trials, key=lambda trial: (_score(trial, metric), -trial["lr"]))
    if best[f"val_{metric.name}"] is None:
        raise FloatingPointError("no trial's loss stayed finite; lower its lr")
    return {name: best[name] for name in settings.searched}


def _score(trial: dict[str, Any], metric: Metric) -> float:
    value = trial[f"val_{metric.name}"]
    return -math.inf if value is None else metric.rank(value)


def _same(trial: dict[str, Any], settings: Method) -> bool:
    return all(trial[name] == value for name, value in settings.searched.items())


def _text(settings: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())
