"""Which parts of a model a regex means: what is adapted, what trains, what is frozen.

Regexes are matched in full against "/"-joined paths, such as `blocks/attn/query`; one
for variables may also match a module that holds them.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from snella_jax.config import SnellaConfig
from snella_jax.importance import factor_paths, path_of
from snella_jax.layers import (
    AdaptedLayer,
    Adapter,
    Factor,
    Frozen,
    adapters_of,
)
from snella_jax.mixed import become
from snella_jax.weight import AdaptedWeight


def chosen(paths: Iterable[str], targets: str) -> list[str]:
    """The paths that the regex matches in full.

    Raises:
      ValueError: there is none; the message lists them all.
    """
    paths = list(paths)
    found = [path for path in paths if re.fullmatch(targets, path)]
    if not found:
        raise ValueError(
            f"targets={targets!r} matches no layer that can be adapted (a regex has to "
            f"match a whole path, as r'.*/fc' does). There are: {listed(paths)}"
        )
    return found


def check_overrides(config: SnellaConfig, paths: Iterable[str]) -> None:
    """Raises a `ValueError` for an override that none of the adapted paths takes."""
    paths = list(paths)
    unused = set(config.overrides) - {config.override(path) for path in paths}
    if unused:
        raise ValueError(
            f"overrides: {', '.join(map(repr, sorted(unused)))} matches none of the "
            f"targets (or an earlier override matches first): {listed(paths)}"
        )


def check_trainable(trainable: str, kernels: Iterable[str]) -> None:
    """Raises a `ValueError` where an adapted kernel would train itself, too."""
    both = [name for name in kernels if matches_or_holds(trainable, name)]
    if both:
        raise ValueError(
            f"trainable={trainable!r} matches adapted weights: {listed(both)}\n"
            "A weight trains or has an adapter: take them out of one of the two."
        )


def freeze(model: nnx.Module, trainable: str, dtype: DTypeLike | None = None) -> None:
    """Makes every parameter `Frozen`, in place, but factors and what the regex matches.

    Args:
      model: the module whose variables change.
      trainable: regex of what trains besides the factors; "" for nothing.
      dtype: what frozen floating-point parameters are cast to; None leaves them.

    Raises:
      ValueError: the regex is not empty and matches nothing (the message lists what
        it could have meant); or it freezes what is under an `nnx.SpectralNorm`.
    """
    variables = [
        (path, variable)
        for path, variable in variables_of(model, nnx.Param)
        if not isinstance(variable, Factor)
    ]
    frozen = [(p, v) for p, v in variables if not matches_or_holds(trainable, p)]
    if trainable and len(frozen) == len(variables):
        raise ValueError(
            f"trainable={trainable!r} matches nothing; pass trainable='' if only the "
            f"adapters train. There are: {listed([path for path, _ in variables])}"
        )
    under = [
        join((*path, "layer_instance/"))
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.SpectralNorm)
    ]
    if off := [path for path, _ in frozen if path.startswith(tuple(under))]:
        raise ValueError(
            "nnx.SpectralNorm normalises nothing but an nnx.Param, and freezing "
            f"{listed(off)}\nwould switch it off: name them in `trainable`, or put the "
            "normalised weights into plain layers."
        )
    for _, variable in frozen:
        variable.set_metadata("trained_as", type(variable))
        become(variable, Frozen)
        if dtype is not None and jnp.issubdtype(variable.dtype, jnp.floating):
            variable.set_value(variable[...].astype(dtype))


def thaw(model: nnx.Module) -> None:
    """Makes every parameter that `freeze` froze what it was before, in place."""
    for _, variable in variables_of(model, Frozen):
        if variable.has_metadata("trained_as"):
            become(variable, variable.get_metadata("trained_as"))
            variable.del_metadata("trained_as")


def labels(params: Any, trainable: str) -> Any:
    """ "adapter", "trainable" or "frozen" for every leaf, for `optax.partition`.

    A leaf is "adapter" in a mapping with both `a` and `b` (unless it is `Frozen` or an
    integer), "trainable" where the regex matches its path or a parent's in full, and
    "frozen" otherwise. `stop_gradients` spares the gradient of the frozen ones.

    >>> a, b, w = (jax.numpy.zeros(s) for s in ((2, 3, 4), (2, 5, 4), (3, 5)))
    >>> params = {"fc1": {"kernel": w, "adapter": {"a": a, "b": b}}, "head": w}
    >>> labels(params, "head")["fc1"]
    {'adapter': {'a': 'adapter', 'b': 'adapter'}, 'kernel': 'frozen'}

    Args:
      params: one tree of all parameters: nested dicts, or an `nnx.State`. (Integer
        budgets have no gradient: to differentiate, take them out first.)
      trainable: regex over "/"-joined paths, as in `SnellaConfig`; "" for none.

    Raises:
      ValueError: there is no adapter, or the regex matches nothing.
    """
    adapters = factor_paths(params)
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    fixed = {join(path_of(path)) for path, v in leaves if isinstance(v, Frozen)}

    def label(key_path, leaf):
        *parent, name = path_of(key_path)
        path = join((*parent, name))
        if join(parent) in adapters:
            trains = path not in fixed and jnp.issubdtype(
                jnp.result_type(leaf), jnp.floating
            )
            return "adapter" if trains else "frozen"
        return "trainable" if matches_or_holds(trainable, path) else "frozen"

    found = jax.tree_util.tree_map_with_path(label, params)
    if not adapters or (trainable and "trainable" not in jax.tree.leaves(found)):
        paths = [join(path_of(path)) for path, _ in leaves]
        missing = f"match of trainable={trainable!r}" if adapters else "adapter"
        raise ValueError(f"There is no {missing} among {listed(paths)}")
    return found


def stop_gradients(params: Any, labels: Any) -> Any:
    """`params` with no gradient through the leaves labelled "frozen"."""
    return jax.tree.map(
        lambda p, label: jax.lax.stop_gradient(p) if label == "frozen" else p,
        params,
        labels,
    )


def adapted_layers(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Path and layer of every adapted layer, each once, in a fixed order."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, AdaptedLayer):
            yield join(path), node


def adapted_variables(
    model: nnx.Module,
) -> Iterator[tuple[str, Adapter, nnx.Variable]]:
    """Path, adapter and variable of every adapted weight, in the order of the layers.

    The path of a weight that is called `kernel` is that of its layer.
    """
    for path, layer in adapted_layers(model):
        for name, adapter in adapters_of(layer).items():
            whole = path if name == "kernel" else f"{path}/{name}".lstrip("/")
            yield whole, adapter, getattr(layer, name)


def weights_of(model: nnx.Module) -> list[AdaptedWeight]:
    """Every adapted weight, in the order of `adapted_variables`.

    Raises:
      ValueError: the model has no adapters.
    """
    require_adapters(model)
    weights = adapted_variables(model)
    return [adapter.on(path, weight[...]) for path, adapter, weight in weights]


def has_adapters(model: nnx.Module) -> bool:
    """Whether any layer is adapted; the model may be abstract."""
    return any(True for _ in adapted_layers(model))


def require_adapters(model: nnx.Module) -> None:
    """Raises a `ValueError` if the model has no adapters; it may be abstract."""
    if not has_adapters(model):
        raise ValueError(
            "The model has no adapters: call snella.adapt(model, ...) first."
        )


def variables_of(model: nnx.Module, kind: type) -> Iterator[tuple[str, Any]]:
    """Path and variable of every variable of a kind, each once."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, kind):
            yield join(path), node


def matches_or_holds(regex: str, path: str) -> bool:
    """Whether the regex matches the path, or that of a module above it, in full."""
    names = path.split("/")
    parents = ("/".join(names[: i + 1]) for i in range(len(names)))
    return bool(regex) and any(re.fullmatch(regex, parent) for parent in parents)


def join(path: Any) -> str:
    """A path as regexes see it."""
    return "/".join(map(str, path))


def listed(paths: Any) -> str:
    """Paths for an error message, a line each."""
    return "\n  ".join(["", *paths]) if paths else "none"
