"""Models that comparisons kept (`--keep_models`), and what they are measured with."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from rich.console import Console

import snella_jax as snella
from experiments import files
from experiments.config import command_line
from experiments.config.images import ImageConfig
from experiments.data.source import Source
from experiments.data.task import Task
from experiments.data.transforms import Transform
from experiments.methods.registry import LINEAR
from experiments.paths import Given
from experiments.pretrained import base_models
from experiments.runs import images
from experiments.studies import cells, recorded
from experiments.studies.cells import Cell
from experiments.training import evaluation, sharding
from experiments.training.classification import Classification
from snella_jax.nnx.variables import variables_of

BEFORE = "before tuning"


@dataclasses.dataclass(frozen=True, eq=False)
class Tuned:
    """A finished seed whose model was kept.

    Attributes:
      cell: its results.
      delta: file of what training changed.
      config: the run's config.
    """

    cell: Cell
    delta: Path
    config: ImageConfig

    @property
    def key(self) -> str:
        """Name among the measured."""
        return f"{self.cell.label} | {self.cell.task} | {self.cell.seed}"

    def beside(self, task: str) -> str:
        """Returns its name among the measured, of what is measured with another task.

        Each has its own, so that a task that joins later is measured for all models.
        """
        return f"{self.key} | {task}"

    @property
    def setup(self) -> dict[str, Any]:
        """What was trained and for how long, for reports."""
        length = "epochs" if self.config.steps is None else "steps"
        names = "model", "image_size", "batch", length
        return {name: getattr(self.config, name) for name in names}

    @property
    def task(self) -> Task:
        """The task that it was tuned on, as the run read it.

        Raises:
          ValueError: it has other test images now.
        """
        names = ["task", "data_dir", "per_class", "test_images"]
        names += ["seed"] * (self.config.per_class is not None)  # which draws them
        found = _task(tuple((name, getattr(self.config, name)) for name in names))
        tested = self.cell.result["tested"]
        if len(found.test) != tested:
            raise ValueError(
                f"{self.config.task} has {len(found.test)} test images, "
                f"{self.cell.folder} was tested on {tested}: expected the same data."
            )
        return found

    @property
    def base(self) -> Any:
        """The model before tuning, with a head for the task."""
        fields = ("model", "image_size", "seed", "dtype", "random_weights")
        known = tuple((name, getattr(self.config, name)) for name in fields)
        return _base(known, self.task.classes)

    @property
    def transform(self) -> Transform:
        """Transform of test images."""
        return base_models.transforms(self.config, self.base)[1]

    def model(self) -> Any:
        """Returns the tuned model.

        Raises:
          CheckpointError: the file is damaged, or of another base.
        """
        return snella.apply_delta(self.base, self.delta)


@functools.cache
def _task(fields: tuple[tuple[str, Any], ...]) -> Task:
    return images.loaded(ImageConfig(**dict(fields)))


@functools.cache
def mesh() -> Mesh:
    """Returns the devices that models are measured on."""
    return sharding.make(None)


@functools.lru_cache(maxsize=8)
def _base(fields: tuple[tuple[str, Any], ...], classes: int) -> Any:
    return base_models.load(ImageConfig(**dict(fields)), classes)


@dataclasses.dataclass(frozen=True)
class TunedOptions:
    """Options of what measures kept models."""

    runs: tuple[Given, ...]
    """Folders of `experiments.compare --keep_models`."""
    tasks: tuple[str, ...] = ()
    """Tasks, of those in the folders. Default: all."""
    methods: tuple[str, ...] = ("lora", "snella")
    """Methods whose models are measured; only those that merge into the base are kept.
    """
    data: Given | None = None
    """Folder of the tasks, if they lie elsewhere than when they were run."""

    def by_task(self, console: Console) -> Iterator[tuple[list[Cell], list[Tuned]]]:
        """Yields the finished seeds of each task, and the models kept of the methods.

        Those of random weights are left out. Models are in the order of the methods.
        Seeds that have no model are named on the console.

        Raises:
          ValueError: a task has no finished seed, or no model of it was kept.
        """
        found = [cell for cell in cells.read(self.runs) if not cell.row.random]
        known = list(dict.fromkeys(cell.task for cell in found))
        for task in self.tasks or known:
            own = [cell for cell in found if cell.task == task]
            if not own:
                raise ValueError(f"No finished seed of {task}: expected {known}.")
            wanted = [c for name in self.methods for c in own if c.row.method == name]
            models = kept(wanted, self.data)
            if lacking := not_kept(wanted, models):
                console.print(lacking)
            yield own, models


def accuracies(found: Iterable[Cell]) -> dict[str, float]:
    """Returns mean test accuracies by label; a linear probe's as that before tuning."""
    every: dict[str, list[float]] = {}
    for cell in found:
        label = BEFORE if cell.row.method == LINEAR else cell.label
        every.setdefault(label, []).append(cell.result["test_accuracy"])
    return {label: sum(own) / len(own) for label, own in every.items()}


