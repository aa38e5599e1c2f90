"""Layers that are none of Flax's: adapted where `layouts` says how, else named."""

import pickle
import subprocess
import sys

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
from snella_jax.nnx.layers import adapters_of

X = jnp.asarray(np.random.default_rng(3).normal(size=(5, 6)), jnp.float32)


class Own(nnx.Module):
    """A product with a weight of its own; a property and a method read it, too."""

    def __init__(self, rngs, name="w"):
        self.called = name
        setattr(self, name, nnx.Param(jax.random.normal(rngs.params(), (6, 8))))
        self.b = nnx.Param(jnp.ones(8))

    @property
    def weight(self):
        return getattr(self, "w" if self.called == "w" else "kernel")[...]

    def __call__(self, x):
        return x @ self.weight + self.b[...]

    def back(self, y):
        return y @ self.weight.T

    def width(self):
        return self.b.shape[0]


def adapted(layer, targets="layer", layouts=None, **changes):
    changes = {"allocation": "fixed", "target_density": 0.5, "rank": 4} | changes
    config = snella.SnellaConfig(targets=targets, trainable="", **changes)
    return snella.adapt(Holder(layer), config, rngs=nnx.Rngs(1), layouts=layouts)


def read(model, what):
    """`what` of the layer, as one compiled program."""
    graphdef, state = nnx.split(model)
    return run(lambda state: what(nnx.merge(graphdef, state).layer), state)


@pytest.mark.parametrize(
    ("name", "regex", "targets"),
    [
        ("w", "layer/w", "layer/w"),
        ("w", ".*/w", "layer"),
        ("kernel", "layer/kernel", "layer"),
        ("kernel", "layer", "layer"),
    ],
)
def test_every_reader_of_a_weight_has_its_update(name, regex, targets):
    plain = Own(nnx.Rngs(0), name)
    model = adapted(plain, targets, {regex: Layout((6,), (8,))})
    adapter = adapters_of(model.layer)[name]
    weight = np.asarray(plain.weight) + oracle_deltas(adapter, 6, 8)
    np.testing.assert_allclose(called(model, X), np.asarray(X) @ weight + 1, atol=1e-5)
    np.testing.assert_allclose(read(model, lambda own: own.weight), weight, atol=1e-6)
    y = np.ones((2, 8), np.float32)
    np.testing.assert_allclose(
        read(model, lambda own: own.back(y)), y @ weight.T, atol=1e-5
    )
    assert model.layer.width() == 8


def test_gradients_are_those_of_the_update_written_out():
    model = adapted(Own(nnx.Rngs(0)), layouts={".*": Layout((6,), (8,))})
    adapter = model.layer.w_adapter
    kernel, budget = adapter.site.kernel, int(adapter.budget[...])

    def written_out(factors, x):
        delta = snella.sparsify(kernel.apply(factors), budget)
        return jnp.sin(x @ (model.layer.w[...] + delta) + 1).sum()

    def ours(factors, x):
        own = nnx.clone(model)
        nnx.update(own.layer.w_adapter, nnx.State(factors))
        return jnp.sin(own(x)).sum()

    found, expected = (
        run(jax.grad(f, argnums=(0, 1)), adapter.factors(), X)
        for f in (ours, written_out)
    )
    for name, value in expected[0].items():
        own = found[0][name]
        np.testing.assert_allclose(own, value, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)


def test_no_update_is_kept_for_the_backward_pass():
    model = adapted(Own(nnx.Rngs(0)), layouts={".*": Layout((6,), (8,))})
    graphdef, trainable, *rest = snella.partition(model)

    def kept(trainable, rest, x):
        def run(trainable, x):
            return nnx.merge(graphdef, trainable, *rest, copy=True)(x)

        return jax.tree.leaves(jax.vjp(run, trainable, x)[1])

    jaxpr = jax.make_jaxpr(kept)(trainable, rest, X).jaxpr
    large = [v for v in jaxpr.outvars if getattr(v.aval, "shape", ()) == (6, 8)]
    assert len(large) == 1 and large[0] in jaxpr.invars  # the base's weight


