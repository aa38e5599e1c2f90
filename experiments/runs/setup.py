"""Task, model and devices of a config, checked before anything is written."""

import dataclasses
import importlib.util
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from experiments import files, paths
from experiments.config.run_config import RunConfig
from experiments.data import check, fingerprint, source
from experiments.data.task import Task
from experiments.data.transforms import Transform
from experiments.methods.first_stage import Staged
from experiments.pretrained import base_models
from experiments.tasks import catalogue
from experiments.training import sharding
from experiments.training.classification import Classification
from experiments.training.objective import Objective
from experiments.training.session import Followed, Session
from experiments.training.trainer import Data
from snella_jax.models import Model


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run with all that it needs: config, task, model, devices and folder.

    Attributes:
      config: what the run is.
      task: splits of the data, checked.
      base: pre-trained model.
      mesh: devices.
      console: console that progress is printed to.
      out: run folder.
      located: folder of what first stages locate; None for the run folder.
    """

    config: RunConfig
    task: Task
    base: Model
    mesh: Mesh
    console: Console
    out: Path
    located: Path | None = None

    @cached_property
    def transforms(self) -> tuple[Transform, Transform]:
        """Transforms of training images, and of all others."""
        return base_models.transforms(self.config, self.base)

    @cached_property
    def inputs(self) -> fingerprint.Inputs:
        """Fingerprints of the data and of the base's weights."""
        splits = self.task.fingerprint
        if splits is None:
            raise ValueError(f"{self.task.name} was not looked at by check.checked.")
        return fingerprint.of(splits, self.task.classes, base_models.files(self.config))

    @property
    def followed(self) -> Followed | None:
        """The split that is evaluated during training."""
        if not self.config.trains_on_all:
            return "validation"
        return "test" if self.config.protocol == "released" else None

    @property
    def objective(self) -> Objective:
        """Loss and metrics of the task."""
        return Classification(self.task.names)

    @property
    def data(self) -> Data:
        """Examples that the protocol trains on and follows."""
        task, config = self.task, self.config
        return Data(
            task.full if config.trains_on_all else task.train,
            getattr(task, self.followed) if self.followed else None,
            *self.transforms,
            mix=config.mix(task.classes),
        )

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


def prepared(name: str, config: RunConfig, console: Console) -> Prepared:
    """Returns everything that a run needs; writes nothing.

    Args:
      name: of the folder among the runs, where `config.out` does not say it.

    Raises:
      ValueError, OSError, ModuleNotFoundError: something is wrong or missing; says what
        was expected and what to do.
    """
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ModuleNotFoundError("--wandb needs Weights & Biases: pip install wandb")
    out = config.out or Path("runs") / name / time.strftime("%Y%m%d-%H%M%S")
    paths.check_out(out)
    mesh = sharding.make(config.mesh)
    task = _sampled(catalogue.load(config.task, config.data_dir), config.test_images)
    check_classes(task)
    if said := base_models.taken(config):
        console.print(said, style="yellow", markup=False, soft_wrap=True)
    base = base_models.load(config, task.classes)
    check_batch(config, task, mesh)
    check_methods(config, base)
    task = check.checked(task, console, config.skip_corrupt, to_train=True)
    check_batch(config, task, mesh)
    return Prepared(config, task, base, mesh, console, out)


def _sampled(task: Task, count: int | None) -> Task:
    """Returns the task with at most that many of its test images."""
    if count is None or count >= len(task.test):
        return task
    sample, _ = source.split(task.test, 0, count)
    return dataclasses.replace(task, test=sample)


def check_classes(task: Task) -> None:
    """Raises a `ValueError` on a task of one class, which teaches nothing."""
    if task.classes < 2:
        name = f" ({task.names[0]})" if task.names else ""
        raise ValueError(
            f"{task.name}: all images are of one class{name}, expected two classes or "
            "more."
        )


def check_methods(config: RunConfig, base: Model) -> None:
    """Raises a `ValueError` where a method does not fit a model; computes nothing."""
    for method in config.adapted:
        adapted = nnx.eval_shape(lambda m=method: _adapted(m, config, base))
        config.recipe(method).decays(nnx.state(adapted, nnx.Param))


def _adapted(name: str, config: RunConfig, base: Model) -> Any:
    """Returns the adapted base, as if a first stage had found something."""
    method, scope = config.settings[name], config.scope()
    if isinstance(method, Staged):
        scope = dataclasses.replace(scope, places=method.typical(base, scope))
    return method.adapt(base, scope)


def join_processes(config: RunConfig, console: Console) -> None:
    """Finds the other processes of a distributed run, before any device is used.

    One of them prints.
    """
    if config.distributed:
        jax.distributed.initialize()
        console.quiet = not files.is_primary()


def check_batch(config: RunConfig, task: Task, mesh: Mesh) -> None:
    """Raises a `ValueError` where a batch has no place in the data or on the mesh."""
    images, devices = len(task.train), mesh.shape["data"]
    if config.adapted and config.batch > images:
        raise ValueError(
            f"batch={config.batch}: expected 1 to {images} (training images)."
        )
    if config.adapted and config.batch % (devices * config.accumulate):
        raise ValueError(
            f"batch={config.batch}: {devices} devices and accumulate="
            f"{config.accumulate} do not divide it. --mesh data=N takes fewer devices."
        )
    config.check_rounds(len(task.full if config.trains_on_all else task.train))
    if config.search:
        config.check_rounds(images)


def missing(config: RunConfig) -> str | None:
    """Returns why a task cannot be run; None if it can."""
    try:
        task = catalogue.load(config.task, config.data_dir)
        check_classes(task)
        check_batch(config, task, sharding.make(config.mesh))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return f"{config.task}: {error}"
    return None