def kept(cells: Sequence[Cell], data: Path | None = None) -> list[Tuned]:
    """Returns the cells whose models were kept.

    Args:
      cells: finished seeds.
      data: folder of the tasks, where they lie elsewhere now.

    Raises:
      ValueError: none was kept, or they were trained on other numbers of images.
    """
    counts = {cell.per_class or "all" for cell in cells}
    if len(counts) > 1:
        raise ValueError(
            f"The runs have {', '.join(map(str, counts))} training images a class: "
            "expected the same of all; for accuracy by images, --few."
        )
    found = list(_kept(cells, data))
    if not found:
        raise ValueError(
            f"Of {len(cells)} finished seeds of these methods and seeds no model was "
            "kept: expected runs of python -m experiments.compare --keep_models."
        )
    return found


def not_kept(cells: Sequence[Cell], models: Sequence[Tuned]) -> str:
    """Returns a sentence that names the cells without a model; "" if all have one."""
    have = {id(own.cell) for own in models}
    lacking = [cell for cell in cells if id(cell) not in have]
    names = [f"{own.label} on {own.task}, seed {own.seed}" for own in lacking]
    return (
        ""
        if not names
        else (
            f"Not measured, for no model was kept: {'; '.join(names)}. (A seed keeps "
            "it only if --keep_models was given when it was trained.)"
        )
    )


def _kept(cells: Sequence[Cell], data: Path | None) -> Iterator[Tuned]:
    for cell in cells:
        delta = recorded.delta(cell.run, cell.row.method)
        if not delta.exists():
            continue
        path = cell.run / "config.json"
        known = ImageConfig()
        config = command_line.from_values(known.program, files.read(path), known, path)
        if data is not None:
            there = str(data / Path(config.task).name)
            config = dataclasses.replace(config, task=there)
        yield Tuned(cell, delta, config)


def right(
    model: Any, source: Source, transform: Transform, classes: Sequence[int]
) -> list[bool]:
    """Returns for every example if a model gets it right.

    Args:
      model: a classifier.
      source: the examples.
      transform: of their images.
      classes: the true class of each.
    """
    seen: dict[int, int] = {}

    def note(index: int, output: Any) -> None:
        seen[index] = int(output)

    where = source, transform, mesh(), Classification()
    evaluation.evaluate(model, *where, look=note)
    return [seen[index] == own for index, own in enumerate(classes)]


def added(base: Any, models: Sequence[Any], head: Any) -> Any:
    """Returns the base with the sum of what several models changed, and one's head.

    Args:
      base: the model before tuning, with the head's number of classes.
      models: tuned models on it; their heads count for nothing.
      head: the model whose head is taken.

    Raises:
      ValueError: the models have other weights than the base.
    """
    result = nnx.clone(base)
    every = [_weights(model) for model in models]
    heads, before = _weights(head), _weights(base)
    if any(own.keys() != before.keys() for own in every):
        raise ValueError("The models have other weights than their base.")
    for path, variable in variables_of(result, nnx.Param):
        if path.startswith("head/"):
            variable[...] = heads[path]
        else:
            changes = (own[path] - before[path] for own in every)
            variable[...] = sum(changes, start=before[path])
    return result


def _weights(model: Any) -> dict[str, Array]:
    return {path: own[...] for path, own in variables_of(model, nnx.Param)}
