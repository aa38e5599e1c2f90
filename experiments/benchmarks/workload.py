"""One training step of every method on a model, to measure its memory and time.

The step is the trainer's own (`experiments.training.step`), with AdamW, on a batch of
`batches`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

import snella_jax as snella
from experiments.benchmarks import batches, stored_delta
from experiments.benchmarks.batches import CLASSES
from experiments.benchmarks.layout import Layout
from experiments.config import language
from experiments.methods import registry, sensitivity
from experiments.methods.first_stage import Staged
from experiments.methods.masked import MaskedSnella
from experiments.methods.method import Method
from experiments.methods.noah import Noah
from experiments.methods.sensitivity import Scored
from experiments.methods.sketched import Sketched
from experiments.methods.snella import Snella
from experiments.names import unknown
from experiments.training import step
from experiments.training.classification import Classification
from experiments.training.session import Scope
from snella_jax import models
from snella_jax.models import convnext, llama, sam, vit
from snella_jax.models.layers import attention
from snella_jax.models.layers.basic import Constant
from snella_jax.models.sd3 import mmdit
from snella_jax.nnx.surgery import freeze
from snella_jax.nnx.variables import Frozen, variables_of

DENSITY = 0.3
HEAD = "head|cls_token"
TARGETS = r"blocks/.*/(query|key|value|out|fc1|fc2)"
SCOPE = Scope(TARGETS, HEAD)
MASKS = Scope(sam.Sam.default_targets, sam.Sam.default_trainable)
TEXTS = Scope(language.TARGETS, "")
PICTURES = Scope(mmdit.MMDiT.default_targets, mmdit.MMDiT.default_trainable)

VARIANTS = ("snella_parallel", "snella_stored")  # of snella, for comparison
USUAL = (
    "full",
    "linear",
    "bias",
    "lora",
    "mixk",
    "snella",
    "snella_parallel",
    "snella_stored",
)
KERNELIZED = ("klora", "mixk", "snell", "snella_released", *VARIANTS)
USUAL_OF_TEXTS = ("full", "lora", "dora", "snella")
OF_TEXTS = (*USUAL_OF_TEXTS, *KERNELIZED)
USUAL_OF_MASKS = ("full", "lora", "ssf", "snella")
OF_MASKS = (*USUAL_OF_MASKS, "bias", "dora", *KERNELIZED)
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "blocks"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method on a model.

    Attributes:
      method: name of the method that fine-tunes the model.
      model: preset of `snella_jax.models`.
      batch: images or texts in a step.
      rank: rank of factors, width of bottlenecks.
      dtype: dtype of the computation.
      frozen_dtype: dtype of the weights that do not train.
      stacked: True if the blocks are scanned, False if they are a list.
      remat: parts that are recomputed besides delta, see `vit.ViTConfig`.
      memory, activation: fields of the model's config; None for its own activation.
      sequence: tokens of a text; None for images.
      sketch: rows of an input to one that the method keeps, see `ops.sketch`; 1 of a
        method without the option.
    """

    method: str
    model: str = "vit_b16"
    batch: int = 64
    rank: int = 8
    dtype: str = "bfloat16"
    frozen_dtype: str = "bfloat16"
    stacked: bool = True
    remat: Remat = "none"
    memory: str = "usual"
    activation: str | None = None
    sequence: int | None = None
    sketch: int = 1

    @property
    def trained(self) -> Method | None:
        """The method with the settings that it is measured with; None for a probe."""
        if self.method == registry.LINEAR:
            return None
        name = "snella" if self.method in VARIANTS else self.method
        own = registry.METHODS[name]
        changes: dict[str, Any] = {}
        if "rank" in {field.name for field in dataclasses.fields(own)}:
            changes["rank"] = self.rank
        if self.method == "snella_parallel":
            changes["path"] = "parallel"
        if self.sketch > 1:
            changes["sketch"] = self.sketch
        return dataclasses.replace(own, **changes)

    @property
    def path(self) -> str | None:
        """Path by which a kernelized update is applied; None for other methods."""
        own = self.trained
        return own.path if isinstance(own, Snella) else None

    @property
    def attention(self) -> str | None:
        """Implementation of attention on the first device; None if there is none.

        Both, with a comma, if a SAM's windows have another than its whole grid.
        """
        config = models.PRESETS[self.model]
        match config:
            case vit.ViTConfig():
                widths = [config.width // config.heads]
            case llama.LlamaConfig():
                widths = [config.head_dim]
            case mmdit.MMDiTConfig():
                widths = [config.width // config.heads]
            case sam.SamConfig(encoder=sam.ViTEncoderConfig() as encoder):
                widths = encoder.attention_widths
            case _:
                return None if isinstance(config, convnext.ConvNeXtConfig) else "xla"
        device = jax.local_devices()[0]
        found = [attention.best(device, self.dtype, width) for width in widths]
        return ", ".join(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a command that compares methods."""

    method: tuple[str, ...] | None = None
    """Methods to compare. snella_parallel: the update in a matmul of its own.
    snella_stored: without the recompute. Default: full linear bias lora mixk snella
    snella_parallel snella_stored; of a language model or an MMDiT full lora dora
    snella; of a SAM full lora ssf snella."""
    batch: int = 8
    """Images or texts in a step, over all chips."""
    sequence: int = 256
    """Tokens of a text."""
    rank: int = 8
    """Rank of factors, width of bottlenecks."""
    dtype: Dtype = "bfloat16"
    """Dtype of the computation."""
    frozen_dtype: Dtype = "bfloat16"
    """Dtype of the weights that do not train."""
    stacked: bool = True
    """Scan the blocks, or run a list of them one after the other."""
    remat: Remat | None = None
    """Parts that are recomputed besides delta. Default: none; of a language model
    or an MMDiT blocks."""
    memory: str = "usual"
    """What blocks keep: usual, or lean for what took a matmul alone, perhaps with
    +attention, +qkv, +hidden for what of it is made again."""
    activation: Literal["gelu", "gelu2", "silu", "silu2"] | None = None
    """gelu2, of a LLaMA silu2: the exact activation with a derivative by steps."""
    sketch: tuple[int, ...] = (1,)
    """Tokens to one that is kept of a layer's input; 1: all. A row for each number, of
    full, lora, dora and the methods with kernels, but for snella_parallel,
    snella_stored and snella_released."""

    def settings(self, model: str) -> list[Setting]:
        """Returns a checked setting of `model` for each method.

        Raises:
          ValueError: an option is wrong; says what was expected.
        """
        texts = model in llama.PRESETS
        large = texts or model in mmdit.PRESETS
        usual = USUAL_OF_MASKS if model in sam.PRESETS else USUAL
        usual = USUAL_OF_TEXTS if large else usual
        methods = usual if self.method is None else self.method
        if not methods:
            raise ValueError("--method names nothing: expected at least one.")
        if min(self.sketch, default=0) < 1:
            raise ValueError(f"sketch={self.sketch}: expected numbers of at least 1.")
        names = {field.name for field in dataclasses.fields(Options)}
        names -= {"method", "sketch"}
        shared: dict[str, Any] = {name: getattr(self, name) for name in names}
        shared["remat"] = self.remat or ("blocks" if large else "none")
        if not texts:
            shared["sequence"] = None
        return [
            checked(Setting(each, model, **shared, sketch=factor))
            for each in methods
            for factor in (self.sketch if has_sketch(each) else (1,))
        ]


def has_sketch(method: str) -> bool:
    """Returns True if a method has the option; the name may be wrong."""
    own = registry.METHODS.get(method)
    return isinstance(own, Sketched) and method != "snella_released"  # in parallel


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that can be jitted, and its arguments.

    Attributes:
      run: the step's function of `arguments`; returns new values of those that are
        `donated`, and in training the loss.
      arguments: in training trainable, opt_state, budgets, frozen, batch, key.
      stacked: True if the method's blocks are scanned.
      donated: indices of the donated arguments.
      where: shardings of the arguments on a mesh; None on one device.
    """

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    stacked: bool
    donated: tuple[int, ...]
    where: tuple[Any, ...] | None = None


def build(setting: Setting, layout: Layout | None = None) -> Step:
    """Returns the step of a setting with its arrays.

    Args:
      setting: method and model.
      layout: how the step lies on several devices; None for on one.
    """
    return _training(setting, _model(setting), layout)


def abstract(setting: Setting, layout: Layout | None = None) -> Step:
    """Returns the step of a setting with shapes and dtypes for arguments."""
    return _abstract(lambda: build(setting, layout))


def _abstract(make: Callable[[], Step]) -> Step:
    found = []

    def arguments():
        found.append(make())
        return found[0].arguments

    shapes = jax.eval_shape(arguments)
    return dataclasses.replace(found[0], arguments=shapes)


def _training(setting: Setting, model: Any, layout: Layout | None = None) -> Step:
    if layout is not None:
        layout.pin(model)
    graphdef, trainable, budgets, frozen = nnx.split(
        model, nnx.Param, snella.Budget, ...
    )
    watch = setting.trained.watch() if setting.trained else ()
    if watch:  # the budgets of a run's last epoch, divided evenly
        budgets = jax.tree.map(lambda b: (b * DENSITY).astype(b.dtype), budgets)
    tx = optax.chain(*watch, optax.adamw(1e-3, mask=snella.decay_mask))
    state, key = tx.init(trainable), jax.random.key(0)
    arguments = (trainable, state, budgets, frozen, _batch(setting), key)
    loss = batches.objective(models.PRESETS[setting.model]).loss
    where = None if layout is None else layout.of_arguments(arguments)
    run = step.training_step(graphdef, tx, loss, where=where and where[0])
    return Step(run, arguments, model.config.stacked, (0, 1), where)


def _scoring(setting: Setting, method: Scored) -> Step:
    """Returns the step of scores so far, kernels, the rest of the base and a batch."""
    model = sensitivity.headed(_base(setting), jax.random.key(0))
    graphdef, kernels, rest = sensitivity.split(model, TARGETS)
    scores = sensitivity.zeros(kernels)
    loss = sensitivity.loss_of(model, method.rule, Classification())
    run = sensitivity.scoring_step(graphdef, method.rule, loss)
    arguments = scores, kernels, rest, _batch(setting)
    return Step(run, arguments, setting.stacked, donated=(0,))


def checked(setting: Setting) -> Setting:
    """Returns the setting; raises a `ValueError` that says what is wrong with it."""
    if setting.model not in models.PRESETS:
        where = "snella_jax.models.PRESETS"
        raise ValueError(unknown("model", setting.model, models.PRESETS, where))
    methods = (registry.LINEAR, *registry.METHODS, *VARIANTS)
    if setting.method not in methods:
        where = "python -m experiments.vtab --help"
        raise ValueError(unknown("method", setting.method, methods, where))
    no_classifiers = {**llama.PRESETS, **mmdit.PRESETS}, OF_TEXTS
    for presets, methods in (no_classifiers, (sam.PRESETS, OF_MASKS)):
        if setting.model in presets and setting.method not in methods:
            raise ValueError(
                f"method={setting.method}: expected one of {', '.join(methods)} for a "
                f"{setting.model}."
            )
    if setting.model in llama.PRESETS and (setting.sequence or 0) < 2:
        raise ValueError(f"sequence={setting.sequence}: expected at least 2 tokens.")
    own = setting.trained
    plain = isinstance(models.PRESETS[setting.model], vit.ViTConfig)
    if own is not None and own.needs_vit and not plain:
        raise ValueError(
            f"method={setting.method}: expected a ViT, not a {setting.model}."
        )
    for name in ("batch", "rank", "sketch"):
        if getattr(setting, name) < 1:
            raise ValueError(f"{name}={getattr(setting, name)}: expected at least 1.")
    if isinstance(own, Snella | MaskedSnella) and setting.rank % 2:
        raise ValueError(
            f"rank={setting.rank}: expected a multiple of mix_k's 2 pieces."
        )
    return setting


def parameters(model: str) -> int:
    """Returns the number of parameters, of a classifier with a head of `CLASSES`."""
    shapes = nnx.eval_shape(
        lambda: models.create(model, rngs=nnx.Rngs(0), **_head(model))
    )
    return size(nnx.state(shapes, nnx.Param))


def _head(model: str) -> dict[str, int]:
    return {"num_classes": CLASSES} if model in models.IMAGE_PRESETS else {}


def size(tree: Any) -> int:
    """Returns the number of elements in a tree of arrays or of shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def locating(setting: Setting) -> Step | None:
    """Returns the abstract step of a method's first stage; None if it has none."""
    own = setting.trained
    if isinstance(own, Scored):
        return _abstract(lambda: _scoring(setting, own))
    if isinstance(own, Noah):
        return _abstract(lambda: _training(setting, _supernet(setting, own)))
    return None


def _batch(setting: Setting) -> dict[str, Array]:
    config = models.PRESETS[setting.model]
    return batches.batch(config, setting.batch, setting.sequence)


def _scope(setting: Setting) -> Scope:
    if setting.model in sam.PRESETS:
        return MASKS
    if setting.model in mmdit.PRESETS:
        return PICTURES
    return TEXTS if setting.model in llama.PRESETS else SCOPE


def _base(setting: Setting) -> models.Model:
    return models.create(
        setting.model,
        **_head(setting.model),
        dtype=jnp.dtype(setting.dtype),
        stacked=setting.stacked,
        remat=setting.remat,
        memory=setting.memory,
        **({"activation": setting.activation} if setting.activation else {}),
        rngs=nnx.Rngs(0),
    )


def _model(setting: Setting) -> Any:
    model: Any = _base(setting)
    own, scope = setting.trained, _scope(setting)
    if own is None:
        freeze(model, "head")
    else:
        if isinstance(own, Staged):
            scope = dataclasses.replace(scope, places=own.typical(model, scope))
        model = own.adapt(model, scope)
    if setting.method == "snella_stored":
        stored_delta.keep_delta(model)
    return _cast(setting, model)


def _supernet(setting: Setting, method: Noah) -> Any:
    return _cast(setting, method.supernet(_base(setting), SCOPE))


def _cast(setting: Setting, model: Any) -> Any:
    kept = (v for kind in (Frozen, Constant) for _, v in variables_of(model, kind))
    for variable in kept:
        if jnp.issubdtype(variable.dtype, jnp.floating):
            variable.set_value(variable[...].astype(setting.frozen_dtype))
    return model
