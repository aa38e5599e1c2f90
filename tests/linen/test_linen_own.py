"""Linen layers of one's own, and stacks along any axis."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_modules import NORMAL, Own, X, adapt, config

import snella_jax as snella
from snella_jax import linen


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        own = Own(name="own")
        y, aux = own(nn.Dense(8, name="fc")(x), train)
        assert aux["kind"] == "wide" and aux["none"] is None
        return y + own.hidden(x)[:, :8] + aux["largest"]


LAYOUTS = {
    "own/up": snella.Layout((8,), (12,), (2,)),
    "own/down": snella.Layout((12,), (8,)),
}


def test_a_layer_of_one_s_own_has_its_updates_in_every_method():
    # All weights move: none is on either side of a threshold as compilers round.
    _, adapters, params = adapt(Net(), ".*", layouts=LAYOUTS, density=1.0)
    assert set(params["own"]) == {"up", "up_adapter", "down", "down_adapter"}

    def run(apply, params, **options):
        return apply({"params": params}, X, mutable=["intermediates"], **options)

    for options in ({}, {"train": True, "rngs": {"dropout": jax.random.key(3)}}):

        def loss(params, adapted, options=options):
            if adapted:
                return jnp.square(run(adapters.apply, params, **options)[0]).sum()
            plain = adapters.summed(params)
            return jnp.square(run(Net().apply, plain, **options)[0]).sum()

        outputs = [
            jax.jit(functools.partial(run, apply, **options))(weights)
            for apply, weights in (
                (adapters.apply, params),
                (Net().apply, adapters.merge(params)),
            )
        ]
        chex.assert_trees_all_close(*outputs, atol=1e-5)
        gradient = jax.jit(jax.grad(loss, allow_int=True), static_argnums=1)
        both = [gradient(params, adapted) for adapted in (True, False)]
        trained = [adapters.partition(grads)[0] for grads in both]
        chex.assert_trees_all_close(*trained, rtol=1e-4, atol=1e-5)


def test_nothing_of_an_own_weight_s_size_is_kept_but_the_weight():
    _, adapters, params = adapt(Net(), "own/.*", layouts=LAYOUTS)
    trainable, budgets, frozen = adapters.partition(params)

    def loss(trainable):
        return adapters.apply(
            {"params": linen.join(trainable, budgets, frozen)}, X
        ).sum()

    _, back = jax.vjp(loss, trainable)
    kept = [leaf for leaf in jax.tree.leaves(back) if isinstance(leaf, jax.Array)]
    factors = {leaf.shape for leaf in jax.tree.leaves(trainable)}
    for name in ("up", "down"):
        weight = params["own"][name]
        same = [x for x in kept if x.shape == weight.shape]
        assert same and all((x == weight).all() for x in same)
        kept = [x for x in kept if x.shape != weight.shape and x.shape not in factors]
    assert max(x.size for x in kept) <= X.size


def test_weights_that_would_get_no_adapter_are_named():
    with pytest.raises(ValueError, match=r"own/up of Own\n  own/down of Own") as error:
        adapt(Net(), ".*")
    assert "fc" not in str(error.value)
    with pytest.raises(ValueError, match="own/down of Own"):
        adapt(Net(), "fc|own/down")
    with pytest.raises(ValueError, match="own/up of Own"):  # by the layer's path
        adapt(Net(), "fc|own", layouts={"own/down": LAYOUTS["own/down"]})
    with pytest.raises(ValueError, match="layouts: 'own/no' matches no parameter"):
        adapt(Net(), "fc", layouts={"own/no": LAYOUTS["own/down"]})
    with pytest.raises(ValueError, match=r"own/down has shape \(12, 8\)"):
        adapt(Net(), "own/down", layouts={"own/down": snella.Layout((12,), (4,))})
    variables = Net().init(jax.random.key(1), X)
    parallel = config("own/down", path="parallel")
    with pytest.raises(ValueError, match="Own has a call of its own"):
        linen.adapt(
            Net(), variables, parallel, X, key=jax.random.key(0), layouts=LAYOUTS
        )
    # What trains itself lacks no adapter.
    both = config("fc|own/.*", trainable="own")
    adapters, _ = linen.adapt(Net(), variables, both, X, key=jax.random.key(0))
    assert set(adapters.sites) == {("fc", "kernel")}


class Others(nn.Module):
    """Parameters that meet the input and are no weights."""

    @nn.compact
    def __call__(self, x, ids):
        x = nn.Dense(8, name="fc")(x)
        table = self.param("table", NORMAL, (7, 8))
        x = x + self.param("where", NORMAL, (7, 8))[ids] + nn.one_hot(ids, 7) @ table
        x = x + nn.Embed(7, 8, name="words")(ids)
        logits = nn.Embed(7, 8, name="out").attend(x)
        latents = self.param("latents", NORMAL, (3, 8))
        queries = nn.Dense(8, name="query")(self.param("seeds", NORMAL, (3, 8)))
        x = nn.softmax(x @ latents.T) @ latents + nn.softmax(x @ queries.T) @ queries
        x = x * self.param("gains", NORMAL, (1, 8)) @ self.param("column", NORMAL, (8,))
        return x[:, None] + logits


def test_what_is_no_weight_is_passed_over():
    ids = jnp.array([0, 3, 6, 1, 1])
    _, adapters, _ = adapt(Others(), ".*", X, ids)
    assert {key[0] for key in adapters.sites} == {"fc", "query"}


class Two(nn.Dense):
    """A subclass with state, which returns more than an array."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.BatchNorm(use_running_average=not train, name="bn")(super().__call__(x))
        self.sow("intermediates", "y", y)
        return nn.Dropout(0.3)(y, deterministic=not train), y.mean()