class Mixed(nnx.Module):
    """A layer, and much that a wide regex matches but is no weight of one."""

    def __init__(self, rngs):
        self.cls_token = nnx.Param(jnp.ones((1, 3, 6)))
        self.pos_embed = nnx.Param(jnp.ones((5, 6)))
        self.queries = nnx.Param(jnp.ones((5, 6)))
        self.wte = nnx.Param(jnp.ones((5, 6)))
        self.relative_position_bias_table = nnx.Param(jnp.ones((9, 2)))
        self.layer_scale = nnx.Param(jnp.ones((2, 6)))
        self.embed = nnx.Embed(5, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.stats = nnx.BatchNorm(6, rngs=rngs)
        self.fc = nnx.Linear(6, 6, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def build(rngs):
            return nnx.RMSNorm(6, rngs=rngs)

        self.norms = build(rngs)


@pytest.mark.parametrize("targets", [".*", "fc|embed|norm.*|queries|.*_token"])
def test_what_multiplies_no_input_is_passed_over(targets):
    config = snella.SnellaConfig(rank=4, targets=targets, trainable="")
    model = snella.adapt(Mixed(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    assert [m.name for m in snella.sparsity(model)] == ["fc"]


def with_weight(path, weight, rngs=None):
    model = Mixed(nnx.Rngs(0))
    *parents, name = path.split("/")
    node = model
    for parent in parents:
        setattr(node, parent, nnx.Module())
        node = getattr(node, parent)
    setattr(node, name, nnx.Param(weight))
    return model


@pytest.mark.parametrize(
    ("path", "shape", "targets"),
    [
        ("own/w", (6, 8), ".*"),
        ("own/w", (6, 8), "own|fc"),
        ("own/w", (6, 8), "(own/w)|fc"),
        ("own/anything", (2, 6, 8), "own|fc"),
        ("own/deep/kernel", (6, 2, 8), r"fc|own/.*"),
        ("w_gate", (6, 8), ".*"),
        ("gating_einsum", (2, 6, 8), ".*"),
        ("wi_0", (6, 8), ".*"),
        ("wqkv", (6, 8), ".*"),
        ("fc1", (6, 8), ".*"),
        ("router", (6, 8), ".*"),
        ("pos_proj", (6, 8), ".*"),
        ("token_mixer", (6, 8), ".*"),
    ],
)
def test_a_weight_that_would_be_left_out_is_named(path, shape, targets):
    config = snella.SnellaConfig(rank=4, targets=targets, trainable="")
    with pytest.raises(ValueError, match="nothing says") as error:
        snella.adapt(with_weight(path, jnp.ones(shape)), config, rngs=nnx.Rngs(1))
    assert f"\n  {path} {list(shape)}" in str(error.value)


def test_a_transposed_convolution_is_named_and_can_be_adapted():
    layer = nnx.ConvTranspose(6, 8, (2,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layer/kernel"):
        adapted(layer)
    model = adapted(layer, layouts={"layer": Layout((2, 6), (8,))})
    merged = snella.merge(model)
    x = X[:, None]
    outputs = called(model, x)
    np.testing.assert_allclose(outputs, called(merged, x), atol=1e-5)
    assert np.abs(np.subtract(outputs, called(layer, x))).max() > 1e-3


@pytest.mark.parametrize(
    ("layouts", "changes", "message"),
    [
        ({"nowhere": Layout((6,), (8,))}, {}, "'nowhere' matches no weight"),
        ({".*": Layout((6,), (9,))}, {}, r"has shape \(6, 8\)"),
        ({".*": Layout((6,), (8,))}, {"path": "parallel"}, 'expected path="merged"'),
        ({".*": Layout((6,), (8,))}, {"targets": "lay"}, "match a whole path"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layouts, changes, message):
    with pytest.raises(ValueError, match=message):
        adapted(Own(nnx.Rngs(0)), layouts=layouts, **changes)


def test_an_attribute_in_the_place_of_the_adapter_is_not_lost():
    layer = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    layer.adapter = "something"
    with pytest.raises(ValueError, match="'adapter', where its adapter goes"):
        adapted(layer)


def test_parts_of_a_fused_weight_and_an_adapted_model_that_loads(tmp_path):
    layouts = {".*": Layout((6,), (8,))}
    model = adapted(Own(nnx.Rngs(0)), layouts=layouts, split=2)
    assert [m.name for m in snella.sparsity(model)] == ["layer/w[0]", "layer/w[1]"]
    snella.save(model, tmp_path / "a")
    again = snella.load(model, tmp_path / "a")
    np.testing.assert_array_equal(called(again, X), called(model, X))
    base = Holder(Own(nnx.Rngs(0)))
    with pytest.raises(snella.CheckpointError, match="no such layer"):
        snella.load(base, tmp_path / "a")


class Changing(nnx.Linear):
    """A subclass whose call draws a mask, counts, and returns more than an array."""

    def __init__(self, *sizes, rngs):
        super().__init__(*sizes, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(sizes[-1], rngs=rngs)

    def __call__(self, x):
        y = self.norm(self.drop(super().__call__(x)))
        return y, {"mean": y.mean(), "largest": y.argmax()}


def test_a_layer_that_moves_state_and_returns_a_tree_does_so_adapted():
    plain = Holder(Changing(6, 8, rngs=nnx.Rngs(0)))
    gate = {"kernel": "linear", "gate": "hard", "target_density": 1.0}
    model = adapted(plain.layer, **gate)  # an update of 0 at the start
    for _ in range(2):
        (y, more), (expected, others) = model(X), plain(X)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_allclose(more["mean"], others["mean"], atol=1e-6)
        assert more["largest"] == others["largest"]
    mean = plain.layer.norm.mean[...]
    np.testing.assert_array_equal(model.layer.norm.mean[...], mean)
    assert int(model.layer.drop.rngs.count[...]) == 2
    model.eval()
    grads = jax.grad(lambda x: model(x)[0].sum())(X)  # moves nothing, closes over it
    weight = plain.layer.kernel[...] / jnp.sqrt(plain.layer.norm.var[...] + 1e-5)
    np.testing.assert_allclose(grads[0], weight.sum(1), rtol=1e-4)


def test_state_of_others_that_a_call_changes_is_refused():
    class Counting(nnx.Linear):
        def __call__(self, x, counter):
            counter[...] += 1
            return super().__call__(x)

    model = adapted(Counting(6, 8, rngs=nnx.Rngs(0)))
    counter = nnx.Variable(jnp.zeros(()))
    with pytest.raises(ValueError, match="Counting has an adapter, and its call"):
        model.layer(X, counter)


def test_adapted_models_pickle_with_their_graph():
    layouts = {".*/w": Layout((6,), (8,))}
    for model in (adapted(Own(nnx.Rngs(0)), layouts=layouts),
                  adapted(nnx.Linear(6, 8, rngs=nnx.Rngs(0)))):  # fmt: skip
        again = pickle.loads(pickle.dumps(model))
        assert type(again.layer) is type(model.layer)
        np.testing.assert_array_equal(called(again, X), called(model, X))
        graphdef, state = pickle.loads(pickle.dumps(nnx.split(model)))
        merged = nnx.merge(graphdef, state)
        np.testing.assert_array_equal(called(merged, X), called(model, X))


def test_a_sum_of_updates_of_own_layers():
    layouts, layer = {".*/w": Layout((6,), (8,))}, Own(nnx.Rngs(0))
    model = adapted(layer, layouts=layouts)
    plain = snella.combine({"one": model}, {"one": 0.5}, rest="one")
    np.testing.assert_allclose(
        called(plain, X), np.add(called(model, X), called(layer, X)) / 2, atol=1e-5
    )


def test_a_stack_of_own_layers_that_is_scanned():
    class Stack(nnx.Module):
        def __init__(self):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def build(rngs):
                return Own(rngs)

            self.layer = build(nnx.Rngs(0))

        def __call__(self, x):
            axes = {(nnx.Param, snella.Frozen, snella.Budget): 0, ...: None}
            scan = nnx.scan(in_axes=(nnx.Carry, nnx.StateAxes(axes)))
            return scan(lambda x, own: (own.back(own(x)), own(x).mean()))(x, self.layer)

    config = snella.SnellaConfig(
        rank=4, targets="layer/w", trainable="", allocation="fixed", target_density=0.5
    )
    layouts = {"layer/w": Layout((6,), (8,))}
    model = snella.adapt(Stack(), config, rngs=nnx.Rngs(1), layouts=layouts)
    weights = Stack().layer.w[...] + oracle_deltas(model.layer.w_adapter, 6, 8)
    x, means = np.asarray(X), []
    for weight in np.asarray(weights):
        means.append((x @ weight + 1).mean())
        x = (x @ weight + 1) @ weight.T
    outputs = called(model, X)
    np.testing.assert_allclose(outputs[0], x, rtol=1e-4)
    np.testing.assert_allclose(outputs[1], means, rtol=1e-4)
    np.testing.assert_allclose(snella.merge(model).layer.w[...], weights, atol=1e-6)


def test_a_pickled_model_loads_in_a_process_that_knows_nothing(tmp_path):
    model = adapted(nnx.Linear(6, 8, rngs=nnx.Rngs(0))).layer
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    program = (
        "import pathlib, pickle, sys, numpy as np\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "model = pickle.loads((folder / 'model').read_bytes())\n"
        "np.save(folder / 'y.npy', model(np.ones((2, 6), np.float32)))\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    expected = called(model, np.ones((2, 6), np.float32))
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, atol=1e-6)


def test_a_kernel_of_a_kind_of_the_users_own_is_adapted():
    class Held(nnx.Variable):
        """Frozen before, in the user's own way."""

    layer = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    layer.kernel = Held(layer.kernel[...])
    model = adapted(layer)
    plain = snella.merge(model).layer
    assert type(plain.kernel) is Held
    weight = np.asarray(layer.kernel[...]) + oracle_deltas(model.layer.adapter, 6, 8)
    np.testing.assert_allclose(plain.kernel[...], weight, atol=1e-6)
    np.testing.assert_allclose(called(model, X), called(plain, X), atol=1e-5)
