"""The methods that are trained by steps: how each adapts a model, and what it left."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax
from flax import nnx

import snella_jax as snella
from experiments.config import RunConfig, Trained
from experiments.methods import adapter, dora, lora, ssf
from snella_jax.rules import freeze, select

Name = Trained


def _nothing_to_watch(config: RunConfig) -> tuple[optax.GradientTransformation, ...]:
    return ()


def _no_budgets(config: RunConfig, model: Any) -> None:
    return None


def _as_it_is(model: Any) -> Any:
    return model


def _changed(config: RunConfig, base: Any, model: Any, merged: Any) -> int:
    """Weights of the targeted kernels that differ."""
    before, after = (select(net, config.targets) for net in (base, merged))
    return sum(
        int(jnp.sum(before[path].kernel[...] != after[path].kernel[...]))
        for path in before
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """One of them.

    Attributes:
      title: how tables call it, before the rank.
      adapt: a copy of a model that is trained this way; what does not train is no
        `nnx.Param` in it.
      watch: transformations that see the raw gradient.
      schedule: the total budget by epoch, of an adapted model; None for no budgets.
      merged: the trained model as it is tested.
      moved: weights of the targeted kernels that training changed, of base, trained and
        merged model.
    """

    title: str
    adapt: Callable[[RunConfig, Any], Any]
    watch: Callable[[RunConfig], tuple[optax.GradientTransformation, ...]] = (
        _nothing_to_watch
    )
    schedule: Callable[[RunConfig, Any], Callable[[int], int] | None] = _no_budgets
    merged: Callable[[Any], Any] = _as_it_is
    moved: Callable[[RunConfig, Any, Any, Any], int] = _changed


def _full(config: RunConfig, base: Any) -> Any:
    return nnx.clone(base)


def _bias(config: RunConfig, base: Any) -> Any:
    model = nnx.clone(base)
    freeze(model, f"{config.trainable}|.*/bias")
    return model


def _lora(config: RunConfig, base: Any) -> Any:
    where = config.targets, config.trainable
    return lora.adapt(base, *where, config.lora.rank, nnx.Rngs(config.seed + 1))


def _lora_moved(config: RunConfig, base: Any, model: Any, merged: Any) -> int:
    return lora.weights_moved(model)


def _kernelized(name: Name, title: str) -> Method:
    """A method that differs from SNELLA in its settings alone."""

    def adapt(config: RunConfig, base: Any) -> Any:
        adapter = getattr(config, name).adapter(config.targets, config.trainable)
        return snella.adapt(base, adapter, rngs=nnx.Rngs(config.seed + 1))

    def watch(config: RunConfig) -> tuple[optax.GradientTransformation, ...]:
        own = getattr(config, name)
        importance = snella.track_importance(own.beta1, own.beta2)
        return (importance,) if own.competes else ()

    def schedule(config: RunConfig, model: Any) -> Callable[[int], int] | None:
        own = getattr(config, name)
        weights = snella.adapted_weights(model)
        return config.schedule(own, weights) if own.competes else None

    def merged(model: Any) -> Any:  # perhaps of an epoch before the first reallocation
        return snella.merge(model, unmoved_budgets=True)

    return Method(title, adapt, watch, schedule, merged)


def _ssf(config: RunConfig, base: Any) -> Any:
    return ssf.adapt(base, config.trainable, nnx.Rngs(config.seed + 1))


def _bottlenecks(name: Name, title: str, where: Literal["sequential", "parallel"]):
    def adapt(config: RunConfig, base: Any) -> Any:
        rank, rngs = getattr(config, name).rank, nnx.Rngs(config.seed + 1)
        return adapter.adapt(base, where, config.trainable, rank, rngs)

    return Method(title, adapt)


def _dora(config: RunConfig, base: Any) -> Any:
    where = config.targets, config.trainable
    return dora.adapt(base, *where, config.dora.rank, nnx.Rngs(config.seed + 1))


METHODS: dict[Name, Method] = {
    "full": Method("Full", _full),
    "bias": Method("Bias", _bias),
    "ssf": Method("SSF", _ssf, merged=ssf.merge),
    "adapter": _bottlenecks("adapter", "Adapter", "sequential"),
    "adaptformer": _bottlenecks("adaptformer", "AdaptFormer", "parallel"),
    "lora": Method("LoRA", _lora, moved=_lora_moved),
    "dora": Method("DoRA", _dora, merged=dora.merge),
    "klora": _kernelized("klora", "KLoRA"),
    "mixk": _kernelized("mixk", "Mix-K"),
    "snell": _kernelized("snell", "SNELL"),
    "snella": _kernelized("snella", "SNELLA"),
}
