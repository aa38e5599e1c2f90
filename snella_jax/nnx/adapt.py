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
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import DTypeLike, PRNGKeyArray

from snella_jax.core.binding import check_binding
from snella_jax.core.config import SnellaConfig, check_overrides
from snella_jax.core.layout import Layout
from snella_jax.core.paths import check_trainable, join
from snella_jax.core.placement import beside
from snella_jax.core.specs import adapter_spec
from snella_jax.core.weight import Site, Start, start
from snella_jax.files.hosts import to_host
from snella_jax.nnx.flax_layers import Adapted
from snella_jax.nnx.layers import Adapter, adapter_of, adapters_of
from snella_jax.nnx.own_layers import AdaptedOwn
from snella_jax.nnx.selection import (
    adapted_layers,
    adapted_variables,
    require_adapters,
    seeded_parts,
    weights_of,
)
from snella_jax.nnx.surgery import become, freeze, mixed_class, plain_class, thaw
from snella_jax.nnx.targets import Target, chosen_targets, variables_held
from snella_jax.nnx.variables import Budget, DropKey, variables_of
from snella_jax.ops.dtypes import check_floating
from snella_jax.ops.readers import new_keys

log = logging.getLogger("snella_jax")
M = TypeVar("M", bound=nnx.Module)


def adapt(
    model: M,
    config: SnellaConfig,
    *,
    rngs: nnx.Rngs,
    layouts: Mapping[str, Layout] | None = None,
) -> M:
    """Returns a copy of `model` with `w0 + delta` as weights; only `delta` trains.

    Every `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` and `nnx.Conv` (or a subclass
    of them) whose path `config.targets` matches gets an adapter; layers with leading
    axes from `nnx.vmap` get one set of factors for each index. Besides the factors only
    what `config.trainable` matches stays an `nnx.Param`; every other parameter becomes
    `Frozen`, so Flax's default `wrt=nnx.Param` is exactly what trains. `model` itself
    does not change, and the copy shares its arrays (except those that
    `config.frozen_dtype` casts). Adapters lie on the devices of their weights and are
    split like these.

    Args:
      model: any NNX module, without adapters; abstract ones (`nnx.eval_shape`) get
        factors that are drawn, and `nnx.update` gives them their weights.
      config: targets, rules and densities.
      rngs: its `params` stream draws the factors.
      layouts: the axes of weights of other layers than Flax's, by regex of the weight's
        path, `{"blocks/.*/w": Layout(inputs=(64,), outputs=(256,))}`; axes in
        front of a layout's are a stack. A target is then a weight with such a path, or
        all those of a layer. They take the merged path.

    Raises:
      TypeError: no NNX model (the message names the binding for it), or no `nnx.Rngs`.
      ValueError: a regex matches nothing (the message lists what it could have meant),
        both match one weight, the axes of a matched weight are unknown, the model is
        adapted already, another module uses or normalises a weight, or a `split`, path
        or `drop_path` does not fit a layer.
    """
    check_binding(model, "NNX")
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs={rngs!r}: expected nnx.Rngs, such as nnx.Rngs(0).")
    model = nnx.clone(model)
    names = config.names(model)
    targets = chosen_targets(model, names.targets, layouts)
    check_overrides(config, targets)
    check_trainable(names.trainable, (t.variable(path) for path, t in targets.items()))
    sites = {
        path: target.site(path, config.rule(path), config.must_move)
        for path, target in targets.items()
    }
    attach(model, targets, sites, start(sites, config, rngs.params()))
    freeze(model, names.trainable, config.frozen_dtype)
    return model


def attach(
    model: nnx.Module,
    targets: Mapping[str, Target],
    sites: Mapping[str, Site],
    starts: Mapping[str, Start],
) -> None:
    """Gives each of the targets in `model` its adapter, in place.

    Raises:
      ValueError: another module uses or changes the weight of one of them, too.
    """
    _refuse_tied(model, targets)
    _refuse_normalised(model, targets)
    own: dict[int, list[Target]] = {}
    for path, target in targets.items():
        name = adapter_of(target.name)
        if hasattr(target.layer, name):
            raise ValueError(
                f"{path} has an attribute {name!r}, where its adapter goes: rename it."
            )
        own.setdefault(id(target.layer), []).append(target)
    for first, *others in own.values():
        cls = type(first.layer)
        if others or first.layout is not None:
            names = sorted(target.name for target in (first, *others))
            become(first.layer, mixed_class(AdaptedOwn, cls, *names))
        else:
            become(first.layer, mixed_class(Adapted, cls, "kernel"))
    for path, target in targets.items():
        adapter = _beside(target, sites[path], starts[path])
        setattr(target.layer, adapter_of(target.name), adapter)


def _beside(target: Target, site: Site, start: Start) -> Adapter:
    """Makes an adapter that lies, and says that it lies, as the weight does."""
    given = target.weight.get_metadata("out_sharding", None)
    names = PartitionSpec(*getattr(given, "spec", given or ()))
    if len(names) != len(site.shape):  # a stack that metadata do not know, or none
        return Adapter(site, beside(site, target.weight.get_value(), start))
    adapter = Adapter(site, beside(site, target.weight.get_value(), start, names))
    for name in adapter.names:
        factor = getattr(adapter, name)
        factor.set_metadata("out_sharding", (*adapter_spec(site, names, name),))
        for other in ("sharding_rules", "mesh"):
            if target.weight.has_metadata(other):
                factor.set_metadata(other, target.weight.get_metadata(other))
    return adapter


