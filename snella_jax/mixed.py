"""Classes of adapted layers: subclasses of the layer's own, which pickle as such."""

import copyreg
import functools
from collections.abc import Callable
from typing import Any

from flax import nnx


class _Mixed(type(nnx.Module)):
    """Metaclass of mixed classes: they pickle as the classes they are made of."""


def _mixed_again(cls: Any) -> tuple[Callable, tuple]:
    return mixed_class, cls.mixed_from


copyreg.pickle(_Mixed, _mixed_again)


@functools.cache
def mixed_class(mixin: Any, cls: type, *weights: str) -> type:
    """The subclass of a layer's class with `mixin`, made once.

    A mixin that has `methods` is behind the layer's class, so that instances of the one
    may become the other's, whatever else the layer inherits from; another is in front.

    Args:
      mixin: a module's class; `mixin.methods(cls, weights)`, where it has that, gives
        those of the new class.
      cls: of the layer.
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
    """The layer's class that `mixed_class` was given."""
    return cls.mixed_from[1]


def become(node: nnx.Module | nnx.Variable, cls: type) -> None:
    """Changes the class of a module or variable in place.

    Whoever holds the object, by whatever path, then holds the adapted or frozen one, so
    modules that are shared need no bookkeeping.
    """
    object.__setattr__(node, "__class__", cls)
