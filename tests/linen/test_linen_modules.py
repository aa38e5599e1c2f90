"""Linen modules of other kinds: layers, collections, names and what is refused."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snella_jax as snella
from snella_jax import linen

IMAGES = jax.random.normal(jax.random.key(7), (4, 8, 8, 3))


def config(**changes):
    return snella.SnellaConfig(rank=4, allocation="fixed", **changes)


def run(applies, params, inputs, **others):
    """Compiled whole, which is much faster than operation by operation."""
    return jax.jit(applies.apply)({"params": params, **others}, inputs)


class Kinds(nn.Module):
    """Experts, a convolution, a fused weight, running statistics, half precision."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (2, 2), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x).mean((1, 2))
        x = nn.Dense(12, name="qkv", dtype=jnp.bfloat16)(x)
        x = nn.DenseGeneral((2, 3), name="heads", use_bias=False)(x)
        x = x.transpose(1, 0, 2)
        x = nn.DenseGeneral(4, axis=-1, batch_dims=(0,), name="batched")(x)
        x = nn.Einsum((2, 4, 5), "hbd,hdm->bhm", name="experts")(x)
        return nn.Dense(2, name="head", param_dtype=jnp.bfloat16)(x.reshape(len(x), -1))


def kinds(**changes):
    images = IMAGES[..., :2]
    own = Kinds().init(jax.random.key(0), images)
    settings = {
        "gate": "hard",
        "targets": "conv|qkv|heads|batched|experts",
        "trainable": "head",
        "overrides": {
            "qkv": {"split": 3, "rank": 2},
            "conv": {"path": "parallel", "gate": "soft"},
        },
    }
    adapters, params = linen.adapt(
        Kinds(), own, config(**(settings | changes)), images, key=jax.random.key(1)
    )
    return images, own, adapters, params


def test_every_kind_of_layer():
    images, own, adapters, params = kinds()
    sites = {w.path: w.site for w in adapters.weights(params)}
    assert sites["qkv"].layout.slices == (3,) and sites["experts"].lead == (2,)
    assert sites["batched"].layout == snella.Layout((3,), (4,), (2,))
    merged = adapters.merge(params)
    found = jax.jit(adapters.apply)({**own, "params": params}, images)
    expected = jax.jit(Kinds().apply)({**own, "params": merged}, images)
    plain = jax.jit(Kinds().apply)(own, images)
    error, moved = (np.abs(np.asarray(found - y)).max() for y in (expected, plain))
    assert error < 0.05 * moved  # one layer is in bfloat16
    assert found.dtype == expected.dtype


def test_running_statistics_travel_along(tmp_path):
    images, own, adapters, params = kinds()
    moved = functools.partial(adapters.apply, train=True, mutable=["batch_stats"])
    _, changed = jax.jit(moved)({**own, "params": params}, images)
    stats = changed["batch_stats"]
    adapters.save(params, tmp_path / "a", batch_stats=stats)
    again, loaded = linen.load(Kinds(), own, tmp_path / "a", images)
    chex.assert_trees_all_equal(loaded, {"params": params, "batch_stats": stats})
    np.testing.assert_array_equal(
        jax.jit(again.apply)(loaded, images),
        run(adapters, params, images, batch_stats=stats),
    )


