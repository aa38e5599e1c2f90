"""What the methods of a run share: base model, task, devices, folder."""

import dataclasses
from functools import cached_property
from pathlib import Path

from jax.sharding import Mesh
from rich.console import Console

from experiments.config.run_config import RunConfig
from experiments.data import fingerprint
from experiments.data.task import Task
from experiments.data.transforms import Transform
from experiments.pretrained import base_models
from experiments.training import trainer as train
from snella_jax.models import Model


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all methods of a run share.

    Attributes:
      base: the pre-trained model.
      out: the run folder.
      located: the folder of what first stages locate, that of the run by default.
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
        """Of training images, and of all others."""
        return base_models.transforms(self.config, self.base)

    @cached_property
    def inputs(self) -> fingerprint.Inputs:
        """Fingerprints of the data and of the base's weights."""
        splits = self.task.fingerprint
        if splits is None:
            raise ValueError(f"{self.task.name} was not looked at by check.checked.")
        return fingerprint.of(splits, self.task.classes, base_models.files(self.config))

    @property
    def followed(self) -> str | None:
        """The split that is evaluated while training."""
        if not self.config.trains_on_all:
            return "validation"
        return "test" if self.config.protocol == "released" else None

    @property
    def data(self) -> train.Data:
        """What the protocol trains on and follows."""
        task, config = self.task, self.config
        return train.Data(
            task.full if config.trains_on_all else task.train,
            getattr(task, self.followed) if self.followed else None,
            *self.transforms,
            mix=config.mix(task.classes),
        )
