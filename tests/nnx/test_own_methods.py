"""Layers of one's own compute with their updates, however their code is written."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import called
from flax import nnx
from generic import run
from modules import Holder
from oracles import oracle_deltas

import snella_jax as snella
from snella_jax import Layout

X = np.random.default_rng(3).normal(size=(5, 6)).astype(np.float32)


class Plain(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jax.random.normal(jax.random.key(0), (6, 8)))
        self.names = ("w",)
        self.calls = 0
        self.run = "an attribute that the library has no use for"

    def __call__(self, x):
        return x @ self.w[...]


class Inherits(Plain):
    def __call__(self, x):
        return super().__call__(x)


class ByName(Plain):
    def __call__(self, x):
        return x @ getattr(self, self.names[0])[...]


def product(layer, x):
    return x @ layer.w[...]


class ByFunction(Plain):
    def __call__(self, x):
        return product(self, x)


class Partial(Plain):
    def scaled(self, x, scale):
        return scale * (x @ self.w[...])

    once = functools.partialmethod(scaled, scale=1)

    def __call__(self, x):
        return self.once(x)


def plainly(function):
    def inner(self, x):
        return function(self, x)

    return inner


class Decorated(Plain):
    @plainly
    def __call__(self, x):
        return x @ self.w[...]


class Compiled(Plain):
    @functools.partial(nnx.jit, static_argnames="training")
    def __call__(self, x, training=True):
        return x @ self.w[...]


class Rematerialised(Plain):
    @nnx.remat
    def __call__(self, x):
        return x @ self.w[...]


class Computed:
    def __call__(self, x):
        return x @ self.w[...]


class MixinFirst(Computed, Plain):
    pass


class Operator(Plain):
    def __matmul__(self, x):
        return x @ self.w[...]

    def __call__(self, x):
        return self @ x


class Told(Plain):
    def product(self, x):
        return {"y": x @ self.w[...], "width": self.w.shape[1], "called": "w"}

    def __call__(self, x):
        found = self.product(x)
        assert found["called"] == "w"
        return found["y"].reshape(-1, found["width"])


KINDS = (
    Plain,
    Inherits,
    ByName,
    ByFunction,
    Partial,
    Decorated,
    Compiled,
    Rematerialised,
    MixinFirst,
    Operator,
    Told,
)


def adapted(layer, layouts=None, **changes):
    changes |= {"allocation": "fixed", "target_density": 0.5, "rank": 4}
    config = snella.SnellaConfig(targets="layer", trainable="", **changes)
    return snella.adapt(Holder(layer), config, rngs=nnx.Rngs(1), layouts=layouts)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_layer_computes_and_trains_with_its_update(kind):
    plain = kind()
    model = adapted(plain, {"layer/w": Layout((6,), (8,))})
    delta = oracle_deltas(model.layer.w_adapter, 6, 8)
    weight = np.asarray(plain.w[...]) + delta
    if kind is Plain:  # eagerly, too
        np.testing.assert_allclose(model(X), X @ weight, atol=1e-5)
    np.testing.assert_allclose(jax.jit(model)(X), X @ weight, atol=1e-5)
    np.testing.assert_array_equal(model.layer.w[...], plain.w[...])  # the base's
    graphdef, trainable, *rest = snella.partition(model)

    def loss(trainable):
        return nnx.merge(graphdef, trainable, *rest, copy=True)(X).sum()

    found = run(jax.grad(loss), trainable)["layer"]["w_adapter"]
    adapter = model.layer.w_adapter
    kernel, budget = adapter.site.kernel, int(adapter.budget[...])

    def written_out(factors):
        return (X @ snella.sparsify(kernel.apply(factors), budget)).sum()

    for name, value in run(jax.grad(written_out), adapter.factors()).items():
        np.testing.assert_allclose(found[name][...], value, rtol=1e-4, atol=1e-5)


class Counting(Plain):
    """A method that reads no weight, and changes its layer."""

    def count(self):
        self.calls += 1
        return self


def test_methods_that_read_no_weight_do_what_they_did():
    model = adapted(Counting(), {"layer/w": Layout((6,), (8,))})
    assert model.layer.count() is model.layer and model.layer.calls == 1
    assert not hasattr(snella.merge(model).layer, "w_adapter")


class Attending(nnx.Linear):
    """A subclass of one of Flax's, of which another method uses the kernel, too."""

    def attend(self, y):
        return y @ self.kernel[...].T


class Keyword(nnx.Linear):
    def __call__(self, x, factor=2) -> Any:
        return super().__call__(x) * factor, factor


def test_other_methods_of_a_subclass_have_the_update_too():
    plain = Attending(6, 8, rngs=nnx.Rngs(0))
    model = adapted(plain)
    weight = np.asarray(plain.kernel[...]) + oracle_deltas(model.layer.adapter, 6, 8)
    y = jnp.ones((2, 8))
    np.testing.assert_allclose(called(model, X), X @ weight, atol=1e-5)
    np.testing.assert_allclose(model.layer.attend(y), y @ weight.T, atol=1e-5)


def test_a_subclass_may_have_a_call_of_another_signature():
    plain = Keyword(6, 8, rngs=nnx.Rngs(0))
    model = adapted(plain)
    weight = np.asarray(plain.kernel[...]) + oracle_deltas(model.layer.adapter, 6, 8)
    y, factor = model.layer(x=X)
    np.testing.assert_allclose(y, 2 * X @ weight, atol=1e-5)
    assert factor == 2 and isinstance(factor, int)


def test_a_layer_that_holds_a_bare_array():
    class Scaled(Plain):
        def __init__(self):
            super().__init__()
            self.frequencies = nnx.data(jnp.arange(8.0))

        def __call__(self, x):
            return super().__call__(x) * self.frequencies

    config = snella.SnellaConfig(
        rank=4, targets=".*/w", trainable="", allocation="fixed", target_density=0.5
    )
    layouts = {".*/w": Layout((6,), (8,))}
    model = snella.adapt(Holder(Scaled()), config, rngs=nnx.Rngs(1), layouts=layouts)
    weight = Plain().w[...] + oracle_deltas(model.layer.w_adapter, 6, 8)
    np.testing.assert_allclose(called(model, X), X @ weight * np.arange(8), atol=1e-5)
