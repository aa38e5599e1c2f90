"""The Linen binding: adapts a module that someone else wrote, without touching it.

The adapters sit in `params` beside the kernels they belong to, which other collections
cannot do inside a `nn.scan`; `Adapters.apply` intercepts the calls of the layers and
finds them there, scanned, rematerialised or neither.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import snella_jax as snella
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(2, name="head")(nn.relu(nn.Dense(8, name="fc")(x)))
    >>> net, x = Net(), jnp.ones((1, 6))
    >>> variables = net.init(jax.random.key(0), x)
    >>> config = snella.SnellaConfig(rank=4, targets="fc", trainable="head")
    >>> adapters, params = adapt(net, variables, config, x, key=jax.random.key(1))
    >>> trainable, budgets, frozen = adapters.partition(params)
    >>> def logits(trainable, budgets, frozen, x):
    ...     return adapters.apply({"params": join(trainable, budgets, frozen)}, x)
    >>> logits(trainable, budgets, frozen, x).shape
    (1, 2)
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from snella_jax import adapter_file, trees
from snella_jax.base import Base
from snella_jax.config import Rule, SnellaConfig
from snella_jax.contraction import dot_general
from snella_jax.dense import adapted
from snella_jax.fitting import fit
from snella_jax.hosts import native
from snella_jax.layers import einsum_layout
from snella_jax.layout import Layout
from snella_jax.rules import chosen
from snella_jax.trees import Key, Tree, by_name, flat, join, layer_path, name_of
from snella_jax.weight import Site

__all__ = ["Adapters", "adapt", "join", "load"]

ADAPTABLE = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)
STOCK = {cls.__call__ for cls in ADAPTABLE}


@dataclasses.dataclass(frozen=True)
class Adapters(trees.Adapters):
    """Where a module is adapted, and its call with the adapters in `params`.

    Attributes:
      module: as it was written.
    """

    module: nn.Module

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`module.apply`, with `w0 + delta` as weights; same arguments and results.

        A rule that drops something does so where the layer has an rng `dropout`, which
        a `nn.scan` has to split.
        """
        with nn.intercept_methods(self._intercept):
            return self.module.apply(variables, *args, **kwargs)

    def _intercept(self, call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, ADAPTABLE):
            site = self.sites.get((*layer.path, "kernel"))
            # The copy that computes has none: a layer that is the root has its path.
            if site and layer.has_variable("params", "adapter"):
                return _called(layer, site, *args, **kwargs)
        return call(*args, **kwargs)


def adapt(
    module: nn.Module,
    variables: Mapping[str, Any],
    config: SnellaConfig,
    *inputs: Any,
    key: PRNGKeyArray,
    **kwargs: Any,
) -> tuple[Adapters, Tree]:
    """Adapters for a Linen module, and its parameters with them.

    `nn.Dense`, `nn.DenseGeneral` (so Flax's attention), `nn.Einsum`, `nn.Conv` and
    subclasses of them get an adapter where `config.targets` matches their path, such as
    `Transformer/encoderblock_0/MlpBlock_0/Dense_0`; layers inside a `nn.scan` one set
    of factors for each index. (Parameters that `nn.map_variables` changes on their way
    to a layer are not known here: leave such layers out.)

    Args:
      module: not bound.
      variables: of `module.init`, or loaded; metadata of `nn.Partitioned` is dropped.
      config: what to adapt and how.
      inputs, kwargs: of the module, to find its layers by; nothing is computed.
      key: draws the factors.

    Returns:
      What applies, splits, merges and saves; and the parameters, which are `params` in
      its `apply`.

    Raises:
      ValueError: as `snella.adapt`.
    """
    variables = jax.tree.map(native, variables)
    params = nn.meta.unbox(variables["params"])
    layers = _layers(module, variables, inputs, kwargs)
    leaves = flat(params)
    sites = {}
    for path in chosen(layers, config.targets):
        layer = layers[path]
        shape, rule = leaves[layer.key].shape, config.rule(path)
        sites[layer.key] = layer.site(shape, rule, config.must_move)
    plain, params = trees.place(params, sites, config, key)
    return Adapters(plain.sites, plain.trainable, module), params