class Half(nn.Module):
    """A subclass of a layer in bfloat16 that computes in float32."""

    @nn.compact
    def __call__(self, x):
        return Doubled(6, param_dtype=jnp.bfloat16, name="fc")(x)


class Doubled(nn.Dense):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_a_subclass_keeps_all_that_it_returns_and_moves():
    variables, adapters, params = adapt(Two(6), "")
    stats = {"batch_stats": variables["batch_stats"]}
    for train in (False, True):
        options = {
            "train": train,
            "mutable": ["batch_stats", "intermediates"],
            "rngs": {"dropout": jax.random.key(4)},
        }
        (y, mean), moved = adapters.apply({"params": params, **stats}, X, **options)
        plain = {"params": adapters.merge(params), **stats}
        expected = Two(6).apply(plain, X, **options)
        assert y.shape == (5, 6) and mean.shape == ()
        chex.assert_trees_all_close(((y, mean), moved), expected, atol=1e-6)


def test_a_subclass_does_not_round_its_update():
    _, adapters, params = adapt(Half(), "fc")
    (weight,) = adapters.weights(params)
    found = adapters.apply({"params": params}, X)
    expected = 2 * X @ (weight.w0.astype(jnp.float32) + weight.delta())
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        scale = self.param("scale", nn.initializers.ones, (8,))
        y = (x * scale) @ self.param("w", NORMAL, (8, 8))
        return x + nn.tanh(nn.Dense(8, name="fc")(y)), None


class Stack(nn.Module):
    """`depth` blocks, as many as features where shapes are to say nothing."""

    axes: tuple[int, ...]
    lift: str = "scan"
    depth: int = 8

    @nn.compact
    def __call__(self, x):
        block = Block
        for axis in reversed(self.axes):
            settings = {
                "variable_axes": {"params": axis},
                "split_rngs": {"params": True},
            }
            if self.lift == "scan":
                settings |= {"length": self.depth, "in_axes": nn.broadcast}
                block = nn.scan(block, **settings)
            else:
                settings |= {"axis_size": self.depth, "in_axes": (None, None)}
                block = nn.vmap(block, out_axes=(0, None), **settings)
        return block(name="blocks")(x, None)[0]


@pytest.mark.parametrize(
    ("module", "stands"),
    [
        (Stack((0,)), (0,)),
        (Stack((1,)), (1,)),
        (Stack((-1,)), (2,)),
        (Stack((-2,)), (1,)),
        (Stack((1,), depth=3), (1,)),
        (Stack((1,), "vmap"), (1,)),
        (Stack((0, 1), depth=2), (0, 2)),
        (Stack((1, 0), depth=2), (1, 0)),
    ],
    ids=str,
)
def test_stacks_along_any_axis(module, stands, tmp_path):
    layouts = {"blocks/w": snella.Layout((8,), (8,))}
    variables, adapters, params = adapt(module, "blocks/.*", layouts=layouts)
    for weight in adapters.weights(params):
        assert weight.site.axes == stands and weight.w0.shape == weight.site.shape
        own = np.moveaxis(np.asarray(weight.w0), stands, range(len(stands)))
        np.testing.assert_array_equal(weight.matrices(), own)
    found = jax.jit(adapters.apply)({"params": params}, X)
    expected = jax.jit(module.apply)({"params": adapters.merge(params)}, X)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - module.apply(variables, X)).max() > 1e-3
    adapters.save(params, tmp_path / "a")
    again, loaded = linen.load(module, variables, tmp_path / "a", X, layouts=layouts)
    chex.assert_trees_all_equal(loaded["params"], params)
    assert again.places == adapters.places and again.sites == adapters.sites
