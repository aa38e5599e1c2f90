"""Data, model and devices of a run, checked before anything is written.

`Prepared` is what runs, searches and suites see of any kind of run; `images.py` is the
kind that classifies images.
"""

import abc
import dataclasses
import importlib.util
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from experiments import files, paths, processes
from experiments.config.run_config import RunConfig
from experiments.data import fingerprint
from experiments.data.source import Source, split
from experiments.data.task import Splits
from experiments.methods.first_stage import Staged
from experiments.reports import figures, run_table
from experiments.runs.result import Result, absent
from experiments.training import evaluation, sharding
from experiments.training.objective import Objective
from experiments.training.session import Followed, Session
from experiments.training.trainer import Data
from snella_jax.nnx.targets import select

SHOWN = 6  # predictions in a picture


@dataclasses.dataclass(frozen=True)
class Prepared(abc.ABC):
    """A run with all that it needs: config, task, model, devices and folder.

    A kind of run is a subclass.

    Attributes:
      unit: name of its examples, in the plural.
      config: what the run is.
      task: splits of the data, checked.
      base: pre-trained model.
      mesh: devices.
      console: console that progress is printed to.
      out: run folder.
      located: folder of what first stages locate; None for the run folder.
    """

    unit: ClassVar[str]

    config: RunConfig
    task: Splits
    base: Any
    mesh: Mesh
    console: Console
    out: Path
    located: Path | None = None

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Name of the data as the config gives it, for `summary.json`."""

    @property
    @abc.abstractmethod
    def model(self) -> str:
        """Name or path of the base as the config gives it."""

    @property
    def published(self) -> Path | None:
        """Folder of transformers or diffusers with the base; None if it is in none."""
        folder = paths.at_home(self.model)
        return folder if (folder / "config.json").is_file() else None

    @cached_property
    @abc.abstractmethod
    def inputs(self) -> fingerprint.Inputs:
        """Fingerprints of the data and of the base's weights."""

    @property
    @abc.abstractmethod
    def objective(self) -> Objective:
        """Loss and metrics of the task."""

    def objective_of(self, method: str) -> Objective:
        """Returns the objective that a method is measured by; usually the task's."""
        return self.objective

    @cached_property
    @abc.abstractmethod
    def data(self) -> Data:
        """Examples to train on and to follow; `transform` is that of all tests."""

    @property
    def followed(self) -> Followed | None:
        """The split that is evaluated during training."""
        return self.config.followed

    def session(self, method: str) -> Session:
        """Returns what a method receives of the run."""
        return Session(
            task=self.task,
            base=self.base,
            mesh=self.mesh,
            console=self.console,
            out=self.out,
            scope=self.config.scope(),
            recipe=self.config.recipe(method),
            objective=self.objective,
            data=self.data,
            followed=self.followed,
            wandb=self.config.wandb,
        )

    def stepless(self, method: str) -> Result:
        """Returns the result of one of the config's `stepless` methods."""
        raise NotImplementedError(f"{method} is trained by steps.")

    def as_it_is(self, method: str) -> Result:
        """Measures the base as it is, on validation and on the tests."""
        objective = self.objective_of(method)
        found: dict[str, Any] = absent(objective)
        where = self.task.validation, self.data.transform, self.mesh, objective
        splits = {
            "val": evaluation.evaluate(self.base, *where).metrics,
            "test": self.tested(method, self.base),
        }
        for kind, metrics in splits.items():
            found |= {f"{kind}_{name}": value for name, value in metrics.items()}
        return Result(
            metrics=found | self.besides(method, self.base),
            trainable=0,
            seconds_per_step=None,
            weights_moved=0,
        )

    def tested(self, method: str, model: Any) -> dict[str, float]:
        """Returns the metrics of a method's merged model on the test split."""
        where = self.task.test, self.data.transform, self.mesh, self.objective
        found = evaluation.evaluate(model, *where, show=SHOWN, look=self.look(method))
        if files.is_primary():
            self.draw(method, found.shown)
        return found.metrics

    def look(self, method: str) -> Callable[[int, Any], None] | None:
        """Returns what is called with index and output of every test example, if any.

        A method's examples are tested once.
        """
        return None

    def besides(self, method: str, model: Any) -> dict[str, Any]:
        """Returns what else is measured of a method's merged model; usually nothing."""
        return {}

    def draw(self, method: str, outputs: list[tuple[int, Any]]) -> None:
        """Draws a method's outputs for the first test examples; usually nothing."""
        return None

    def block_of(self, name: str) -> tuple[int, ...] | None:
        """Returns the block of a matrix, by which figures order it."""
        return figures.block_of(name)

    def report(self, results: Mapping[str, dict[str, Any]]) -> None:
        """Prints the table that a run ends with, of the entries of `results.json`."""
        self.console.print(self.table(results))

    def table(self, results: Mapping[str, dict[str, Any]]) -> run_table.Table:
        """Returns the table of all metrics."""
        task, config = self.task, self.config
        sizes = "/".join(str(len(s)) for s in (task.train, task.validation, task.test))
        all_of = ", trained on the first two" if config.trains_on_all else ""
        layers = select(self.base, config.targets)
        return run_table.table(
            f"{task.name}, {sizes} {self.unit} to train/validate/test{all_of}",
            results,
            self.objective.metrics,
            targeted=sum(layer.kernel.size for layer in layers.values()),
            followed=self.followed,
        )


