"""The methods that are trained by steps: how each adapts a model, and what it left."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax
from flax import nnx

import snella_jax as snella
from experiments.config.run_config import RunConfig
from experiments.methods import (
    adapter,
    dora,
    gps,
    lora,
    masked,
    mlp_head,
    mosa,
    noah,
    prompts,
    sparse,
    spt,
    ssf,
    vqt,
)
from experiments.methods.first_stage import Places, Stage
from experiments.methods.sensitivity import Scores, Scoring, top
from experiments.methods.settings import Trained
from experiments.training.competition import Competition
from snella_jax import models
from snella_jax.models.swin.model import Pair
from snella_jax.nnx.surgery import freeze
from snella_jax.nnx.targets import select

Name = Trained


def _nothing_to_watch(config: RunConfig) -> tuple[optax.GradientTransformation, ...]:
    return ()


def _no_competition(config: RunConfig, model: Any) -> None:
    return None


def _as_it_is(model: Any) -> Any:
    return model


def _changed(config: RunConfig, base: Any, model: Any, merged: Any) -> int:
    """Weights of the targeted kernels that differ."""
    before = {p: x.kernel[...] for p, x in select(base, config.targets).items()}
    if base.config.stacked and not merged.config.stacked:
        before = spt.by_block(before)
    after = select(merged, "|".join(before))
    return sum(int(jnp.sum(w != after[path].kernel[...])) for path, w in before.items())


@dataclasses.dataclass(frozen=True)
class Method:
    """One of them.

    Attributes:
      title: how tables call it, before the rank.
      adapt: a copy of a model that is trained this way; what does not train is no
        `nnx.Param` in it. Of the config, the model, and what was located, if anything.
      stage: the first stage; None where there is none.
      watch: transformations that see the raw gradient.
      competition: when and how budgets of an adapted model move; None for never.
      merged: the trained model as it is tested.
      moved: weights of the targeted kernels that training changed, of base, trained and
        merged model.
    """

    title: str
    adapt: Callable[..., Any]
    stage: Stage | None = None
    watch: Callable[[RunConfig], tuple[optax.GradientTransformation, ...]] = (
        _nothing_to_watch
    )
    competition: Callable[[RunConfig, Any], Competition | None] = _no_competition
    merged: Callable[[Any], Any] = _as_it_is
    moved: Callable[[RunConfig, Any, Any, Any], int] = _changed


def _full(config: RunConfig, base: Any) -> Any:
    return nnx.clone(base)


def _bias(config: RunConfig, base: Any) -> Any:
    model = nnx.clone(base)
    freeze(model, f"{config.trainable}|.*/bias")
    return model


def _partial(config: RunConfig, base: Any) -> Any:
    model = models.unstack(base)
    freeze(model, f"head|norm|{_last_block(model)}")
    return model


def _last_block(model: Any) -> str:
    """The path of the block before the head, where blocks are lists."""
    blocks, path = model.blocks, "blocks"
    while isinstance(blocks, nnx.List):
        path, blocks = f"{path}/{len(blocks) - 1}", blocks[-1]
    return f"{path}/shifted" if isinstance(blocks, Pair) else path


def _mlp(config: RunConfig, base: Any) -> Any:
    return mlp_head.adapt(base, nnx.Rngs(config.seed + 1))


def _lora(config: RunConfig, base: Any) -> Any:
    where = config.targets, config.trainable
    return lora.adapt(base, *where, config.lora.rank, nnx.Rngs(config.seed + 1))


def _kernelized(name: Name, title: str) -> Method:
    """A method that differs from SNELLA in its settings alone."""

    def adapt(config: RunConfig, base: Any) -> Any:
        adapter = getattr(config, name).adapter(config.targets, config.trainable)
        layers = select(base, config.targets)
        own = {adapter.override(path) for path in layers}  # a ConvNeXt has no `out`
        kept = {
            regex: rule for regex, rule in adapter.overrides.items() if regex in own
        }
        adapter = dataclasses.replace(adapter, overrides=kept)
        return snella.adapt(base, adapter, rngs=nnx.Rngs(config.seed + 1))

    def watch(config: RunConfig) -> tuple[optax.GradientTransformation, ...]:
        own = getattr(config, name)
        return (own.importance(),) if own.competes else ()

    def competition(config: RunConfig, model: Any) -> Competition | None:
        own = getattr(config, name)
        weights = snella.adapted_weights(model)
        return config.competition(own, weights) if own.competes else None

    def merged(model: Any) -> Any:  # perhaps of an epoch before the first reallocation
        return snella.merge(model, unmoved_budgets=True)

    return Method(title, adapt, None, watch, competition, merged)


def _ssf(config: RunConfig, base: Any) -> Any:
    return ssf.adapt(base, config.trainable, nnx.Rngs(config.seed + 1))


def _bottlenecks(
    name: Name, title: str, where: Literal["sequential", "parallel"]
) -> Method:
    def adapt(config: RunConfig, base: Any) -> Any:
        rank, rngs = getattr(config, name).rank, nnx.Rngs(config.seed + 1)
        return adapter.adapt(base, where, config.trainable, rank, rngs)

    return Method(title, adapt)


def _prompts(name: Name, title: str, where: Literal["shallow", "deep"]) -> Method:
    def adapt(config: RunConfig, base: Any) -> Any:
        count, rngs = getattr(config, name).count, nnx.Rngs(config.seed + 1)
        return prompts.adapt(base, where, config.trainable, count, rngs)

    return Method(title, adapt)


def _vqt(config: RunConfig, base: Any) -> Any:
    return vqt.adapt(base, config.vqt.count, nnx.Rngs(config.seed + 1))


def _mosa(config: RunConfig, base: Any) -> Any:
    own, rngs = config.mosa, nnx.Rngs(config.seed + 1)
    return mosa.adapt(base, config.trainable, own.rank, own.parts, rngs)


def _spt(name: Name, title: str, module: Literal["lora", "adapter"]) -> Method:
    def choose(config: RunConfig, scores: Scores) -> Places:
        return spt.sensitive(scores, getattr(config, name).share)

    def adapt(config: RunConfig, base: Any, places: Places) -> Any:
        own, rngs = getattr(config, name), nnx.Rngs(config.seed + 1)
        how = config.trainable, own.rank, own.ease, rngs
        return spt.adapt(base, places, module, *how)

    return Method(title, adapt, Scoring("squares", choose), merged=spt.merge)


def _noah(config: RunConfig, base: Any, places: Places) -> Any:
    rngs = nnx.Rngs(config.seed + 1)
    return noah.adapt(base, places, config.trainable, rngs)


def _mask_choice(config: RunConfig, scores: Scores) -> Places:
    return top(scores, config.snella_masked.target_density)


def _masked(config: RunConfig, base: Any, places: Places) -> Any:
    own, rngs = config.snella_masked, nnx.Rngs(config.seed + 1)
    kernel = snella.kernels.named(own.kernel)
    return masked.adapt(base, places, config.trainable, kernel, own.rank, rngs)


def _gps_choice(config: RunConfig, scores: Scores) -> Places:
    return gps.selected(scores, config.gps.per_neuron)


def _gps(config: RunConfig, base: Any, places: Places) -> Any:
    return gps.adapt(base, places, config.trainable)


def _dora(config: RunConfig, base: Any) -> Any:
    where = config.targets, config.trainable
    return dora.adapt(base, *where, config.dora.rank, nnx.Rngs(config.seed + 1))


METHODS: dict[Name, Method] = {
    "full": Method("Full", _full),
    "partial1": Method("Partial-1", _partial),
    "mlp3": Method("MLP-3", _mlp),
    "bias": Method("Bias", _bias),
    "ssf": Method("SSF", _ssf, merged=ssf.merge),
    "vpt_shallow": _prompts("vpt_shallow", "VPT-Shallow", "shallow"),
    "vpt_deep": _prompts("vpt_deep", "VPT-Deep", "deep"),
    "vqt": Method("VQT", _vqt),
    "adapter": _bottlenecks("adapter", "Adapter", "sequential"),
    "adaptformer": _bottlenecks("adaptformer", "AdaptFormer", "parallel"),
    "mosa": Method("MoSA", _mosa),
    "spt_adapter": _spt("spt_adapter", "SPT-Adapter", "adapter"),
    "spt_lora": _spt("spt_lora", "SPT-LoRA", "lora"),
    "gps": Method(
        "GPS", _gps, Scoring("contrastive", _gps_choice), merged=sparse.merge
    ),
    "noah": Method("NOAH", _noah, noah.Search(), merged=lora.merge),
    "lora": Method("LoRA", _lora, merged=lora.merge),
    "dora": Method("DoRA", _dora, merged=dora.merge),
    "klora": _kernelized("klora", "KLoRA"),
    "mixk": _kernelized("mixk", "Mix-K"),
    "snell": _kernelized("snell", "SNELL"),
    "snella": _kernelized("snella", "SNELLA"),
    "snella_masked": Method(
        "Masked SNELLA",
        _masked,
        Scoring("squares", _mask_choice),
        merged=masked.merge,
    ),
    "snella_released": _kernelized("snella_released", "Released SNELLA"),
}
