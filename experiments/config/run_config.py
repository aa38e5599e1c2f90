"""The config of a run: what all kinds of runs share, its checks and its recipes."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from experiments.methods import registry
from experiments.methods.method import Method
from experiments.names import unknown
from experiments.paths import Given
from experiments.training import schedules
from experiments.training.grid import Grid
from experiments.training.recipe import Recipe
from experiments.training.session import Followed, Scope

# A run may go on elsewhere.
WHERE = ("data_dir", "data", "prose", "mesh", "distributed", "wandb")


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """Methods, and what they adapt."""

    methods: tuple[str, ...] = ("lora", "snella")
    """Methods to train, one after the other."""
    targets: str = r"blocks/.*/(query|key|value|out|fc1|fc2)"
    """Regex of layers to adapt."""
    trainable: str = r"head|cls_token"
    """Regex of what trains besides (see the docs of methods)."""
    search: bool = False
    """First choose rate, decay, density on validation."""
    grid: Grid = dataclasses.field(default_factory=Grid)


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """Length, batches and regularisation of training by steps."""

    epochs: int = 15
    """Length in epochs."""
    warmup_epochs: int = 2
    """Epochs (with --steps: rounds) in which the rate rises from 0."""
    cooldown_epochs: int = 0
    """More epochs (with --steps: rounds) at the lowest rate."""
    steps: int | None = None
    """Length in updates, instead of --epochs."""
    round_steps: int | None = None
    """Updates between evaluations, checkpoints, budgets. Usual: an epoch."""
    schedule: schedules.Name = "cosine"
    """cosine, linear, constant, cosine_epoch or annealed_epoch."""
    eval_every: int = 1
    """Rounds between evaluations; the last ten are all evaluated."""
    batch: int = 32
    """Examples in a step, over all devices."""
    accumulate: int = 1
    """Micro-batches of an update, one after the other."""
    clip: float = 0.0
    """Norm at which the gradient is clipped; 0 for never."""
    ema: float = 0.0
    """Decay of a mean of the weights, evaluated, too; 0 for none."""
    no_decay: str = ""
    """Regex of what does not decay, besides biases, norms and tokens."""
    seed: int = 0
    """Seed of factors and order; the splits stay."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Devices, and where results go."""

    mesh: str | None = None
    """Splits batches along data and fsdp, matrices along fsdp and tensor, as
    data=2,fsdp=2. Default: all devices along data."""
    distributed: bool = False
    """One of several processes, each started with this command."""
    wandb: str | None = None
    """Project in Weights & Biases to log to as well (pip install wandb)."""
    out: Given | None = None
    """Run folder, new or empty. Default: runs/NAME/DATE-TIME."""


