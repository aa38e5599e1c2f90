"""Other people's NNX models: what they do; refusals name the way round."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import called
from flax import nnx
from modules import Holder

import snella_jax as snella

X = jnp.asarray(np.random.default_rng(3).normal(size=(5, 6)), jnp.float32)


def adapted(layer, targets="layer", **changes):
    changes = {"allocation": "fixed", "target_density": 0.5, "rank": 4} | changes
    config = snella.SnellaConfig(targets=targets, trainable="", **changes)
    return snella.adapt(Holder(layer), config, rngs=nnx.Rngs(1))


def linear(rngs=None):
    return nnx.Linear(6, 6, rngs=rngs or nnx.Rngs(0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Dense(3), r"Dense is a Linen module: call snella_jax\.linen\.adapt"),
        ({"kernel": X}, r"dict is a mapping of parameters: call snella_jax\.pytree"),
        (nnx.Linear, "Linear is a class: expected an object"),
        (nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), "state of an NNX model"),
        (
            types.SimpleNamespace(module=nn.Dense(3), params={}),
            r"has one: call snella_jax\.linen\.adapt\(model\.module",
        ),
        (X, "no NNX module, Linen module or nested dict"),
    ],
)
def test_a_model_for_another_binding_is_told_which(model, message):
    config = snella.SnellaConfig(targets=".*", trainable="")
    with pytest.raises(TypeError, match=message):
        snella.adapt(model, config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("rngs", [0, jax.random.key(0), None])
def test_what_is_no_rngs_is_said(rngs):
    config = snella.SnellaConfig(targets=".*", trainable="")
    with pytest.raises(TypeError, match=r"expected nnx\.Rngs, such as nnx\.Rngs\(0\)"):
        snella.adapt(Holder(linear()), config, rngs=rngs)


@pytest.mark.parametrize("switch", ["view", "eval"])
def test_dropout_of_an_adapter_is_switched_by_flaxs_own_means(switch):
    model = adapted(linear(), path="parallel", dropout=0.5)
    with pytest.raises(ValueError, match=r"snella\.seed"):
        model(X)
    view = nnx.view(model, deterministic=True)
    if switch == "eval":
        model.eval()
        view = model
    kernel = snella.merge(adapted(linear())).layer.kernel[...]
    np.testing.assert_allclose(called(view, X), X @ kernel, atol=1e-5)
    assert not nnx.view(view, deterministic=False).layer.adapter.deterministic


class Scanned(nnx.Module):
    """Three layers in a stack; `axes` says what is scanned."""

    def __init__(self, axes, axis=0):
        self.axes = axes

        @nnx.split_rngs(splits=3)
        @nnx.vmap(out_axes=axis)
        def build(rngs):
            return nnx.Linear(6, 6, rngs=rngs)

        self.blocks = build(nnx.Rngs(0))

    def __call__(self, x):
        scan = nnx.scan(in_axes=(nnx.Carry, self.axes), out_axes=nnx.Carry)
        return scan(lambda x, block: jnp.tanh(block(x)))(x, self.blocks)


def scanned(kinds, **options):
    config = snella.SnellaConfig(
        rank=4, targets="blocks", trainable="", allocation="fixed", target_density=0.5
    )
    model = Scanned(nnx.StateAxes({**kinds, ...: None}), **options)
    return model, snella.adapt(model, config, rngs=nnx.Rngs(1))


def test_a_scan_by_kind_of_variable_is_told_the_kinds():
    model, adapted = scanned({nnx.Param: 0})
    assert called(model, X).shape == X.shape
    with pytest.raises(ValueError, match=r"nnx\.StateAxes\(\{\(nnx\.Param, snella"):
        adapted(X)
    _, adapted = scanned({(nnx.Param, snella.Frozen, snella.Budget): 0})
    np.testing.assert_allclose(
        called(adapted, X), called(snella.merge(adapted), X), atol=1e-5
    )


def test_a_scan_inside_lax_map():
    """Flax scans a copy that is merged there, and no model from outside (flax#5025)."""
    for each in scanned({(nnx.Param, snella.Frozen, snella.Budget): 0}):
        graphdef, state = nnx.split(each)
        found = jax.lax.map(
            lambda x, parts=(graphdef, state): nnx.merge(*parts, copy=True)(x), X
        )
        np.testing.assert_allclose(found, called(each, X), atol=1e-5)
        with pytest.raises(ValueError, match="different trace level"):
            jax.lax.map(each, X)


def test_a_stack_along_axis_1():
    adapters = nnx.PathContains("adapter", exact=False)
    model, adapted = scanned({adapters: 0, (nnx.Param, snella.Frozen): 1}, axis=1)
    assert [m.name for m in snella.sparsity(adapted)] == [
        f"blocks[{i}]" for i in range(3)
    ]
    assert adapted.blocks.adapter.a.shape[0] == 3
    np.testing.assert_allclose(
        called(adapted, X), called(snella.merge(adapted), X), atol=1e-5
    )
    assert np.abs(np.subtract(called(adapted, X), called(model, X))).max() > 1e-3


@pytest.mark.parametrize("axis", [0, 1])
def test_a_bias_tells_the_axis_of_a_stack_where_the_weight_does_not(axis):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(out_axes=axis)
    def build(rngs):
        return nnx.Linear(3, 6, rngs=rngs)

    model = adapted(build(nnx.Rngs(0)))  # a kernel [3, 3, 6]
    assert model.layer.adapter.site.axes == (axis,)


def test_an_ensemble_that_was_adapted_under_vmap(tmp_path):
    @nnx.jit
    @nnx.vmap
    def member(key):
        return Holder(nnx.Linear(6, 6, rngs=nnx.Rngs(key)))

    @nnx.jit
    @nnx.vmap
    def adapt(model, key):
        config = snella.SnellaConfig(
            rank=4, targets=".*", trainable="", allocation="fixed", target_density=0.5
        )
        return snella.adapt(model, config, rngs=nnx.Rngs(key))

    @nnx.jit
    @nnx.vmap(in_axes=(0, None))
    def run(model, x):
        return model(x)

    keys = jax.random.split(jax.random.key(0), 3)
    base = member(keys)
    models = adapt(base, keys)
    matrices = snella.sparsity(models)
    assert [m.name for m in matrices] == ["layer[0]", "layer[1]", "layer[2]"]
    assert snella.adapted_weights(models) == 3 * 36
    found = run(models, X)
    np.testing.assert_allclose(found, run(snella.merge(models), X), atol=1e-5)
    snella.save(models, tmp_path / "a")
    np.testing.assert_array_equal(run(snella.load(base, tmp_path / "a"), X), found)


def normalised(wrap, layer, **options):
    return wrap(layer, rngs=nnx.Rngs(2), **options)


def test_a_weight_that_a_wrapper_normalises_is_refused():
    def wrapped(**options):
        return normalised(nnx.WeightNorm, linear(), **options)

    with pytest.raises(ValueError, match=r"kernel is normalised by an nnx\.WeightNorm"):
        adapted(wrapped(), "layer/.*")
    other = wrapped(variable_filter=nnx.PathContains("bias"))
    model = adapted(other, "layer/.*")
    np.testing.assert_allclose(
        called(model, X), called(snella.merge(model), X), atol=1e-5
    )


class Discriminator(nnx.Module):
    def __init__(self):
        norm = normalised(nnx.SpectralNorm, linear())
        self.norm, self.fc = norm, linear()

    def __call__(self, x):
        return self.fc(self.norm(x, update_stats=False))


def test_freezing_does_not_switch_a_spectral_norm_off():
    for trainable in ("", "norm/layer_instance/bias"):
        config = snella.SnellaConfig(targets="fc", trainable=trainable)
        with pytest.raises(
            ValueError, match="norm/layer_instance/kernel\nwould switch"
        ):
            snella.adapt(Discriminator(), config, rngs=nnx.Rngs(1))
    config = snella.SnellaConfig(
        rank=4, targets="fc", trainable="norm", allocation="fixed", target_density=0.0
    )
    model = snella.adapt(Discriminator(), config, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(called(model, X), called(Discriminator(), X), atol=1e-6)
