"""Runs that classify images."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from rich.console import Console

from experiments import files
from experiments.config.images import ImageConfig
from experiments.data import check, fingerprint, segmentation_task, source
from experiments.data.task import Task
from experiments.data.transforms import Transform
from experiments.methods import linear_probe
from experiments.paths import at_home
from experiments.pretrained import base_models
from experiments.reports import figures, run_table
from experiments.runs import setup
from experiments.runs.result import Result, absent
from experiments.runs.setup import Prepared
from experiments.tasks import catalogue, segmentation_catalogue
from experiments.training import metric_log, sharding
from experiments.training.classification import Classification
from experiments.training.trainer import Data
from snella_jax.models import ImageModel


@dataclasses.dataclass(frozen=True)
class ImageRun(Prepared):
    """A run on images with labels: `Prepared` for classification."""

    unit: ClassVar[str] = "images"

    config: ImageConfig
    task: Task
    base: ImageModel

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
    def name(self) -> str:
        """Name of the task as the config gives it."""
        return self.config.task

    @property
    def model(self) -> str:
        """Name or path of the base as the config gives it."""
        return self.config.model

    @property
    def objective(self) -> Classification:
        """Cross entropy and accuracy."""
        return Classification(self.task.names)

    @cached_property
    def data(self) -> Data:
        """Examples that the protocol trains on and follows."""
        task, config = self.task, self.config
        return Data(
            task.full if config.trains_on_all else task.train,
            getattr(task, self.followed) if self.followed else None,
            *self.transforms,
            mix=config.mix(task.classes),
        )

    def stepless(self, method: str) -> Result:
        """Fits the linear probe."""
        config = self.config
        with self.console.status("linear probe"):
            probe = linear_probe.train(
                self.base,
                self.task,
                self.transforms[1],
                self.mesh,
                config.linear.strengths,
                config.grid.lr_extensions,
                refit=config.trains_on_all,
                weights=config.model,
                look=self.look(method),
            )
        if files.is_primary():
            metric_log.keep(self.out, method, 0)
            metric_log.log(self.out, {"method": method, **dataclasses.asdict(probe)})
        names = "test_accuracy", "val_accuracy"
        return Result(
            metrics=absent(self.objective) | {n: getattr(probe, n) for n in names},
            trainable=probe.trainable,
            seconds_per_step=probe.seconds_per_step,
            weights_moved=0,
            settings={"strength": probe.strength},
        )

    def draw(self, method: str, outputs: list[tuple[int, Any]]) -> None:
        """Draws the first test images with their predicted classes."""
        path = self.out / "figures" / f"predictions_{method}.png"
        figures.predictions(path, self.objective, self.task.test, outputs)

    def table(self, results: Mapping[str, dict[str, Any]]) -> run_table.Table:
        """Returns the table of all metrics."""
        table = super().table(results)
        if "linear" in results:
            table.caption = (
                "a step of the linear probe is an L-BFGS iteration on features"
            )
        return table


Run = TypeVar("Run", bound=ImageRun)


def prepared(
    name: str, config: ImageConfig, console: Console, kind: type[Run] = ImageRun
) -> Run:
    """Returns everything that a run needs; writes nothing.

    Args:
      name: of the folder among the runs, where `config.out` does not say it.
      kind: class of the run.

    Raises:
      ValueError, OSError, ModuleNotFoundError: something is wrong or missing; says what
        was expected and what to do.
    """
    out = setup.folder(name, config)
    mesh = sharding.make(config.mesh)
    task = loaded(config)
    check_classes(task)
    if said := base_models.taken(config):
        console.print(said, style="yellow", markup=False, soft_wrap=True)
    base = base_models.load(config, task.classes)
    setup.check_batch(config, task, mesh, ImageRun.unit)
    setup.check_methods(config, base)
    task = check.checked(task, console, config.skip_corrupt, to_train=True)
    setup.check_batch(config, task, mesh, ImageRun.unit)
    return kind(config, task, base, mesh, console, out)


def loaded(config: ImageConfig) -> Task:
    """Loads a run's task, with the images that it trains on and is tested on.

    Raises:
      ValueError, OSError, ModuleNotFoundError: there is none, or one with masks; says
        which command takes that.
    """
    name, path = config.task, at_home(config.task)
    masks = name in segmentation_catalogue.ENTRIES and not path.exists()
    if masks or segmentation_task.is_folder(path):
        raise ValueError(
            f"{name} has masks, not classes: `python -m experiments.polyp --config "
            f"minisam --task {name}` segments its images."
        )
    task = catalogue.load(name, config.data_dir)
    test, train = setup.sampled(task.test, config.test_images), task.train
    if config.per_class is not None:
        train = source.few(train, config.per_class, config.seed)
    return dataclasses.replace(task, train=train, test=test)


def check_classes(task: Task) -> None:
    """Raises a `ValueError` on a task of one class, which teaches nothing."""
    if task.classes < 2:
        name = f" ({task.names[0]})" if task.names else ""
        raise ValueError(
            f"{task.name}: all images are of one class{name}, expected two classes or "
            "more."
        )


def missing(config: ImageConfig) -> str | None:
    """Returns why a task cannot be run; None if it can."""
    try:
        task = loaded(config)
        check_classes(task)
        setup.check_batch(config, task, sharding.make(config.mesh), ImageRun.unit)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return f"{config.task}: {error}"
    return None
