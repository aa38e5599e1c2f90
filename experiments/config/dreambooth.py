"""The config of a run on a concept: personalised pictures by Stable Diffusion 3."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from experiments.config import run_config
from experiments.config.presets import Preset
from experiments.config.run_config import MethodOptions, RunConfig, RunOptions
from experiments.methods import registry
from experiments.methods.method import Method, Ranked
from experiments.methods.registry import OF_MMDIT, UNTUNED
from experiments.methods.untuned import Untuned
from experiments.paths import Given
from experiments.tasks.catalogue import DATA_DIR
from experiments.training import schedules
from experiments.training.pictures import Drawing
from experiments.training.recipe import Recipe
from snella_jax.models.sd3.mmdit import MMDiT

ROUNDS = 20  # of a run, unless it says how long one is: budgets move 19 times
COUNTS = (
    *("size", "class_pictures", "t5_length", "pictures", "sampler_steps", "draw_batch"),
)
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Photographs of a concept, and what prompts call it."""

    subject: str = "dog"
    """One of DreamBooth's 30 subjects, or a folder of photographs."""
    data_dir: Path = DATA_DIR
    """Folder that has the subjects in dreambooth/."""
    token: str = "sks"
    """Word that stands for the concept in prompts."""
    class_name: str | None = None
    """Noun for what the concept is, such as dog. Default: the subject's."""
    kind: Literal["object", "live"] | None = None
    """Whose 25 prompts: object (places and colours), or live (places and clothes).
    Default: the subject's; of a folder object."""
    size: int = 512
    """Side of photographs and pictures in pixels."""
    prior: float = 0.0
    """Weight of prior preservation: the loss of pictures of the class that the model
    itself draws before it trains. 0 for none; usually 1."""
    class_pictures: int = 100
    """Number of these pictures."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model that draws, and those that judge."""

    model: str = "stable-diffusion-3-medium-diffusers"
    """Folder (diffusers') or single file of Stable Diffusion 3 medium; or toy, a small
    model of emoji."""
    t5: bool = True
    """Use T5, where the weights have it."""
    t5_length: int = 77
    """Tokens of T5: 77 in diffusers' training script, 256 in its pipeline."""
    t5_tokenizer: Given | None = None
    """T5's spiece.model, which single files lack."""
    encode_on: Literal["device", "host"] = "device"
    """Where prompts are encoded, once, before the text encoders are dropped."""
    clip_model: str = "clip-vit-base-patch32"
    """Folder of the CLIP that measures alignment. toy: a ViT-S and a probe do."""
    dino_model: str = "dinov2-base"
    """Folder of the DINOv2 that measures variety."""
    dtype: Dtype = "bfloat16"
    """float32 or bfloat16, to compute in."""
    param_dtype: Dtype = "bfloat16"
    """float32 or bfloat16, of frozen weights; what trains is float32."""
    remat: Literal["none", "blocks"] = "blocks"
    """blocks: less memory, a forward more a step."""
    memory: str = "usual"
    """lean: less memory. lean+attention, +qkv or +hidden: less still."""
    activation: Literal["gelu", "gelu2"] = "gelu"
    """gelu2: derivative by steps, for less memory with a sketch."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions(run_config.TrainingOptions):
    """Length, batches and regularisation of training by steps."""

    precondition: bool = True
    """The loss is of the picture that the velocity leads to (diffusers'
    precondition_outputs), not of the velocity."""


@dataclasses.dataclass(frozen=True)
class DrawingOptions:
    """Pictures that methods are compared by, of 25 prompts."""

    pictures: int = 4
    """Pictures of each prompt."""
    sampler_steps: int = 28
    """Steps of the sampler."""
    guidance: float = 7.0
    """Strength of the prompt."""
    draw_batch: int = 4
    """Pictures that are drawn at once."""


@dataclasses.dataclass(frozen=True)
class DreamboothConfig(
    RunConfig, DrawingOptions, TrainingOptions, ModelOptions, DataOptions
):
    """One run: photographs, a diffusion model, and the methods that fine-tune it."""

    program: ClassVar[str] = "python -m experiments.dreambooth"
    panels: ClassVar[Mapping[str, type]] = {
        "data": DataOptions,
        "model": ModelOptions,
        "methods": MethodOptions,
        "training": TrainingOptions,
        "drawing": DrawingOptions,
        "run": RunOptions,
    }
    stepless: ClassVar[tuple[str, ...]] = (UNTUNED,)
    by_steps: ClassVar[Mapping[str, Method]] = OF_MMDIT

    methods: tuple[str, ...] = tuple(OF_MMDIT)
    """Methods to train, one after the other."""
    targets: str = MMDiT.default_targets
    """Regex of layers to adapt; usually all attention projections that get a
    gradient."""
    trainable: str = ""
    """Regex of what trains besides (see the docs of methods)."""
    warmup_epochs: int = 0
    """Rounds in which the rate rises from 0."""
    steps: int | None = 500
    """Length in updates."""
    round_steps: int | None = None
    """Updates between checkpoints and budgets. Default: a twentieth of --steps."""
    schedule: schedules.Name = "constant"
    """cosine, linear, constant, cosine_epoch or annealed_epoch."""
    batch: int = 4
    """Photographs in an update, over all devices."""
    accumulate: int = 4
    """Micro-batches of an update, one after the other."""
    clip: float = 1.0
    """Norm at which the gradient is clipped; 0 for never."""
    mesh: str | None = "data=1"
    """Devices, such as data=4,model=2 (batches are split along data, kernels along
    model). None: all along data."""
    untuned: Untuned = dataclasses.field(default_factory=Untuned)
    """Settings of the untuned model; there are none."""

    @classmethod
    def no_method(cls, name: str, program: str) -> str:
        """Returns why there is no method of that name; `program` lists all."""
        reason = registry.not_of_mmdit(name)
        return reason or super().no_method(name, program)

    @property
    def followed(self) -> None:
        """Nothing is followed: pictures are drawn once a method is trained."""
        return None

    @property
    def drawing(self) -> Drawing:
        """Settings of the pictures that are drawn."""
        return Drawing(
            size=self.size,
            each=self.pictures,
            batch=self.draw_batch,
            steps=self.sampler_steps,
            guidance=self.guidance,
            seed=self.seed,
        )

    def recipe(self, method: str) -> Recipe:
        """Returns how a method is trained."""
        made = super().recipe(method)
        if self.steps is None or self.round_steps is not None:
            return made
        return dataclasses.replace(made, round_steps=max(1, self.steps // ROUNDS))

    def check_search(self) -> None:
        """Raises a `ValueError`: a few photographs have no part to choose by."""
        raise ValueError(
            "search: there is nothing to choose by, expected rates of your own "
            "(--METHOD.lr)."
        )

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail in the midst of a run."""
        if self.steps is None:
            raise ValueError("steps=None: expected the length of a run in updates.")
        super().check()
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if not 0 <= self.prior < math.inf or not math.isfinite(self.guidance):
            raise ValueError(
                f"prior={self.prior}, guidance={self.guidance}: expected a weight of "
                "at least 0, and a number."
            )
        if not self.token.strip() or (self.class_name is not None
                                      and not self.class_name.strip()):  # fmt: skip
            raise ValueError("token, class_name: expected words.")
        for name in ("distributed", "ema"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}: pictures are drawn by one process, of the trained "
                    "weights; leave it out."
                )