def folder(name: str, config: RunConfig) -> Path:
    """Returns the folder of a new run; checks what can be checked without data.

    Args:
      name: of the folder among the runs, where `config.out` does not say it.

    Raises:
      ValueError, ModuleNotFoundError: it could not be made, or a package is missing.
    """
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ModuleNotFoundError("--wandb needs Weights & Biases: pip install wandb")
    out = config.out or Path("runs") / name / time.strftime("%Y%m%d-%H%M%S")
    paths.check_out(out)
    return out


def sampled(source: Source, count: int | None) -> Source:
    """Returns at most that many examples of a source, the same for every seed."""
    if count is None or count >= len(source):
        return source
    sample, _ = split(source, 0, count)
    return sample


def check_methods(config: RunConfig, base: Any) -> None:
    """Raises a `ValueError` where a method does not fit a model; computes nothing."""
    for method in config.adapted:
        adapted = nnx.eval_shape(lambda m=method: _adapted(m, config, base))
        config.recipe(method).decays(nnx.state(adapted, nnx.Param))


def _adapted(name: str, config: RunConfig, base: Any) -> Any:
    """Returns the adapted base, as if a first stage had found something."""
    method, scope = config.settings[name], config.scope()
    if isinstance(method, Staged):
        scope = dataclasses.replace(scope, places=method.typical(base, scope))
    return method.adapt(base, scope)


def check_batch(config: RunConfig, task: Splits, mesh: Mesh, unit: str) -> None:
    """Raises a `ValueError` where a batch has no place in the data or on the mesh.

    Args:
      unit: name of the examples, in the plural.
    """
    examples, devices = len(task.train), sharding.rows_of(mesh)
    if config.adapted and config.batch > examples:
        raise ValueError(
            f"batch={config.batch}: expected 1 to {examples} (training {unit})."
        )
    if config.adapted and config.batch % (devices * config.accumulate):
        raise ValueError(
            f"batch={config.batch}: {devices} devices and accumulate="
            f"{config.accumulate} do not divide it. --mesh data=N takes fewer devices."
        )
    config.check_rounds(len(task.full if config.trains_on_all else task.train))
    if config.search:  # in trials of their own length
        dataclasses.replace(config.trial(), search=True).check_rounds(examples)


def join_processes(config: RunConfig, console: Console) -> None:
    """Finds the other processes of a distributed run, before any device is used.

    Each says what it sees; then one of them prints.
    """
    if config.distributed:
        processes.join()
        console.quiet = not files.is_primary()
