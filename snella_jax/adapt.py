"""The Flax NNX binding: adapt a model, split it for training, merge it back.

>>> from flax import nnx
>>> from snella_jax import SnellaConfig
>>> class Net(nnx.Module):
...     def __init__(self, rngs):
...         self.fc1 = nnx.Linear(6, 8, rngs=rngs)
...         self.head = nnx.Linear(8, 2, rngs=rngs)
...     def __call__(self, x):
...         return self.head(nnx.relu(self.fc1(x)))
>>> config = SnellaConfig(rank=4, targets="fc1", trainable="head")
>>> model = adapt(Net(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
>>> graphdef, trainable, budgets, frozen = partition(model)
>>> sorted(trainable["fc1"]["adapter"]), sorted(trainable["head"])
(['a', 'alpha', 'b', 'beta', 'piece_coeff'], ['bias', 'kernel'])
"""

import logging
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from snella_jax.config import Rule, SnellaConfig
from snella_jax.hosts import to_host
from snella_jax.layers import (
    Adapted,
    Adapter,
    Budget,
    DropKey,
    become,
    check_layer,
    layout_of,
    mixed_class,
    plain_class,
)
from snella_jax.rules import (
    adapted_layers,
    check_overrides,
    check_trainable,
    freeze,
    require_adapters,
    select,
    thaw,
    variables_of,
    weights_of,
)
from snella_jax.weight import Site, Start, start

log = logging.getLogger("snella_jax")
M = TypeVar("M", bound=nnx.Module)


def adapt(model: M, config: SnellaConfig, *, rngs: nnx.Rngs) -> M:
    """A copy of `model` with `w0 + delta` as targeted weights; only `delta` trains.

    Every `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` and `nnx.Conv` (or a subclass
    of them) whose path `config.targets` matches gets an adapter; layers with leading
    axes from `nnx.vmap` get one set of factors for each index. Besides the factors only
    what `config.trainable` matches stays an `nnx.Param`; every other parameter becomes
    `Frozen`, so Flax's default `wrt=nnx.Param` is exactly what trains. `model` itself
    is not changed, and the arrays of the two are shared (but those that
    `config.frozen_dtype` casts).

    Args:
      model: any NNX module, without adapters.
      config: what to adapt and how.
      rngs: its `params` stream draws the factors.

    Raises:
      ValueError: a rule that matches nothing (the message lists what it could have
        meant), a weight that both rules match, a model that is adapted already, a
        weight that another module uses too, or a `split`, path or `drop_path` that does
        not fit a layer.
    """
    model = nnx.clone(model)
    layers = select(model, config.targets)
    check_overrides(config, layers)
    check_trainable(config.trainable, (f"{p}/kernel".lstrip("/") for p in layers))
    sites = {
        path: site(path, layer, config.rule(path), config.must_move)
        for path, layer in layers.items()
    }
    attach(model, layers, sites, start(sites, config, rngs.params()))
    freeze(model, config.trainable, config.frozen_dtype)
    return model


def site(path: str, layer: Any, rule: Rule, must_move: bool) -> Site:
    """Where and how a layer is adapted.

    Raises:
      ValueError: the rule does not fit the layer.
    """
    try:
        layout = layout_of(layer)
        layout = layout.split(rule.split) if rule.split > 1 else layout
        check_layer(layer, rule, layout)
    except ValueError as error:
        raise ValueError(f"{path} cannot be adapted: {error}") from error
    shape = layer.kernel.shape
    stack = shape[: len(shape) - len(layout.shape)]
    return Site(rule, layout, stack, must_move)


def attach(
    model: nnx.Module,
    layers: dict[str, Any],
    sites: dict[str, Site],
    starts: dict[str, Start],
) -> None:
    """Gives each of the layers of `model` its adapter, in place.

    Raises:
      ValueError: another module uses the weight of one of them, too.
    """
    _refuse_tied(model, layers)
    for path, layer in layers.items():
        become(layer, mixed_class(Adapted, type(layer)))
        layer.adapter = Adapter(sites[path], starts[path])


