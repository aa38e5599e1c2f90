"""Changes a model in place: the classes of its layers, and what of it is frozen.

The class of a changed layer is a subclass of the layer's own, and pickles as such.
"""

import copyreg
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from snella_jax.core.paths import join, listed, matches_or_holds
from snella_jax.nnx.variables import Factor, Frozen, variables_held, variables_of


class _Mixed(type(nnx.Module)):
    """Metaclass of mixed classes: they pickle as the classes they are made of."""


def _mixed_again(cls: Any) -> tuple[Callable, tuple]:
    return mixed_class, cls.mixed_from


copyreg.pickle(_Mixed, _mixed_again)


@functools.cache
def mixed_class(mixin: Any, cls: type, *weights: str) -> type:
    """Makes the subclass of a layer's class with `mixin`, once.

    A mixin that has `methods` stands behind the layer's class, so that instances of one
    class may become the other's, whatever bases the layer has; another stands in front.

    Args:
      mixin: a module's class; `mixin.methods(cls, weights)`, where it has that, gives
        those of the new class.
      cls: class of the layer.
      weights: names of those that are adapted.
    """
    own = {"__doc__": cls.__doc__, "mixed_from": (mixin, cls, *weights)}
    if hasattr(mixin, "methods"):
        own |= mixin.methods(cls, weights)
        bases = cls, mixin
    else:
        bases = mixin, cls
    meta = _Mixed
    if not issubclass(meta, type(cls)):  # a metaclass of the user's own
        meta = type("_Mixed", (_Mixed, type(cls)), {})
        copyreg.pickle(meta, _mixed_again)
    return meta(f"{mixin.__name__}{cls.__name__}", bases, own)


def plain_class(cls: Any) -> type:
    """Returns the layer's class that `mixed_class` was given."""
    return cls.mixed_from[1]


def become(node: nnx.Module | nnx.Variable, cls: type) -> None:
    """Changes the class of a module or variable in place.

    All references to the object then see the adapted or frozen one, so shared modules
    need no bookkeeping.
    """
    object.__setattr__(node, "__class__", cls)


def freeze(model: nnx.Module, trainable: str, dtype: DTypeLike | None = None) -> None:
    """Makes every parameter `Frozen`, in place, but factors and what the regex matches.

    Args:
      model: the module whose variables change.
      trainable: regex of what trains besides the factors; "" for nothing.
      dtype: dtype that frozen floating-point parameters are cast to; None leaves them.

    Raises:
      ValueError: the regex is not empty and matches nothing (the message lists what
        it could have meant); or it freezes what is under an `nnx.SpectralNorm`.
    """
    variables = [
        (path, variable)
        for path, variable in variables_of(model, nnx.Param)
        if not isinstance(variable, Factor)
    ]
    # By every path of a tied one, of which `variables_of` has the first.
    named = {
        id(variable)
        for path, _, variable in variables_held(model)
        if matches_or_holds(trainable, path)
    }
    frozen = [(path, v) for path, v in variables if id(v) not in named]
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
        if dtype is not None:
            cast = functools.partial(_cast, dtype=dtype)
            variable.set_value(jax.tree.map(cast, variable.get_value()))


def _cast(value: Any, dtype: DTypeLike) -> Any:
    """Casts an array of floats, or the shape of one that is to come."""
    if not jnp.issubdtype(getattr(value, "dtype", jnp.int32), jnp.floating):
        return value
    abstract = isinstance(value, jax.ShapeDtypeStruct)
    return value.update(dtype=dtype) if abstract else value.astype(dtype)


def thaw(model: nnx.Module) -> None:
    """Makes every parameter that `freeze` froze what it was before, in place."""
    for _, variable in variables_of(model, Frozen):
        if variable.has_metadata("trained_as"):
            become(variable, variable.get_metadata("trained_as"))
            variable.del_metadata("trained_as")