def partition(
    model: nnx.Module,
) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
    """Splits an adapted model for functional training.

    Returns:
      `graphdef`, static; `trainable`, the factors and what `config.trainable` named,
      for the optimizer; `budgets`, int32, for `reallocate`; `frozen`, all else.
      `nnx.merge(graphdef, trainable, budgets, frozen)` gives the model back; inside
      `jax.grad` with `copy=True`, so that it may change there.

    Random streams (`nnx.Dropout`) and batch statistics land in `frozen`: a functional
    step has to return and carry them, or they repeat. (`nnx.state(model, (nnx.RngState,
    nnx.BatchStat))` after the call, `nnx.merge_state(frozen, moved)` after the step.)

    Raises:
      ValueError: the model has no adapters.
    """
    require_adapters(model)
    graphdef, trainable, budgets, frozen = nnx.split(model, nnx.Param, Budget, ...)
    changing = (nnx.RngState, nnx.BatchStat)
    if any(True for kind in changing for _ in variables_of(model, kind)):
        log.warning(
            "the model has random streams or batch statistics, which are in `frozen`: "
            "return nnx.state(model, (nnx.RngState, nnx.BatchStat)) from the step and "
            "put it back with nnx.merge_state(frozen, moved), or they repeat"
        )
    return graphdef, trainable, budgets, frozen


def merge(
    model: M, *, unmoved_budgets: bool = False, dtype: DTypeLike | None = None
) -> M:
    """Returns a plain copy of an adapted model: `w0 + delta` as weights, no adapters.

    Its outputs equal the adapted model's to rounding. The sum is taken in at least
    float32 and stored in the weight's dtype, or the one that is given; if that is
    narrower, the share of moved weights that rounding lost is logged. Code that reads
    `layer.kernel` itself gets no update and trains none, which merging cannot know.

    Args:
      model: an adapted model.
      unmoved_budgets: allow a model whose budgets never moved.
      dtype: floating-point dtype of every parameter of the plain model; None leaves
        each in its own. In what layers compute is their affair.

    Raises:
      BudgetsNeverMoved: the config asked for adaptive sparsity, and `reallocate` was
        never called, so the sparsity is not what the config says.
      ValueError: the model has no adapters, or no such dtype.
    """
    check_floating(dtype)

    def cast(x: Any) -> Any:
        floats = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.asarray(x, dtype) if floats else x

    weights = weights_of(model)
    model = nnx.clone(model)
    for weight, own in zip(weights, adapted_variables(model), strict=True):
        *_, variable = own
        variable.set_value(weight.merged(unmoved_budgets, dtype))
    remove(model)
    for _, variable in variables_of(model, nnx.Param) if dtype is not None else ():
        variable.set_value(jax.tree.map(cast, variable.get_value()))
    return model


def remove(model: nnx.Module) -> None:
    """Makes a model plain again, in place: no adapters, nothing frozen."""
    for _, layer in list(adapted_layers(model)):
        for name in adapters_of(layer):
            delattr(layer, adapter_of(name))
        become(layer, plain_class(type(layer)))
    thaw(model)


def seed(model: nnx.Module, key: PRNGKeyArray) -> None:
    """Gives every adapter that drops or sketches a key of its own for this step.

    Call it inside the step on the freshly merged model, with a fresh key every step.
    Layers of a stack get different keys. Changes `model` in place: the first call adds
    variables, so if `nnx.jit` gets the model itself, seed it once before the first
    step, or the second step is traced again.
    """
    new_keys()
    for index, part in enumerate(seeded_parts(model)):
        if part.needs_key:
            own = jax.random.fold_in(key, index)
            part.key = DropKey(jax.random.split(own, part.stack) if part.stack else own)


def adapted_weights(model: nnx.Module) -> int:
    """Counts the weights of the base that adapters reach: the budget of density 1."""
    require_adapters(model)
    return sum(
        adapter.site.capacity * math.prod(adapter.budget.shape)
        for _, adapter, _ in adapted_variables(model)
    )


def merged_magnitude(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the mean `|delta|` of every matrix, to `reallocate` by (Table X)."""
    require_adapters(model)
    found = {}
    for path, layer in adapted_layers(model):
        for name, adapter in adapters_of(layer).items():
            delta = adapter.on(path, getattr(layer, name)[...])
            within = f"{path}/{adapter_of(name)}".lstrip("/")
            found[within] = to_host(delta.per_matrix(_mean_magnitude))
    return found


def _mean_magnitude(delta: jax.Array) -> jax.Array:
    return jnp.abs(delta).mean()


def _refuse_tied(model: nnx.Module, targets: Mapping[str, Target]) -> None:
    """Raises a `ValueError` for tied weights, whose other user has no update."""
    users: dict[int, set[str]] = {}
    for path, _, variable in variables_held(model):
        users.setdefault(id(variable), set()).add(path)
    tied = [path for path, t in targets.items() if len(users[id(t.weight)]) > 1]
    if tied:
        raise ValueError(
            f"The weights of {', '.join(tied)} are tied to another's, or have two "
            "names: leave them out of the targets, or untie them."
        )


def _refuse_normalised(model: nnx.Module, targets: Mapping[str, Target]) -> None:
    """Raises a `ValueError` for weights that a wrapper normalises without update."""
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.WeightNorm):
            continue
        for name, weight in nnx.to_flat_state(nnx.state(node.layer_instance)):
            changed = node.variable_filter(name, weight)
            within = join((*path, "layer_instance", *name))
            if changed and within in {t.variable(p) for p, t in targets.items()}:
                raise ValueError(
                    f"{within} is normalised by an nnx.WeightNorm, which would make "
                    "the merged model another one than the adapted: take it out of the "
                    "targets."
                )
