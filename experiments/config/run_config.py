"""What a run is: `RunConfig`, checked, and the recipes and adapters it stands for."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from experiments.data.mix import Mix
from experiments.methods.settings import (
    Linear,
    Located,
    Masked,
    Parted,
    Plain,
    Prompted,
    Ranked,
    Searched,
    Selected,
    Trained,
)
from experiments.methods.snella import DENSE, RELEASED, Kernelized
from experiments.paths import Given
from experiments.tasks.catalogue import DATA_DIR
from experiments.training.competition import Competition
from experiments.training.grid import Grid
from experiments.training.recipe import Recipe

Protocol = Literal["choose", "final", "released"]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run: a task, a pre-trained model, and the methods that fine-tune it."""

    task: str = "digits"
    """A name from `python -m experiments.tasks.show --list`, a folder or a CSV file."""
    data_dir: Path = DATA_DIR
    """Where TFDS keeps prepared sets, and archives are unpacked."""
    test_images: int | None = None
    """Where there are more to test on, so many are drawn, the same for all seeds."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded, and count them."""
    model: str = "vit_fashion_mnist"
    """vit_fashion_mnist (the quickstart's), dinov2_saliency (extra `demo`), the path
    of published weights, or the name of those that this folder should hold: vit_b16,
    vit_l16, vit_h14, swin_b, convnext_b. With --random_weights any preset."""
    random_weights: bool = False
    """Start from random weights of the model's shape instead: a control."""
    image_size: int | None = None
    """Side of the images in pixels. Default: that of the weights."""
    crop: Literal["resize", "random"] = "resize"
    """resize: whole images, no augmentation (VTAB). random: crops, flips and colour
    jitter in training, the centre in evaluation (FGVC)."""
    protocol: Protocol = "choose"
    """choose: train on the training split, follow validation. final: train on both,
    follow nothing. released: train on both and follow the test split, as the authors'
    code does, whose reported accuracy is the best of these. In all, the test accuracy
    that counts is the last epoch's."""
    search: bool = False
    """First choose each method's rate, weight decay and density on validation;
    protocol=choose then becomes final."""
    grid: Grid = Grid()
    methods: tuple[Literal["linear"] | Trained, ...] = ("linear", "lora", "snella")
    """What to train, one after the other."""
    epochs: int = 15
    """Of every method but the linear probe, which converges."""
    warmup_epochs: int = 2
    """The first of them, in which the learning rate rises from 0."""
    cooldown_epochs: int = 0
    """More epochs at the lowest learning rate."""
    eval_every: int = 1
    """Epochs between evaluations; the last ten are all evaluated."""
    batch: int = 32
    """Images in a step, over all devices."""
    accumulate: int = 1
    """Parts of a batch that are computed one after the other, to save memory."""
    clip: float = 0.0
    """Norm at which the gradient is clipped; 0 for never."""
    ema: float = 0.0
    """Decay of a running mean of the weights, which is evaluated, too; 0 for none."""
    no_decay: str = ""
    """Regex of what is spared weight decay, besides biases, norms and tokens."""
    label_smoothing: float = 0.0
    """Share of a label that is spread over all classes."""
    mixup: float = 0.0
    """Parameter of mixup's Beta distribution; 0 for none."""
    cutmix: float = 0.0
    """Parameter of CutMix's Beta distribution; 0 for none."""
    drop_path: float = 0.0
    """Rate of stochastic depth in the last block of the model, in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; the weights stay in float32."""
    mesh: str | None = None
    """Devices, such as data=4,model=2: batches are split along data, kernels along
    model. Default: all devices along data."""
    distributed: bool = False
    """One of several processes (hosts of a pod), each started with this command."""
    targets: str = r"blocks/.*/(query|key|value|out|fc1|fc2)"
    """Regex of the layers that are adapted."""
    trainable: str = r"head|cls_token"
    """Regex of what trains besides; of partial1, mlp3 and vqt, the head alone does."""
    seed: int = 0
    """Of the factors and the order of the images; the splits stay."""
    linear: Linear = Linear()
    partial1: Plain = Plain(lr=1e-3)
    """The last block and the norm behind it train, besides the head."""
    mlp3: Plain = Plain(lr=1e-3)
    """A head of three layers."""
    full: Plain = Plain(lr=1e-4)
    """Full fine-tuning: everything trains."""
    bias: Plain = Plain(lr=1e-2)
    """BitFit (Ben Zaken et al., arXiv 2106.10199): the biases train."""
    ssf: Plain = Plain(lr=1e-2)
    """Scales and shifts of every layer's output."""
    vpt_shallow: Prompted = Prompted()
    """Learnt tokens at the first block."""
    vpt_deep: Prompted = Prompted()
    """Learnt tokens at every block."""
    vqt: Prompted = Prompted(count=1)
    """Learnt queries that read every block."""
    adapter: Ranked = Ranked()
    """A bottleneck after every MLP."""
    adaptformer: Ranked = Ranked()
    """A bottleneck beside every MLP."""
    mosa: Parted = Parted()
    """AdaptFormer's bottleneck, a part of it at a time."""
    spt_adapter: Located = Located()
    """Adapters behind sensitive matrices, single weights elsewhere."""
    spt_lora: Located = Located()
    """LoRA at sensitive matrices, single weights elsewhere."""
    gps: Selected = Selected()
    """Every neuron's inputs with the largest gradient."""
    noah: Searched = Searched()
    """Prompts, LoRA and adapters, as large as a search finds best."""
    lora: Ranked = Ranked()
    dora: Ranked = Ranked()
    """LoRA with magnitudes that train apart."""
    klora: Kernelized = Kernelized(kernel="piecewise_linear", **DENSE)
    """Kernelized LoRA: SNELL's kernel without sparsity."""
    mixk: Kernelized = Kernelized(**DENSE)
    """SNELLA's kernel without sparsity."""
    snell: Kernelized = Kernelized(kernel="piecewise_linear", allocation="fixed")
    """SNELL: one density for all matrices."""
    snella: Kernelized = Kernelized()
    snella_masked: Masked = Masked()
    """SNELLA's kernel under a mask that SPT's sensitivity fixes beforehand."""
    snella_released: Kernelized = Kernelized(**RELEASED)
    """SNELLA as the authors' code sets it up, apart from rates and densities."""
    source: str = "this project"
    """Where the preset's rates and densities come from; for the record."""
    wandb: str | None = None
    """Project in Weights & Biases to log to as well (pip install wandb)."""
    out: Given | None = None
    """Run folder, new or empty. Default: runs/NAME/DATE-TIME."""

    @property
    def trains_on_all(self) -> bool:
        """Whether what is tested is trained on training and validation images."""
        return self.search or self.protocol != "choose"

    @property
    def adapted(self) -> tuple[Trained, ...]:
        """The methods that are trained by steps."""
        return tuple(m for m in self.methods if m != "linear")

    def recipe(self, method: Trained) -> Recipe:
        """How a method is trained."""
        shared = {field.name for field in dataclasses.fields(Recipe)}
        settings = {name: getattr(self, name) for name in shared & _names(self)}
        own = getattr(self, method)
        settings |= {name: getattr(own, name) for name in shared if hasattr(own, name)}
        return Recipe(**settings)

    def mix(self, classes: int) -> Mix | None:
        """What happens to training batches."""
        mix = Mix(classes, self.mixup, self.cutmix, self.label_smoothing)
        return mix if self.mixup or self.cutmix or self.label_smoothing else None

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail in the midst of a run."""
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(
                f"methods={self.methods}: expected each once, at least one."
            )
        strengths = self.linear.strengths
        if not strengths or not all(0 < value < math.inf for value in strengths):
            raise ValueError(
                f"linear.strengths={self.linear.strengths}: expected positive numbers."
            )
        if self.test_images is not None and self.test_images < 1:
            raise ValueError(f"test_images={self.test_images}: expected at least 1.")
        if self.distributed and self.out is None:
            raise ValueError("distributed: expected --out, the same for all processes.")
        for name in get_args(Trained):
            method = getattr(self, name)
            method.check(name)
            self.recipe(name)
            if isinstance(method, Kernelized) and name in self.methods:
                method.importance()
                self.competition(method, 1)
        supernet = self.noah.supernet_epochs
        if supernet is not None and supernet <= self.warmup_epochs:
            raise ValueError(
                f"noah.supernet_epochs={supernet}: expected more than the "
                f"{self.warmup_epochs} of the warm-up."
            )
        self.mix(1)
        if self.search:
            self._check_grid()

    def competition(self, method: Kernelized, weights: int) -> Competition:
        """How budgets move; the total stays as it is in the cool-down."""
        adapter = method.adapter(self.targets, self.trainable)
        schedule = adapter.schedule(
            weights,
            self.epochs + self.cooldown_epochs,
            power=method.power,
            cooldown=self.cooldown_epochs,
        )
        return method.competition(schedule, self.epochs - 1)

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
            method = getattr(self, name)
            for density in self.grid.densities if method.has_density else ():
                tried = dataclasses.replace(method, target_density=density)
                tried.check(name)
                if isinstance(tried, Kernelized):
                    self.competition(tried, 1)


WHERE = ("data_dir", "mesh", "distributed", "wandb")  # a run may go on elsewhere


def as_dict(config: RunConfig) -> dict[str, Any]:
    """The config as JSON can hold it; `--config` reads it back."""
    fields = dataclasses.asdict(config)
    fields.pop("out")
    return fields | {"data_dir": str(config.data_dir)}


def differing(known: dict[str, Any], config: RunConfig) -> list[str]:
    """In which settings a config is not the one that `as_dict` once made JSON of.

    Those of methods that it does not run change nothing, and do not count.

    >>> known = {"model": "vit_l16", "lora": {"rank": 4}, "dora": {"rank": 4}}
    >>> differing(known | {"methods": ["lora"]}, RunConfig(methods=("lora",)))
    ['lora.rank', 'model']
    """
    own, usual = (dict(_flat(json.loads(json.dumps(as_dict(c)))))
                  for c in (config, RunConfig()))  # fmt: skip
    filled = usual | dict(_flat(known))  # it may be older than some settings
    names = filled.keys() | own.keys()
    idle = {"linear", *get_args(Trained)} - {*config.methods}
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
