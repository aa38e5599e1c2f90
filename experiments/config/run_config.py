"""The config of a run, its checks, and the recipes that it stands for."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from experiments.data.mix import Mix
from experiments.methods import registry
from experiments.methods.linear_probe import Linear
from experiments.methods.method import Method
from experiments.names import unknown
from experiments.paths import Given
from experiments.tasks.catalogue import DATA_DIR
from experiments.training import schedules
from experiments.training.grid import Grid
from experiments.training.recipe import Recipe
from experiments.training.session import Scope

Protocol = Literal["choose", "final", "released"]
HELP = "python -m experiments.vtab --help"


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Images and labels."""

    task: str = "digits"
    """Name (`python -m experiments.tasks.show --list`), folder or CSV."""
    data_dir: Path = DATA_DIR
    """Folder of TFDS sets and unpacked archives."""
    test_images: int | None = None
    """Maximum number of test images; the same subset for every seed."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded, and count them."""
    crop: Literal["resize", "random"] = "resize"
    """resize: whole images, no augmentation. random: crops, flips and colour jitter in
    training, the centre in evaluation."""
    protocol: Protocol = "choose"
    """choose: train on the training split, follow validation. final: train on both.
    released: train on both, follow the test split, as the authors' code. In all, the
    last epoch's test accuracy counts."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The pre-trained model."""

    model: str = "vit_fashion_mnist"
    """vit_fashion_mnist, dinov2_saliency (extra `demo`), the path of published weights,
    or the name of those that this folder should hold: vit_b16, vit_l16, vit_h14,
    swin_b, convnext_b."""
    random_weights: bool = False
    """Start from random weights instead (of any preset): a control."""
    image_size: int | None = None
    """Side of the images in pixels. Default: that of the weights."""
    drop_path: float = 0.0
    """Rate of stochastic depth in the last block, in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 or bfloat16, to compute in; weights stay float32."""


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """Methods, and what they adapt."""

    methods: tuple[str, ...] = ("linear", "lora", "snella")
    """Methods to train, one after the other."""
    targets: str = r"blocks/.*/(query|key|value|out|fc1|fc2)"
    """Regex of layers to adapt."""
    trainable: str = r"head|cls_token"
    """Regex of what trains besides (see the docs of methods)."""
    search: bool = False
    """First choose rate, decay, density on validation; choose becomes final."""
    grid: Grid = dataclasses.field(default_factory=Grid)


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """Length, batches and regularisation, of all methods but the linear probe."""

    epochs: int = 15
    """Length of every method but the linear probe's, which converges."""
    warmup_epochs: int = 2
    """Epochs (with --steps: rounds) in which the rate rises from 0."""
    cooldown_epochs: int = 0
    """More epochs (with --steps: rounds) at the lowest rate."""
    steps: int | None = None
    """Length in updates, instead of --epochs."""
    round_steps: int | None = None
    """Updates between evaluations, checkpoints, budgets. Usual: an epoch."""
    schedule: schedules.Name = "cosine"
    """cosine, linear, constant or cosine_epoch (by rounds)."""
    eval_every: int = 1
    """Rounds between evaluations; the last ten are all evaluated."""
    batch: int = 32
    """Images in a step, over all devices."""
    accumulate: int = 1
    """Micro-batches of an update, one after the other."""
    clip: float = 0.0
    """Norm at which the gradient is clipped; 0 for never."""
    ema: float = 0.0
    """Decay of a mean of the weights, evaluated, too; 0 for none."""
    no_decay: str = ""
    """Regex of what does not decay, besides biases, norms and tokens."""
    label_smoothing: float = 0.0
    """Share of a label that is spread over all classes."""
    mixup: float = 0.0
    """Parameter of mixup's Beta distribution; 0 for none."""
    cutmix: float = 0.0
    """Parameter of CutMix's Beta distribution; 0 for none."""
    seed: int = 0
    """Seed of factors and order; the splits stay."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Devices, and where results go."""

    mesh: str | None = None
    """Devices, such as data=4,model=2 (batches are split along data, kernels along
    model). Default: all along data."""
    distributed: bool = False
    """One of several processes, each started with this command."""
    wandb: str | None = None
    """Project in Weights & Biases to log to as well (pip install wandb)."""
    out: Given | None = None
    """Run folder, new or empty. Default: runs/NAME/DATE-TIME."""