def test_what_drops_does_so_with_a_dropout_rng():
    images, own, adapters, params = kinds(
        overrides={"heads": {"path": "parallel", "dropout": 0.5, "drop_path": 0.5}}
    )
    tree = {**own, "params": params}
    apply = jax.jit(adapters.apply)
    still = [apply(tree, images) for _ in range(2)]
    np.testing.assert_array_equal(*still)
    moving = [
        apply(tree, images, rngs={"dropout": jax.random.key(i)}) for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(moving[0], moving[1])
    assert not np.array_equal(moving[0], moving[2])
    assert not np.array_equal(moving[0], still[0])


def test_what_does_not_fit_is_said():
    for changes, message in (
        ({"targets": "nothing"}, r"matches no layer(.|\n)*conv\n  qkv"),
        ({"trainable": "nothing"}, "trainable='nothing' matches nothing"),
        ({"overrides": {"nope": {"rank": 2}}}, "'nope' matches none of the targets"),
        ({"overrides": {"conv": {"split": 4}}}, "split=4 does not fit"),
        (
            {"overrides": {"batched": {"path": "parallel", "drop_path": 0.1}}},
            "batched cannot be adapted: drop_path=0.1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            kinds(**changes)


def test_a_layer_that_is_the_whole_module():
    x = jax.random.normal(jax.random.key(3), (2, 6))
    module = nn.Dense(4)
    own = module.init(jax.random.key(0), x)
    adapters, params = linen.adapt(
        module, own, config(targets="", trainable=""), x, key=jax.random.key(1)
    )
    found = run(adapters, params, x)
    expected = run(module, adapters.merge(params), x)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.allclose(found, module.apply(own, x), atol=1e-3)


class Odd(nn.Module):
    """A bottleneck called adapter, a shared scope, a layer called twice, a flag."""

    def setup(self):
        self.fc = nn.Dense(6)
        self.inner = Sharing(6)
        self.block = Bottleneck()

    def __call__(self, x, train):
        x = self.inner(self.fc(self.fc(x)))
        return self.block(x) if train else x


class Sharing(nn.Module):
    features: int

    def setup(self):
        self.dense = nn.Dense(self.features)
        nn.share_scope(self, self.dense)

    def __call__(self, x):
        return jnp.tanh(self.dense(x))


class Bottleneck(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(6, name="kernel_of")(nn.Dense(2, name="adapter")(x))


def test_modules_of_other_shapes_and_names():
    x = jax.random.normal(jax.random.key(3), (2, 6))
    own = Odd().init(jax.random.key(0), x, True)
    adapters, params = linen.adapt(
        Odd(),
        own,
        config(targets="fc|inner|block/.*", trainable="", gate="hard"),
        x,
        True,
        key=jax.random.key(1),
    )
    assert len(adapters.sites) == 4
    found = jax.jit(adapters.apply, static_argnums=2)({"params": params}, x, True)
    expected = Odd().apply({"params": adapters.merge(params)}, x, True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="have adapters already"):
        linen.adapt(
            Odd(),
            {"params": params},
            config(targets="fc", trainable=""),
            x,
            True,
            key=jax.random.key(1),
        )


def test_names_with_slashes_and_statistics_of_the_same_name(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            ema = self.param("ema", nn.initializers.ones, ())
            kept = self.variable("batch_stats", "mean", lambda: jnp.zeros(()))
            if train:
                kept.value = kept.value + 1
            x = nn.WeightNorm(nn.Dense(6, name="d"))(x)
            return nn.Dense(4, name="fc")(x) * ema

    x = jnp.ones((2, 6))
    own = Net().init(jax.random.key(0), x)
    adapters, params = linen.adapt(
        Net(), own, config(targets="fc", trainable="ema"), x, key=jax.random.key(1)
    )
    params["ema"] = jnp.float32(7)
    tree = {**own, "params": params}
    _, moved = adapters.apply(tree, x, True, mutable=["batch_stats"])
    adapters.save(params, tmp_path / "a", batch_stats=moved["batch_stats"])
    again, loaded = linen.load(Net(), own, tmp_path / "a", x)
    chex.assert_trees_all_equal(loaded, {"params": params, **moved})
    assert again.trainable == "ema" and loaded["batch_stats"]["mean"] == 1


def test_partitioned_parameters_are_arrays_and_their_names_are_kept():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.normal(), ("in", "out"))
            return nn.Dense(4, kernel_init=init, name="fc")(x)

    x = jnp.ones((1, 6))
    own = Net().init(jax.random.key(0), x)
    adapters, params = linen.adapt(
        Net(), own, config(targets="fc", trainable=""), x, key=jax.random.key(1)
    )
    assert isinstance(own["params"]["fc"]["kernel"], nn.Partitioned)
    assert isinstance(params["fc"]["kernel"], jax.Array)
    specs = adapters.specs(params)["fc"]
    spec = jax.sharding.PartitionSpec
    assert specs["kernel"] == spec("in", "out")
    assert specs["adapter"]["a"] == spec(None, "in", None)
    assert specs["adapter"]["b"] == spec(None, "out", None)
    found = run(adapters, params, x)
    expected = run(Net(), adapters.merge(params), x)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_frozen_weights_in_bfloat16():
    _, _, _, params = kinds(frozen_dtype=jnp.bfloat16)
    assert params["qkv"]["kernel"].dtype == jnp.bfloat16
    assert params["qkv"]["adapter"]["a"].dtype == jnp.float32