@dataclasses.dataclass(frozen=True)
class RunConfig(RunOptions, TrainingOptions, MethodOptions):
    """One run: methods that fine-tune one model on one task.

    A kind of run is a subclass with its model and its data.

    Attributes:
      program: command that runs it, for messages.
      panels: classes of its fields by the panel of the help that shows them.
      stepless: names of methods that are not trained by steps. Each is a field, with
        the method's settings.
      by_steps: methods that are, with their usual settings.
    """

    program: ClassVar[str]
    panels: ClassVar[Mapping[str, type]]
    stepless: ClassVar[tuple[str, ...]] = ()
    by_steps: ClassVar[Mapping[str, Method]] = registry.METHODS

    settings: Mapping[str, Method] = dataclasses.field(default_factory=dict)
    """Settings of the methods that are trained by steps, by name; of those that are
    not given, the usual ones."""
    source: str = "this project"
    """Where the preset's rates and densities come from; for the record."""

    def __post_init__(self):
        """Fills the settings up."""
        filled = {**self.by_steps, **self.settings}
        object.__setattr__(self, "settings", filled)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Returns all names that `--methods` takes, the stepless ones first."""
        return (*cls.stepless, *cls.by_steps)

    @classmethod
    def no_method(cls, name: str, program: str) -> str:
        """Returns why there is no method of that name; `program` lists all."""
        return unknown("method", name, cls.names(), f"{program} --help")

    def with_settings(self, **methods: Any) -> Self:
        """Returns a copy with the settings of some methods, each by its name."""
        own = {name: methods.pop(name) for name in self.stepless if name in methods}
        return dataclasses.replace(self, settings={**self.settings, **methods}, **own)

    @property
    def trains_on_all(self) -> bool:
        """True if what is tested is trained on training and validation examples."""
        return False

    @property
    def followed(self) -> Followed | None:
        """The split that is evaluated during training."""
        return "validation"

    @property
    def adapted(self) -> tuple[str, ...]:
        """The methods that are trained by steps."""
        return tuple(m for m in self.methods if m not in self.stepless)

    def method(self, name: str) -> Any:
        """Returns the settings of a method, a dataclass."""
        return getattr(self, name) if name in self.stepless else self.settings[name]

    def scope(self) -> Scope:
        """Returns the parts of the model that methods adapt."""
        return Scope(self.targets, self.trainable, self.seed)

    def recipe(self, method: str) -> Recipe:
        """Returns how a method is trained."""
        shared = {field.name for field in dataclasses.fields(Recipe)} & _names(self)
        own = self.settings[method]
        return Recipe(
            **{name: getattr(self, name) for name in shared},
            lr=own.lr,
            weight_decay=own.weight_decay,
            rates=own.rates,
        )

    def trial(self) -> Self:
        """Returns the config of a trial of the search, which follows validation."""
        return dataclasses.replace(self, search=False, ema=0.0, wandb=None)

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail in the midst of a run."""
        for name in self.methods:
            if name not in self.names():
                raise ValueError(self.no_method(name, self.program))
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(
                f"methods={self.methods}: expected each once, at least one."
            )
        for name in self.stepless:
            self.method(name).check(name)
        if self.distributed and self.out is None:
            raise ValueError("distributed: expected --out, the same for all processes.")
        for name, method in self.settings.items():
            method.check(name)
            self.recipe(name)
        for name in self.adapted:
            self._check(name, self.settings[name])
        if self.search:
            self.check_search()
        if self.steps is None and self.round_steps is None:
            self.check_rounds(self.batch)  # as many rounds for any number of examples

    def check_rounds(self, examples: int) -> None:
        """Raises a `ValueError` where a run on so many has too few rounds."""
        for name in self.adapted:
            rounds = self.recipe(name).rounds(examples)
            for method in self._tried(name):
                method.check_rounds(name, self.scope(), rounds)

    def check_search(self) -> None:
        """Raises a `ValueError` on a search that would fail in its midst."""
        factors, decays = self.grid.lr_factors, self.grid.weight_decays
        if self.grid.lr_extensions < 0:
            raise ValueError(f"grid={self.grid}: expected lr_extensions >= 0.")
        if not all(0 < x < math.inf for x in factors) or not all(
            0 <= x < math.inf for x in decays
        ):
            raise ValueError(f"grid={self.grid}: expected positive numbers.")
        for name in self.adapted:
            for method in self._tried(name):
                self._check(name, method)

    def _check(self, name: str, method: Method) -> None:
        method.check_run(name, self.scope(), self.recipe(name))

    def _tried(self, name: str) -> list[Method]:
        """Returns a method's settings, and copies with the densities of a search."""
        own = self.settings[name]
        densities = self.grid.densities if self.search and own.has_density else ()
        changes: list[Any] = [{"target_density": density} for density in densities]
        return [own, *(dataclasses.replace(own, **change) for change in changes)]


def as_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the config as JSON can hold it; `--config` reads it back."""
    fields = dataclasses.asdict(config)
    fields.pop("out")
    methods = fields.pop("settings")
    paths = {name: str(v) for name, v in fields.items() if isinstance(v, Path)}
    return fields | methods | paths


def differing(known: dict[str, Any], config: RunConfig) -> list[str]:
    """Returns the settings in which a config is not the one that `as_dict` once gave.

    Those of methods that it does not run change nothing, and do not count.
    """
    own, usual = (dict(_flat(json.loads(json.dumps(as_dict(c)))))
                  for c in (config, type(config)()))  # fmt: skip
    filled = usual | dict(_flat(known))  # it may be older than some settings
    names = filled.keys() | own.keys()
    idle = {*config.names()} - {*config.methods}
    relevant = sorted(
        name for name in names if name not in WHERE and name.split(".")[0] not in idle
    )
    return [name for name in relevant if filled.get(name) != own.get(name)]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _names(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}
