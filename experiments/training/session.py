"""The input of a method: model, task, devices, recipe; no config of a run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from experiments.data.task import Splits
from experiments.training.objective import Objective
from experiments.training.recipe import Recipe
from experiments.training.trainer import Data

Places = dict[str, np.ndarray]  # ints or bools by name, as a first stage found them
Followed = Literal["validation", "test"]


@dataclasses.dataclass(frozen=True)
class Scope:
    """Parts of a model that a method adapts, and the seed of what it adds.

    Attributes:
      targets: regex of the layers that are adapted.
      trainable: regex of what trains besides.
      seed: seed of the run.
      places: result of the method's first stage; empty for methods without one.
    """

    targets: str
    trainable: str
    seed: int = 0
    places: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def rngs(self) -> nnx.Rngs:
        """Returns fresh keys for what a method adds; `seed` itself is the base's."""
        return nnx.Rngs(self.seed + 1)


@dataclasses.dataclass(frozen=True)
class Session:
    """Everything that one method needs to train on one task.

    Attributes:
      task: splits of the data; NOAH's first stage chooses on validation.
      base: pre-trained model.
      mesh: devices.
      console: console that progress is printed to.
      out: folder of checkpoints and `metrics.jsonl`.
      scope: parts of the model that are adapted.
      recipe: length, rates and batches of the method's training.
      objective: loss and metrics.
      data: examples to train on and to follow, with their transforms.
      followed: name of the split that is followed; None where none is.
      wandb: project in Weights & Biases to log to as well.
    """

    task: Splits
    base: Any
    mesh: Mesh
    console: Console
    out: Path
    scope: Scope
    recipe: Recipe
    objective: Objective
    data: Data
    followed: Followed | None
    wandb: str | None = None