def _settings(lr: float, rank: int, **rates: float) -> dict[str, Method]:
    """Returns settings of one rank and one rate, but for those of some methods."""
    found: dict[str, Method] = {}
    for name, usual in OF_MMDIT.items():
        changes: dict[str, Any] = {"lr": rates.get(name, lr), "weight_decay": 1e-4}
        if isinstance(usual, Ranked):
            changes["rank"] = rank
        found[name] = dataclasses.replace(usual, **changes)
    return found


SD3 = DreamboothConfig(
    settings=_settings(1e-4, 4),
    source="the paper (A.8); rank and decay of diffusers' DreamBooth script; not run",
)
TOY = DreamboothConfig(
    model="toy",
    size=32,
    methods=("untuned", "lora", "snella", "snella_linear"),
    steps=200,
    guidance=3.0,
    draw_batch=25,
    dtype="float32",
    param_dtype="float32",
    remat="none",
    settings=_settings(1e-3, 4, full=1e-4, snella=3e-3, snella_linear=3e-3),
    source="experiments.studies.personalise, for lora, snella and snella_linear",
)
DREAMBOOTH: dict[str, Preset[DreamboothConfig]] = {
    "toy": Preset("a small model of emoji, minutes on two cores", TOY),
    "sd3": Preset("Stable Diffusion 3 medium, the paper's recipe; not run", SD3),
}
