"""NNX models as one compiled program: called eagerly, each operation is one."""

import functools

import jax
from flax import nnx


@functools.partial(jax.jit, static_argnums=0)
def _called(graphdef, state, args):
    return nnx.merge(graphdef, state)(*args)


def called(model, *args):
    """Returns `model(*args)`; nothing that the call changes in the model is kept."""
    return _called(*nnx.split(model), args)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(graphdef, trained, rest, args):
    def loss(trained):
        return (nnx.merge(graphdef, trained, rest, copy=True)(*args) ** 2).sum()

    return jax.grad(loss)(trained)


def gradient(model, *args):
    """Returns the gradient of the outputs' sum of squares by every `nnx.Param`."""
    graphdef, trained, rest = nnx.split(model, nnx.Param, ...)
    return _gradient(graphdef, trained, rest, args)