def partition(
    model: nnx.Module,
) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
    """Splits an adapted model for functional training.

    Returns:
      `graphdef`, static; `trainable`, the factors and what `config.trainable` named,
      for the optimizer; `budgets`, int32, for `reallocate`; `frozen`, all else.
      `nnx.merge(graphdef, trainable, budgets, frozen)` gives the model back.

    Random streams (`nnx.Dropout`) and batch statistics land in `frozen`: a functional
    step has to return and carry them, or they repeat.

    Raises:
      ValueError: the model has no adapters.
    """
    require_adapters(model)
    graphdef, trainable, budgets, frozen = nnx.split(model, nnx.Param, Budget, ...)
    changing = (nnx.RngState, nnx.BatchStat)
    if any(True for kind in changing for _ in variables_of(model, kind)):
        log.warning(
            "the model has random streams or batch statistics, which are in `frozen`: "
            "carry them from step to step, or they repeat"
        )
    return graphdef, trainable, budgets, frozen


def merge(model: M, *, unmoved_budgets: bool = False) -> M:
    """A plain copy of an adapted model: `w0 + delta` as weights, no adapters.

    Its outputs equal the adapted model's to rounding. The sum is taken in at least
    float32 and stored in the weight's dtype; where that is narrower, the share of moved
    weights that rounding lost is logged.

    Args:
      model: an adapted model.
      unmoved_budgets: allow a model whose budgets never moved.

    Raises:
      BudgetsNeverMoved: the config asked for adaptive sparsity, and `reallocate` was
        never called, so the sparsity is not what the config says.
      ValueError: the model has no adapters.
    """
    weights = weights_of(model)
    model = nnx.clone(model)
    for weight, (_, layer) in zip(weights, adapted_layers(model), strict=True):
        layer.kernel[...] = weight.merged(unmoved_budgets)
    remove(model)
    return model


def remove(model: nnx.Module) -> None:
    """Makes a model plain again, in place: no adapters, nothing frozen."""
    for _, layer in list(adapted_layers(model)):
        del layer.adapter
        become(layer, plain_class(type(layer)))
    thaw(model)


def seed(model: nnx.Module, key: PRNGKeyArray) -> None:
    """Gives every adapter that drops something a key of its own for this step.

    Call it inside the step on the freshly merged model, with a fresh key every step.
    Layers of a stack get different keys. Changes `model` in place.
    """
    for index, (_, layer) in enumerate(adapted_layers(model)):
        adapter = layer.adapter
        if adapter.rule.dropout or adapter.rule.drop_path:
            stack = adapter.site.stack
            own = jax.random.fold_in(key, index)
            adapter.key = DropKey(jax.random.split(own, stack) if stack else own)


def adapted_weights(model: nnx.Module) -> int:
    """How many weights of the base the adapters reach: the budget of density 1."""
    require_adapters(model)
    sites = (layer.adapter.site for _, layer in adapted_layers(model))
    return sum(site.capacity * math.prod(site.lead) for site in sites)


def merged_magnitude(model: nnx.Module) -> dict[str, np.ndarray]:
    """Mean `|delta|` of every matrix: `scores` for `reallocate` (Table X)."""
    return {
        f"{weight.path}/adapter".lstrip("/"): to_host(
            weight.per_matrix(_mean_magnitude)
        )
        for weight in weights_of(model)
    }


def _mean_magnitude(delta: jax.Array) -> jax.Array:
    return jnp.abs(delta).mean()


def _refuse_tied(model: nnx.Module, layers: dict[str, Any]) -> None:
    """One weight cannot be merged with two updates, nor with one for only one user."""
    users: dict[int, set[int]] = {}
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            for value in vars(node).values():
                users.setdefault(id(value), set()).add(id(node))
    tied = [path for path, x in layers.items() if len(users[id(x.kernel)]) > 1]
    if tied:
        raise ValueError(
            f"The weights of {', '.join(tied)} are tied to another module's: leave "
            "them out of the targets, or untie them."
        )