def load(
    module: nn.Module,
    variables: Mapping[str, Any],
    folder: str | Path,
    *inputs: Any,
    rename: Mapping[str, str] | None = None,
    allow_base_mismatch: bool = False,
    **kwargs: Any,
) -> tuple[Adapters, dict[str, Any]]:
    """Adapters from a folder, and the variables with them and what else trained.

    Whichever binding wrote them: `rename` says which weights are which.

    Args:
      module, variables, inputs, kwargs: as of `adapt`.
      folder: of an adapter.
      rename, allow_base_mismatch: as of `snella.load`.

    Raises:
      FileNotFoundError, CheckpointError: as `snella.load`.
    """
    variables = jax.tree.map(native, variables)
    variables = {**variables, "params": nn.meta.unbox(variables["params"])}
    layers = _layers(module, variables, inputs, kwargs)
    params, stats = (flat(variables.get(c, {})) for c in ("params", "batch_stats"))

    def locate(path: str, rule: Rule, must_move: bool) -> tuple[Site, Array]:
        if path not in layers:
            raise ValueError("this module has no such layer that can be adapted")
        kernel = params[layers[path].key]
        return layers[path].site(kernel.shape, rule, must_move), kernel

    named, own = by_name(params), by_name(stats)
    weights, trained, moved = fit(
        adapter_file.read(folder),
        locate,
        Base(named, own),
        own,
        rename=rename,
        allow_base_mismatch=allow_base_mismatch,
    )
    plain, tree = trees.fill(variables["params"], weights, trained)
    loaded = {**variables, "params": tree}
    if moved:
        values = {k: jnp.asarray(moved.get(name_of(k), x)) for k, x in stats.items()}
        loaded["batch_stats"] = trees.nested(values)
    return Adapters(plain.sites, plain.trainable, module), loaded


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What tracing saw of a layer: its module, its kernel's shape and an equation."""

    key: Key
    module: nn.Module
    shape: tuple[int, ...]
    equation: str | None

    def site(self, whole: tuple[int, ...], rule: Rule, must_move: bool) -> Site:
        """Of its weight, whose shape in `params` is this.

        Raises:
          ValueError: the rule does not fit.
        """
        try:
            layout = self._layout()
            if rule.path == "parallel" and type(self.module).__call__ not in STOCK:
                raise ValueError(
                    f"{type(self.module).__name__} has a call of its own, which need "
                    'not be linear in the weight: expected path="merged".'
                )
            if rule.drop_path and not self._starts_with_examples():
                raise ValueError(
                    f"drop_path={rule.drop_path} drops along axis 0 of the output, "
                    "which here belongs to the weight and not to the examples."
                )
        except ValueError as error:
            path = layer_path(self.key)
            raise ValueError(f"{path} cannot be adapted: {error}") from error
        return trees.site(layer_path(self.key), whole, layout, rule, must_move)

    def _layout(self) -> Layout:
        match self.module:
            case nn.Dense():
                return Layout(self.shape[:1], self.shape[1:])
            case nn.DenseGeneral(axis=axis, batch_dims=batch):
                slices, axes = len(_sequence(batch)), len(_sequence(axis))
                ends = slices, slices + axes
                parts = self.shape[ends[0] : ends[1]], self.shape[ends[1] :]
                return Layout(*parts, self.shape[: ends[0]])
            case nn.Conv(mask=mask):
                if mask is not None:
                    raise ValueError(
                        "a convolution with a mask has weights that are not used."
                    )
                return Layout(self.shape[:-1], self.shape[-1:])
        return einsum_layout(self.equation, self.shape)

    def _starts_with_examples(self) -> bool:
        if isinstance(self.module, nn.DenseGeneral):
            return not _sequence(self.module.batch_dims)
        if isinstance(self.module, nn.Einsum):
            operands, result = (self.equation or "->").split("->")
            return result[:1] not in operands.split(",")[1].replace(".", "")
        return True


def _layers(
    module: nn.Module, variables: Mapping[str, Any], inputs: tuple, kwargs: dict
) -> dict[str, _Layer]:
    """Every layer that can be adapted, by path, as a call of the module meets it."""
    found: dict[str, _Layer] = {}

    def see(call: Any, args: tuple, options: dict, context: Any) -> Any:
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, ADAPTABLE):
            key = (*layer.path, "kernel")
            kernel = nn.meta.unbox(layer.get_variable("params", "kernel"))
            equation = getattr(layer, "einsum_str", None)
            if isinstance(layer, nn.Einsum) and equation is None:
                equation = dict(enumerate(args)).get(1, options.get("einsum_str"))
            if kernel is not None:
                plain = layer.clone(parent=None, name=None)
                equation = equation and equation.replace(" ", "")
                found[layer_path(key)] = _Layer(key, plain, kernel.shape, equation)
        return call(*args, **options)

    leaves, tree = jax.tree.flatten((variables, inputs, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}

    def run(arrays: dict[int, Array]) -> Any:  # flags stay what they are
        own = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        variables, inputs, kwargs = jax.tree.unflatten(tree, own)
        with nn.intercept_methods(see):
            return module.apply(variables, *inputs, **kwargs)

    jax.eval_shape(run, arrays)
    return found


def _called(layer: Any, site: Site, x: Array, *args: Any, **kwargs: Any) -> Array:
    """The layer's own call on a copy with another weight, see `layers.Adapted`."""
    own = {
        name: nn.meta.unbox(value)
        for name, value in layer.variables["params"].items()
        if name != "adapter"
    }
    adapter = dict(layer.get_variable("params", "adapter"))
    budget, _ = (adapter.pop(name) for name in trees.COUNTS)
    weight = own.pop("kernel")
    ours = {}
    if getattr(layer, "dot_general", False) is None and layer.dot_general_cls is None:
        ours["dot_general"] = dot_general

    def op(x: Array, w: Array, **changes: Any) -> Array:
        plain = layer.clone(parent=None, name=None, **ours, **changes)
        params = {"kernel": w} if changes else {"kernel": w, **own}
        return plain.apply({"params": params}, x, *args, **kwargs)

    rule = site.rule
    key = None
    if (rule.dropout or rule.drop_path) and layer.has_rng("dropout"):
        key = layer.make_rng("dropout")
    dtype = layer.dtype or jnp.result_type(x, weight, *own.values())
    return adapted(op, site.layout, functools.partial(op, use_bias=False))(
        jnp.asarray(x, dtype),
        weight,
        adapter,
        budget,
        kernel=site.kernel,
        gate=rule.gate,
        path=rule.path,
        dropout=rule.dropout,
        drop_path=rule.drop_path,
        key=key,
    )


def _sequence(value: Any) -> tuple:
    return (value,) if isinstance(value, int) else tuple(value)