@dataclasses.dataclass(frozen=True)
class RunConfig(RunOptions, TrainingOptions, MethodOptions, ModelOptions, DataOptions):
    """One run: a task, a pre-trained model, and the methods that fine-tune it."""

    linear: Linear = dataclasses.field(default_factory=Linear)
    """Settings of the linear probe."""
    settings: Mapping[str, Method] = dataclasses.field(default_factory=dict)
    """Settings of the methods that are trained by steps, by name; of those that are
    not given, the usual ones."""
    source: str = "this project"
    """Where the preset's rates and densities come from; for the record."""

    def __post_init__(self):
        """Fills the settings up."""
        filled = {**registry.METHODS, **self.settings}
        object.__setattr__(self, "settings", filled)

    def with_settings(self, **methods: Any) -> "RunConfig":
        """Returns a copy with the settings of some methods, each by its name."""
        probe = {"linear": methods.pop("linear")} if "linear" in methods else {}
        changed = {**self.settings, **methods}
        return dataclasses.replace(self, settings=changed, **probe)

    @property
    def trains_on_all(self) -> bool:
        """True if what is tested is trained on training and validation images."""
        return self.search or self.protocol != "choose"

    @property
    def adapted(self) -> tuple[str, ...]:
        """The methods that are trained by steps."""
        return tuple(m for m in self.methods if m != registry.LINEAR)

    def method(self, name: str) -> Method | Linear:
        """Returns the settings of a method."""
        return self.linear if name == registry.LINEAR else self.settings[name]

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

    def mix(self, classes: int) -> Mix | None:
        """Returns how training batches are mixed; None where they are not."""
        mix = Mix(classes, self.mixup, self.cutmix, self.label_smoothing)
        return mix if self.mixup or self.cutmix or self.label_smoothing else None

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail in the midst of a run."""
        for name in self.methods:
            if name not in registry.names():
                raise ValueError(unknown("method", name, registry.names(), HELP))
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(
                f"methods={self.methods}: expected each once, at least one."
            )
        self.linear.check(registry.LINEAR)
        if self.test_images is not None and self.test_images < 1:
            raise ValueError(f"test_images={self.test_images}: expected at least 1.")
        if self.distributed and self.out is None:
            raise ValueError("distributed: expected --out, the same for all processes.")
        for name, method in self.settings.items():
            method.check(name)
            self.recipe(name)
        for name in self.adapted:
            self._check(name, self.settings[name])
        self.mix(1)
        if self.search:
            self._check_grid()
        if self.steps is None and self.round_steps is None:
            self.check_rounds(self.batch)  # as many rounds for any number of images

    def check_rounds(self, images: int) -> None:
        """Raises a `ValueError` where a run on so many images has too few rounds."""
        for name in self.adapted:
            rounds = self.recipe(name).rounds(images)
            for method in self._tried(name):
                method.check_rounds(name, self.scope(), rounds)

    def _check(self, name: str, method: Method) -> None:
        method.check_run(name, self.scope(), self.recipe(name))

    def _tried(self, name: str) -> list[Method]:
        """Returns a method's settings, and copies with the densities of a search."""
        own = self.settings[name]
        densities = self.grid.densities if self.search and own.has_density else ()
        changes: list[Any] = [{"target_density": density} for density in densities]
        return [own, *(dataclasses.replace(own, **change) for change in changes)]

    def _check_grid(self) -> None:
        if self.protocol == "released":
            raise ValueError(
                "search with protocol=released would follow the test split: expected "
                "protocol=final."
            )
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


PANELS = {  # of the help
    "data": DataOptions,
    "model": ModelOptions,
    "methods": MethodOptions,
    "training": TrainingOptions,
    "run": RunOptions,
}
WHERE = ("data_dir", "mesh", "distributed", "wandb")  # a run may go on elsewhere


def as_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the config as JSON can hold it; `--config` reads it back."""
    fields = dataclasses.asdict(config)
    fields.pop("out")
    methods = fields.pop("settings")
    return fields | methods | {"data_dir": str(config.data_dir)}


def differing(known: dict[str, Any], config: RunConfig) -> list[str]:
    """Returns the settings in which a config is not the one that `as_dict` once gave.

    Those of methods that it does not run change nothing, and do not count.

    >>> known = {"model": "vit_l16", "lora": {"rank": 4}, "dora": {"rank": 4}}
    >>> differing(known | {"methods": ["lora"]}, RunConfig(methods=("lora",)))
    ['lora.rank', 'model']
    """
    own, usual = (dict(_flat(json.loads(json.dumps(as_dict(c)))))
                  for c in (config, RunConfig()))  # fmt: skip
    filled = usual | dict(_flat(known))  # it may be older than some settings
    names = filled.keys() | own.keys()
    idle = {*registry.names()} - {*config.methods}
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
