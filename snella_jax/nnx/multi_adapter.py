"""Several adapters on one base: a sum of their updates, or one for each example.

`snella.load(base, folder)` shares the arrays of the base, so a dict of loaded models
is a collection of adapters: `models["pets"] = snella.load(base, "pets")` adds one,
`del` removes one, `models[name]` is the active one and `base` is none. A function that
is jitted over their states (`nnx.split`) serves all that have the same shapes.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from snella_jax.adapters.base import differences, variables_at
from snella_jax.core.weight import add
from snella_jax.nnx import grouped
from snella_jax.nnx.saving import base_of, unload
from snella_jax.nnx.selection import has_adapters, weights_of
from snella_jax.nnx.variables import Factor, variables_of

M = TypeVar("M", bound=nnx.Module)


def combine(models: Mapping[str, M], weights: Mapping[str, float], rest: str) -> M:
    """Makes a plain model with `W0 + sum_k weights[k] * delta_k` as its weights.

    The sum is taken in at least float32 and rounded once, as in `merge`.

    Args:
      models: adapted models on one base, by name.
      weights: factors of their updates, by name; those that are left out count 0.
      rest: the model whose other trained variables (its head) are taken; the base is
        one, too.

    Raises:
      ValueError: a name that `models` has not, or models on different bases.
      BudgetsNeverMoved: as `merge`.

    >>> import snella_jax as snella
    >>> base = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    >>> config = snella.SnellaConfig(
    ...     rank=4, targets=".*", trainable="", allocation="fixed"
    ... )
    >>> models = {
    ...     name: snella.adapt(base, config, rngs=nnx.Rngs(i + 1))
    ...     for i, name in enumerate(["pets", "cars"])
    ... }
    >>> both = combine(models, {"pets": 0.5, "cars": 0.5}, rest="pets")
    >>> x = jnp.ones((1, 4))
    >>> mean = (models["pets"](x) + models["cars"](x)) / 2  # of a linear model
    >>> bool(jnp.allclose(both(x), mean, atol=1e-5))
    True
    """
    if unknown := sorted({*weights, rest} - models.keys()):
        raise ValueError(f"No model is called {unknown}: there are {sorted(models)}.")
    plain, moved = _taken_apart(models[rest])
    variables = dict(variables_of(plain, nnx.Param))
    sums: dict[str, Array] = {}
    for name, factor in weights.items():
        own = weights_of(models[name])
        for weight in own:
            weight.check_moved()
        _check_base((rest, plain, moved), (name, models[name]))
        for weight in own:
            places = [k for k in variables_at(weight.path) if k in variables]
            if not places or variables[places[0]].shape != weight.w0.shape:
                raise ValueError(
                    f"{name!r} has another base than {rest!r}, stacked or named "
                    f"otherwise: there is no {weight.path} {list(weight.w0.shape)}."
                )
            kernel = places[0]
            sums[kernel] = sums.get(kernel, 0) + factor * weight.delta()
    for kernel, update in sums.items():
        variables[kernel][...] = add(kernel, variables[kernel][...], update)
    return plain


def _taken_apart(model: M) -> tuple[M, set[str]]:
    """Returns a plain copy of a model, and the paths of what may have moved in it."""
    stats, params, factors = (
        {path for path, _ in variables_of(model, kind)}
        for kind in (nnx.BatchStat, nnx.Param, Factor)
    )
    if not has_adapters(model):
        return nnx.clone(model), stats
    return unload(model), stats | params - factors


def _check_base(rest: tuple[str, M, set[str]], other: tuple[str, M]) -> None:
    """Raises a `ValueError` unless two models are of one base.

    Args:
      rest: a name, a plain model, and the paths of what may have moved in it.
      other: a name and a model, adapted.
    """
    plain, moved = _taken_apart(other[1])
    adapted = {name for w in weights_of(other[1]) for name in variables_at(w.path)}
    apart = (moved | rest[2]) - adapted
    ours, theirs = (base_of(model).rest((), apart) for model in (rest[1], plain))
    names = repr(rest[0]), repr(other[0])
    if found := differences(ours.fingerprints(), theirs, sides=names):
        lines = [f"{names[1]} has another base than {names[0]}:", *found]
        raise ValueError("\n  ".join(lines))


def per_example(
    models: Mapping[str, nnx.Module],
    ids: Sequence[str] | Int[np.ndarray, " B"],
    *inputs: Any,
) -> Any:
    """Runs `models[ids[i]]` on example `i`, for a batch of them.

    LoRAs (kernel `linear`, gate `none`) of linear layers on one base, and the base
    itself, take one pass together: each example is multiplied by the shared weights and
    by the factors of its own adapter, and has the trained head of its model. Ranks and
    targets may differ; a program is compiled for each number of models and examples.
    Call `model.eval()` first where there is dropout. All other models see the whole
    batch once each: the cost is that many passes, of one compiled program where shapes
    are equal.

    Args:
      models: models by name; with or without adapters (the base for none).
      ids: `B` names.
      inputs: inputs of the models, with the examples along axis 0 of every array.

    Returns:
      The outputs, arrays or a tree of them, with the examples along axis 0.

    Raises:
      ValueError: a name that `models` has not, not one for each example, or models
        whose outputs have other shapes (heads of other widths).
    """
    chosen = np.asarray(ids)
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(inputs)}
    if chosen.ndim != 1 or sizes != {len(chosen)}:
        raise ValueError(
            f"There are ids of shape {chosen.shape} for batches of {sorted(sizes)}: "
            "expected one for each example."
        )
    if unknown := sorted(set(chosen.tolist()) - set(models)):
        raise ValueError(f"No model is called {unknown}: there are {list(models)}.")
    names = [name for name in models if name in chosen.tolist()]
    if len(names) > 1:
        rows = np.array([names.index(name) for name in chosen.tolist()], np.int32)
        found = grouped.run([models[name] for name in names], rows, inputs)
        if found is not None:
            return found
    return pass_for_each(models, chosen, inputs)


def pass_for_each(
    models: Mapping[str, nnx.Module],
    chosen: np.ndarray,
    inputs: tuple[Any, ...],
) -> Any:
    """Returns what `per_example` does, by one pass for each model that is chosen.

    Raises:
      ValueError: the outputs of two models have other shapes.
    """
    result: Any = None
    names = [name for name in models if name in chosen.tolist()]
    for name in names:
        outputs = _run(*nnx.split(models[name]), inputs)
        if result is not None:
            _check_alike((names[0], result), (name, outputs))
        own = jnp.asarray(chosen == name)
        result = outputs if result is None else _where(own, outputs, result)
    return result


def _check_alike(*named: tuple[str, Any]) -> None:
    """Raises a `ValueError` if the outputs of two models do not fit in one array."""
    (one, first), (other, second) = named
    shapes = [jax.tree.map(lambda x: x.shape[1:], tree) for tree in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{one!r} returns {shapes[0]} for an example and {other!r} {shapes[1]}: "
            "expected one shape. Where heads have other widths, call per_example for "
            "the models of each width apart, or up to the head."
        )


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef: nnx.GraphDef, state: nnx.State, inputs: tuple) -> Any:
    return nnx.merge(graphdef, state)(*inputs)


@jax.jit
def _where(own: Array, outputs: Any, others: Any) -> Any:
    def select(output, other):
        return jnp.where(own.reshape(-1, *(1,) * (output.ndim - 1)), output, other)

    return jax.tree.map(select, outputs, others)
