"""One training step of every method on a ViT: what memory and time are measured of.

The step is the trainer's own (`train.training_step`), with AdamW, on images of noise.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

import snella_jax as snella
from experiments import train
from experiments.methods import lora, stored
from snella_jax.models import attention, vit
from snella_jax.rules import freeze

CLASSES = 100  # VTAB-1k's largest common head (CIFAR-100)
DENSITY = 0.3
HEAD = "head|cls_token"
TARGETS = r"blocks/.*/(query|key|value|out|fc1|fc2)"

Method = Literal[
    "full",
    "linear",
    "bias",
    "lora",
    "klora",
    "snella",
    "snella_parallel",
    "snella_stored",
]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method on a model.

    Attributes:
      method: how the model is fine-tuned.
      model: a preset of `snella_jax.models.vit`.
      batch: images in a step.
      rank: of LoRA's and SNELLA's factors.
      dtype: in which the step computes.
      frozen_dtype: in which the weights that do not train are kept.
      stacked: whether the blocks are scanned or a list.
      remat: what is recomputed besides delta, see `ViTConfig`.
      regularise: SNELLA's dropout and drop-path of 0.1 (parallel path), as released.
    """

    method: Method
    model: str = "vit_b16"
    batch: int = 64
    rank: int = 8
    dtype: str = "bfloat16"
    frozen_dtype: str = "bfloat16"
    stacked: bool = True
    remat: Literal["none", "blocks"] = "none"
    regularise: bool = False

    @property
    def path(self) -> str | None:
        """How SNELLA's update is applied; None for the other methods."""
        if not self.method.startswith(("snella", "klora")):
            return None
        return "parallel" if self.method == "snella_parallel" else "merged"

    @property
    def attention(self) -> str:
        """Which implementation of attention the first device gets."""
        config = vit.PRESETS[self.model]
        head_dim = config.width // config.heads
        return attention.best(jax.local_devices()[0], self.dtype, head_dim)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a program that compares methods."""

    method: tuple[Method, ...] = get_args(Method)
    """What is compared."""
    batch: int = 8
    """Images in a step."""
    rank: int = 8
    """Of LoRA's and SNELLA's factors."""
    dtype: Dtype = "bfloat16"
    """Of the computation."""
    frozen_dtype: Dtype = "bfloat16"
    """Of the weights that do not train."""
    stacked: bool = True
    """Whether the blocks are scanned, or a list run one after the other."""
    remat: Literal["none", "blocks"] = "none"
    """What is recomputed besides delta."""

    def settings(self, model: str) -> list[Setting]:
        """A checked setting of `model` for each method.

        Raises:
          ValueError: an option is wrong; says what was expected.
        """
        if not self.method:
            raise ValueError("--method names nothing: expected at least one.")
        names = {field.name for field in dataclasses.fields(Options)} - {"method"}
        shared: dict[str, Any] = {name: getattr(self, name) for name in names}
        return [checked(Setting(each, model, **shared)) for each in self.method]


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that can be jitted, and its arguments.

    Attributes:
      run: of `arguments`; gives the new first two and the loss.
      arguments: trainable, opt_state, budgets, frozen, images, labels, key.
    """

    run: Callable[..., tuple[Any, Any, Array]]
    arguments: tuple[Any, ...]


def build(setting: Setting) -> Step:
    """The step of a setting, with arrays; under `jax.eval_shape` with their shapes."""
    config = vit.PRESETS[setting.model]
    model = _model(setting)
    graphdef, trainable, budgets, frozen = nnx.split(
        model, nnx.Param, snella.Budget, ...
    )
    if setting.method.startswith("snella"):
        # the budgets of a run's last epoch, divided evenly
        budgets = jax.tree.map(lambda b: (b * DENSITY).astype(b.dtype), budgets)
    watch = [snella.track_importance()] * setting.method.startswith("snella")
    tx = optax.chain(*watch, optax.adamw(1e-3, mask=snella.decay_mask))
    key = jax.random.key(0)
    images = jax.random.normal(key, (setting.batch, *config.image_hw, config.channels))
    labels = jnp.arange(setting.batch) % CLASSES
    state = tx.init(trainable)
    arguments = (trainable, state, budgets, frozen, images, labels, key)
    return Step(train.training_step(graphdef, tx), arguments)


def abstract(setting: Setting) -> Step:
    """`build` with the arguments' shapes and dtypes alone."""
    found = []

    def arguments():
        found.append(build(setting))
        return found[0].arguments

    shapes = jax.eval_shape(arguments)
    return dataclasses.replace(found[0], arguments=shapes)


def checked(setting: Setting) -> Setting:
    """The setting, or a `ValueError` that says what is wrong with it."""
    if setting.model not in vit.PRESETS:
        presets = ", ".join(vit.PRESETS)
        raise ValueError(f"No ViT is called {setting.model!r}; there are {presets}.")
    for name in ("batch", "rank"):
        if getattr(setting, name) < 1:
            raise ValueError(f"{name}={getattr(setting, name)}: expected at least 1.")
    if setting.rank % 2:
        raise ValueError(
            f"rank={setting.rank}: expected a multiple of mix_k's 2 pieces."
        )
    return setting


def parameters(model: str) -> int:
    """How many parameters a preset has, with a head of `CLASSES`."""
    shapes = nnx.eval_shape(
        lambda: vit.create(model, num_classes=CLASSES, rngs=nnx.Rngs(0))
    )
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param)))


def _model(setting: Setting) -> nnx.Module:
    model = vit.create(
        setting.model,
        num_classes=CLASSES,
        dtype=jnp.dtype(setting.dtype),
        stacked=setting.stacked,
        remat=setting.remat,
        rngs=nnx.Rngs(0),
    )
    frozen, rngs = jnp.dtype(setting.frozen_dtype), nnx.Rngs(1)
    match setting.method:
        case "full":
            return model
        case "linear":
            freeze(model, "head", frozen)
            return model
        case "bias":
            freeze(model, f"{HEAD}|.*/bias", frozen)
            return model
        case "lora":
            return lora.adapt(model, TARGETS, HEAD, setting.rank, rngs, frozen)
    changes = (
        {"gate": "none", "target_density": 1.0} if setting.method == "klora" else {}
    )
    if setting.method == "snella_parallel":
        rates = dict.fromkeys(("dropout", "drop_path"), 0.1 * setting.regularise)
        changes = {"path": "parallel", **rates}
    adapter = snella.SnellaConfig(
        rank=setting.rank,
        targets=TARGETS,
        trainable=HEAD,
        frozen_dtype=frozen,
        **changes,
    )
    model = snella.adapt(model, adapter, rngs=rngs)
    if setting.method == "snella_stored":
        stored.keep_delta(model)
    return model
