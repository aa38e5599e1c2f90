"""Task, model and devices of a config, checked before anything is written."""

import dataclasses
import importlib.util
import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from experiments import files, paths
from experiments.config.run_config import RunConfig
from experiments.data import check, source
from experiments.data.task import Task
from experiments.methods.registry import METHODS
from experiments.methods.settings import Trained
from experiments.pretrained import base_models
from experiments.tasks import catalogue
from experiments.training import sharding
from experiments.training.session import Setting
from snella_jax.models import Model


def prepared(name: str, config: RunConfig, console: Console) -> Setting:
    """Everything that a run needs; what does not fit is said before it writes.

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
    return Setting(config, task, base, mesh, console, out)


def _sampled(task: Task, count: int | None) -> Task:
    """The task with at most that many of its test images."""
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


def _adapted(method: Trained, config: RunConfig, base: Model) -> Any:
    """Adapted, as if a first stage had found something, where there is one."""
    table = METHODS[method]
    located = [table.stage.typical(config, base)] if table.stage else []
    return table.adapt(config, base, *located)


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


def missing(config: RunConfig) -> str | None:
    """Why a task cannot be run; None where it can."""
    try:
        task = catalogue.load(config.task, config.data_dir)
        check_classes(task)
        check_batch(config, task, sharding.make(config.mesh))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return f"{config.task}: {error}"
    return None
