"""The config of a run on images: classification by a vision model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from experiments.config import run_config
from experiments.config.run_config import MethodOptions, RunOptions
from experiments.config.split_config import Protocol, SplitConfig
from experiments.data.mix import Mix
from experiments.methods.linear_probe import Linear
from experiments.methods.registry import LINEAR
from experiments.tasks.catalogue import DATA_DIR


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Images and labels."""

    task: str = "digits"
    """Name (`python -m experiments.tasks.show --list`), folder, CSV."""
    data_dir: Path = DATA_DIR
    """Folder of TFDS sets and unpacked archives."""
    test_images: int | None = None
    """Maximum number of test images; the same subset for every seed."""
    per_class: int | None = None
    """Training images of each class, drawn by seed; none from validation."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded, and count them."""
    crop: Literal["resize", "random"] = "resize"
    """resize: whole images, no augmentation. random: crops, flips and colour jitter in
    training, the centre in evaluation."""
    protocol: Protocol = "choose"
    """choose: train on training, follow validation; final with --search. final: on
    both. released: on both, follow the test."""


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
    memory: str = "usual"
    """lean: less memory. lean+attention, +qkv or +hidden: less still."""
    activation: Literal["gelu", "gelu2"] = "gelu"
    """gelu2: derivative by steps, for less memory with a sketch."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions(run_config.TrainingOptions):
    """Length, batches and regularisation, of all methods but the linear probe."""

    epochs: int = 15
    """Length of every method but the linear probe's, which converges."""
    label_smoothing: float = 0.0
    """Share of a label that is spread over all classes."""
    mixup: float = 0.0
    """Parameter of mixup's Beta distribution; 0 for none."""
    cutmix: float = 0.0
    """Parameter of CutMix's Beta distribution; 0 for none."""


@dataclasses.dataclass(frozen=True)
class ImageConfig(SplitConfig, TrainingOptions, ModelOptions, DataOptions):
    """One run: a task, a pre-trained model, and the methods that fine-tune it.

    >>> known = {"model": "vit_l16", "lora": {"rank": 4}, "dora": {"rank": 4}}
    >>> known |= {"methods": ["lora"]}
    >>> run_config.differing(known, ImageConfig(methods=("lora",)))
    ['lora.rank', 'model']
    """

    program: ClassVar[str] = "python -m experiments.vtab"
    panels: ClassVar[Mapping[str, type]] = {
        "data": DataOptions,
        "model": ModelOptions,
        "methods": MethodOptions,
        "training": TrainingOptions,
        "run": RunOptions,
    }
    stepless: ClassVar[tuple[str, ...]] = (LINEAR,)

    methods: tuple[str, ...] = ("linear", "lora", "snella")
    """Methods to train, one after the other."""
    linear: Linear = dataclasses.field(default_factory=Linear)
    """Settings of the linear probe."""

    @property
    def trains_on_all(self) -> bool:
        """True if what is tested is trained on training and validation images."""
        return super().trains_on_all and self.per_class is None

    def mix(self, classes: int) -> Mix | None:
        """Returns how training batches are mixed; None where they are not."""
        mix = Mix(classes, self.mixup, self.cutmix, self.label_smoothing)
        return mix if self.mixup or self.cutmix or self.label_smoothing else None

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail in the midst of a run."""
        super().check()
        if self.test_images is not None and self.test_images < 1:
            raise ValueError(f"test_images={self.test_images}: expected at least 1.")
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"per_class={self.per_class}: expected at least 1.")
        if self.per_class is not None and self.protocol == "released":
            raise ValueError(
                "per_class with protocol=released: expected choose or final, which do "
                "not follow the test split."
            )
        self.mix(1)
