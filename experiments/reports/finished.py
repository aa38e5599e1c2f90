"""Finished runs, read from their folders."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import files
from experiments.config import run_config
from experiments.config.dreambooth import DreamboothConfig
from experiments.config.images import ImageConfig
from experiments.config.language import LanguageConfig
from experiments.config.polyp import PolypConfig
from experiments.config.run_config import WHERE, RunConfig
from experiments.methods import registry
from experiments.paths import stem
from experiments.reports.figures import ACCURACY
from experiments.tasks import catalogue
from experiments.training.answers import accuracy_of
from experiments.training.objective import Metric

# LoRA's factors in these did not decay while decay went by the number of their axes:
# runs from then are not seeds of later ones.
UNDECAYED = ("spt_lora", "noah")
UNDECAYED_NOTE = "factors without decay"
# Keys of summaries that name the data, for kinds of runs whose config has no task.
NAMED = {LanguageConfig: "name", DreamboothConfig: "task"}
IRRELEVANT = (*WHERE, "seed", "methods", "source")
LOOKS = "eval_every", "eval_last"  # they decide which round is best, nothing else


@dataclasses.dataclass(frozen=True)
class Run:
    """A method of a finished run.

    Attributes:
      task: name in the catalogue, or that of the folder or file.
      method: name of the method in tables, with its rank.
      setup: model and protocol, which may differ between the columns of a table.
      settings: settings that have to agree for two runs to be seeds of one another.
      result: the method's entry of `summary.json`.
      metric: metric that tables show; older runs all have accuracy.
    """

    folder: Path
    task: str
    method: str
    setup: str
    seed: int
    settings: dict[str, Any]
    result: dict[str, Any]
    metric: Metric = ACCURACY


def collect(
    paths: Iterable[Path], console: Console, metric: str | None = None
) -> list[Run]:
    """Reads the finished runs in folders and below them, a `Run` for each method.

    A run with `protocol=final` and the settings that the search of another one chose is
    a seed of that one, and has its setup.

    Args:
      console: where folders without a finished run are named.
      metric: name of the metric of all; None for the first of each.

    Raises:
      ValueError: a folder is missing, none has a finished run, or one has it without
        its `config.json` or that metric.
    """
    found: dict[Path, list[Run]] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"There is no finished run in {path}, which is missing.")
        summaries = sorted(path.rglob("summary.json"))
        if not summaries:
            said = f"left out {path}, where there is no finished run (summary.json)"
            console.print(said, style="yellow", soft_wrap=True)
        for summary in summaries:
            found.setdefault(summary.parent.resolve(), _runs(summary.parent, metric))
    if not found:
        raise ValueError("There is no finished run (summary.json) in any folder.")
    return _joined([run for runs in found.values() for run in runs])


def label(method: str, settings: dict[str, Any]) -> str:
    """Returns the name of a method in tables, with its rank if it has one."""
    return registry.title(method) + (
        f"-{settings['rank']}" if "rank" in settings else ""
    )


def _runs(where: Path, named: str | None) -> list[Run]:
    summary, config = (files.read(where / f"{n}.json") for n in ("summary", "config"))
    if config is None:
        raise ValueError(f"{where} has a summary.json without its config.json.")
    kind = _kind(config)
    weights = stem(config["model"]) + ", random" * config.get("random_weights", False)
    # Of a concept there is one protocol; others say it.
    said = [config[own] for own in ("template", "protocol") if own in config]
    setup = ", ".join([weights, *said, *["searched"] * config["search"]])
    metric = _metric(summary, named, where)
    task = _task(config["task"]) if "task" in config else summary[NAMED[kind]]
    usual = run_config.as_dict(kind())
    filled = usual | config  # which may be older than some fields
    runs = []
    for method, result in summary["methods"].items():
        own = {**usual[method], **config[method]}
        shared = {k: v for k, v in filled.items() if not isinstance(v, dict)}
        settings = {k: v for k, v in shared.items() if k not in IRRELEVANT}
        settings |= {f"{method}.{name}": value for name, value in own.items()}
        if method in UNDECAYED:
            settings["decay of LoRA's factors"] = result.get("decayed") is not None
        if config["search"] or method == "linear":  # whose strengths go on, too
            settings["grid"] = config.get("grid")
        run = Run(
            folder=where,
            task=task,
            method=label(method, own),
            setup=setup,
            seed=config["seed"],
            settings=settings,
            result=result,
            metric=metric,
        )
        by_test = {LanguageConfig: _by_test, PolypConfig: _by_set}
        runs += by_test[kind](run) if kind in by_test else [run]
    return runs


def _joined(runs: list[Run]) -> list[Run]:
    """Returns the runs, those with what a searched one chose as its seeds."""
    searched = [run for run in runs if run.settings.get("search")]

    def own(run: Run) -> Run:
        for other in () if run in searched else searched:
            same = (other.method, other.task) == (run.method, run.task)
            if same and _comparable(_chosen(other)) == _comparable(run.settings):
                return dataclasses.replace(
                    run, setup=other.setup, settings=other.settings
                )
        return run

    return [own(run) for run in runs]


def _chosen(run: Run) -> dict[str, Any]:
    """Returns the settings of a run with what the search of this one chose."""
    chosen = run.result.get("settings") or {}
    values = {
        key: chosen.get(key.partition(".")[2], value)
        for key, value in run.settings.items()
    }
    final = {"protocol": "final"} if "protocol" in values else {}
    return values | final | {"search": False}


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings without those of a search and of which rounds are looked at."""
    left_out = {"grid", "search_epochs", "search_steps", *LOOKS}
    return {name: own for name, own in settings.items() if name not in left_out}


def _metric(summary: Mapping[str, Any], name: str | None, where: Path) -> Metric:
    """Returns the metric of that name, or the first."""
    known = [Metric(**metric) for metric in summary.get("metrics", ())] or [ACCURACY]
    found = [metric for metric in known if name in (None, metric.name)]
    if not found:
        names = ", ".join(metric.name for metric in known)
        raise ValueError(f"{where} has no metric {name!r}: expected one of {names}.")
    return found[0]


def _kind(config: Mapping[str, Any]) -> type[RunConfig]:
    """Returns the class of a run's config, by what only that one has."""
    if "template" in config:
        return LanguageConfig
    if "precondition" in config:
        return DreamboothConfig
    return PolypConfig if "pooling" in config else ImageConfig


def _by_set(run: Run) -> list[Run]:
    """Returns a run on masks, and one for each of its further sets."""
    name = run.metric.name
    kept = {key: run.result.get(key) for key in ("trainable", "settings")}
    others = [
        dataclasses.replace(run, task=own, result={**kept, f"test_{name}": found[name]})
        for own, found in run.result["tests"].items()
    ]
    return [run, *others]


def _by_test(run: Run) -> list[Run]:
    """Returns a run for each test of a run on questions, with its accuracy alone."""
    prefix = f"test_{accuracy_of('')}"
    found = {
        name.removeprefix(prefix): value
        for name, value in run.result.items()
        if name.startswith(prefix) and value is not None
    }
    kept = {key: run.result.get(key) for key in ("trainable", "settings")}
    return [
        dataclasses.replace(
            run, task=test, metric=ACCURACY, result={**kept, "test_accuracy": value}
        )
        for test, value in found.items()
    ]


def _task(name: str) -> str:
    """Returns the name of a task in tables; of your own, that of its folder or file."""
    if name in catalogue.ENTRIES:
        return name
    own = stem(name)
    return f"{own} (own)" if own in catalogue.ENTRIES else own
