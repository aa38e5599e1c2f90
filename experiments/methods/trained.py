"""The methods that are trained by steps: how each adapts a model, and what it left."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax
from flax import nnx

import snella_jax as snella
from experiments.config import RunConfig
from experiments.methods import lora
from snella_jax.rules import select

Name = Literal["lora", "snella"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One of them.

    Attributes:
      title: how tables call it.
      adapt: a copy of a model that is trained this way.
      watch: transformations that see the raw gradient.
      schedule: the total budget by epoch, of an adapted model; None for no budgets.
      merged: the trained model as it is tested.
      moved: weights of the base that training changed, of base, trained and merged.
    """

    title: str
    adapt: Callable[[RunConfig, Any], Any]
    watch: Callable[[RunConfig], tuple[optax.GradientTransformation, ...]]
    schedule: Callable[[RunConfig, Any], Callable[[int], int] | None]
    merged: Callable[[Any], Any]
    moved: Callable[[RunConfig, Any, Any, Any], int]


def _lora(config: RunConfig, base: Any) -> Any:
    where = config.targets, config.trainable
    return lora.adapt(base, *where, config.lora.rank, nnx.Rngs(config.seed + 1))


def _snella(config: RunConfig, base: Any) -> Any:
    adapter = config.snella.adapter(config.targets, config.trainable)
    return snella.adapt(base, adapter, rngs=nnx.Rngs(config.seed + 1))


def _changed(config: RunConfig, base: Any, _: Any, merged: Any) -> int:
    before, after = (select(model, config.targets) for model in (base, merged))
    return sum(
        int(jnp.sum(before[path].kernel[...] != after[path].kernel[...]))
        for path in before
    )


METHODS: dict[Name, Method] = {
    "lora": Method(
        "LoRA",
        adapt=_lora,
        watch=lambda config: (),
        schedule=lambda config, model: None,
        merged=lambda model: model,
        moved=lambda config, base, model, merged: lora.weights_moved(model),
    ),
    "snella": Method(
        "SNELLA",
        adapt=_snella,
        watch=lambda config: (
            snella.track_importance(config.snella.beta1, config.snella.beta2),
        ),
        schedule=lambda config, model: config.schedule(snella.adapted_weights(model)),
        # The best epoch may have come before the first reallocation.
        merged=lambda model: snella.merge(model, unmoved_budgets=True),
        moved=_changed,
    ),
}
