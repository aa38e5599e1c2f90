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
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from snella_jax.budget import allocate
from snella_jax.config import SnellaConfig
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
    freeze,
    listed,
    select,
    thaw,
    variables_of,
)

log = logging.getLogger("snella_jax")
M = TypeVar("M", bound=nnx.Module)


class BudgetsNeverMoved(RuntimeError):
    """A model that should be adaptively sparse was never reallocated."""


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
        meant), a model that is adapted already, a weight that another module uses too,
        or a `split`, path or `drop_path` that does not fit a layer.
    """
    model = nnx.clone(model)
    layers = select(model, config.targets)
    unused = set(config.overrides) - {config.override(path) for path in layers}
    if unused:
        raise ValueError(
            f"overrides: {', '.join(map(repr, sorted(unused)))} matches none of the "
            f"targets (or an earlier override matches first): {listed(layers)}"
        )
    _refuse_tied(model, layers)
    key = rngs.params()
    for index, (path, layer) in enumerate(layers.items()):
        rule = config.rule(path)
        try:
            layout = layout_of(layer)
            layout = layout.split(rule.split) if rule.split > 1 else layout
            check_layer(layer, rule, layout)
        except ValueError as error:
            raise ValueError(f"{path} cannot be adapted: {error}") from error
        shape = layer.kernel.shape
        stack = shape[: len(shape) - len(layout.shape)]
        become(layer, mixed_class(Adapted, type(layer)))
        layer.adapter = Adapter(
            rule, layout, stack, config, jax.random.fold_in(key, index)
        )
    _start_budgets(model, config.starting_density)
    freeze(model, config.trainable, config.frozen_dtype)
    return model


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
    _require_adapters(model)
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
    _require_adapters(model)
    model = nnx.clone(model)
    for path, layer in adapted_layers(model):
        adapter = layer.adapter
        never = adapter.must_move and not bool(jnp.any(adapter.allocated_at[...]))
        if never and not unmoved_budgets:
            raise BudgetsNeverMoved(
                f"The budget of {path} was never reallocated, so the model is not as "
                "sparse as its config says. Call snella.reallocate(budgets, opt_state, "
                "total) once an epoch while training. For no competition between "
                'matrices use SnellaConfig(allocation="fixed"); to merge the model as '
                "it is, pass unmoved_budgets=True."
            )
        layer.kernel[...] = _add(path, layer.kernel[...], adapter.delta())
        del layer.adapter
        become(layer, plain_class(type(layer)))
    thaw(model)
    return model


def seed(model: nnx.Module, key: PRNGKeyArray) -> None:
    """Gives every adapter that drops something a key of its own for this step.

    Call it inside the step on the freshly merged model, with a fresh key every step.
    Layers of a stack get different keys. Changes `model` in place.
    """
    for index, (_, layer) in enumerate(adapted_layers(model)):
        adapter = layer.adapter
        if adapter.rule.dropout or adapter.rule.drop_path:
            stack = adapter.budget.shape[
                : adapter.budget.ndim - len(adapter.layout.slices)
            ]
            own = jax.random.fold_in(key, index)
            adapter.key = DropKey(jax.random.split(own, stack) if stack else own)


def adapted_weights(model: nnx.Module) -> int:
    """How many weights of the base the adapters reach: the budget of density 1."""
    _require_adapters(model)
    return sum(
        layer.adapter.capacity * layer.adapter.budget.size
        for _, layer in adapted_layers(model)
    )


def merged_magnitude(model: nnx.Module) -> dict[str, np.ndarray]:
    """Mean `|delta|` of every matrix: `scores` for `reallocate` (Table X)."""
    return {
        f"{path}/adapter".lstrip("/"): np.asarray(
            layer.adapter.per_matrix(_mean_magnitude)
        )
        for path, layer in adapted_layers(model)
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


def _start_budgets(model: nnx.Module, density: float) -> None:
    adapters = [layer.adapter for _, layer in adapted_layers(model)]
    capacities = np.concatenate(
        [np.full(adapter.budget.size, adapter.capacity) for adapter in adapters]
    )
    total = round(density * int(capacities.sum()))
    counts = allocate(np.zeros(len(capacities)), total, capacities)
    for adapter in adapters:
        own, counts = np.split(counts, [adapter.budget.size])
        adapter.budget[...] = jnp.asarray(own.reshape(adapter.budget.shape), jnp.int32)


def _add(path: str, w0: jax.Array, delta: jax.Array) -> jax.Array:
    merged = (w0 + delta).astype(w0.dtype)
    moved = jnp.count_nonzero(delta)
    lost = jnp.count_nonzero((delta != 0) & (merged == w0)) / jnp.maximum(moved, 1)
    if w0.dtype.itemsize < delta.dtype.itemsize and lost > 0:
        log.warning(
            "merging %s into %s lost %.1f%% of its moved weights to rounding",
            path,
            w0.dtype,
            100 * lost,
        )
    return merged


def _require_adapters(model: nnx.Module) -> None:
    if not any(True for _ in adapted_layers(model)):
        raise ValueError(
            "The model has no adapters: call snella.adapt(model, ...) first."
        )
