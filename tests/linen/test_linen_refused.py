"""Uses of weights in Linen modules that are refused, or logged."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from linen_modules import Own, X, adapt, config

import snella_jax as snella
from snella_jax import linen, pytree


class Wrapped(nn.Module):
    how: str

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(8, name="other")(x)
        match self.how:
            case "weight_norm":
                return nn.WeightNorm(nn.Dense(8, name="fc"))(y)
            case "spectral_norm":
                return nn.SpectralNorm(nn.Dense(8, name="fc"))(y, update_stats=False)
            case "own_weight_norm":
                norm = nn.WeightNorm(Own(name="fc"), variable_filter=None)
                return norm(y)[0]
        maps = {
            "mask": lambda x: jnp.tril(x) if x.shape == (8, 8) else x,
            "transpose": lambda x: x.T if x.shape == (8, 8) else x,
            "cast": lambda x: x.astype(jnp.bfloat16),
        }

        def mapped(tree):
            return jax.tree.map(maps[self.how], tree)

        def dense(module, y):
            return nn.Dense(8, name="fc", use_bias=False)(y)

        changed = nn.map_variables(dense, "params", mapped, mapped, init=True)
        return changed(self, y)


@pytest.mark.parametrize(
    "how", ["weight_norm", "spectral_norm", "own_weight_norm", "mask", "transpose"]
)
def test_a_weight_that_is_changed_on_its_way_is_refused(how):
    layouts = (
        {"fc/down": snella.Layout((12,), (8,))} if how == "own_weight_norm" else None
    )
    targets = "fc/down" if layouts else "other|fc"
    module = Wrapped(how)
    variables = jax.jit(module.init)(jax.random.key(1), X)
    with pytest.raises(ValueError, match=r"fc.* cannot be adapted: its weight is"):
        adapt(module, targets, layouts=layouts, variables=variables)
    _, adapters, params = adapt(module, "other", variables=variables)
    found = adapters.apply({**variables, "params": params}, X)
    merged = {**variables, "params": adapters.merge(params)}
    np.testing.assert_allclose(found, module.apply(merged, X), atol=1e-5)


def test_a_weight_that_is_cast_on_its_way_is_not():
    _, adapters, _ = adapt(Wrapped("cast"), "fc")
    assert set(adapters.sites) == {("fc", "kernel")}


class Reused(nn.Module):
    @nn.compact
    def __call__(self, x):
        fc = nn.Dense(8, name="fc")
        return fc(x) @ fc.variables["params"]["kernel"].T + nn.Dense(8, name="o")(x)


def test_a_weight_that_is_used_outside_its_layer_is_refused():
    with pytest.raises(ValueError, match="fc cannot be adapted: its weight multiplies"):
        adapt(Reused(), "fc|o")
    _, adapters, _ = adapt(Reused(), "o")
    assert set(adapters.sites) == {("o", "kernel")}


class Phantom(nn.Module):
    """A head that has no place of its own in the parameters."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 8, name="embed")
        x = nn.Dense(8, name="fc")(embed(ids))
        head = nn.Dense(7, use_bias=False, parent=None)
        return head.apply({"params": {"kernel": embed.embedding.T}}, x)


def test_a_head_without_a_parent_is_no_layer():
    ids = jnp.arange(5)
    _, adapters, params = adapt(Phantom(), ".*", ids)
    assert set(adapters.sites) == {("fc", "kernel")}
    expected = Phantom().apply({"params": adapters.merge(params)}, ids)
    found = adapters.apply({"params": params}, ids)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"There are: \n  fc$"):
        adapt(Phantom(), "nothing", ids)


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x, both=False):
        y = nn.Dense(8, name="fc")(x)
        return y + nn.Dense(8, name="aside")(x) if both else y


def test_a_layer_that_the_call_does_not_meet_is_reported(caplog):
    variables = Branches().init(jax.random.key(1), X, True)
    _, adapters, _ = adapt(Branches(), ".*", variables=variables)
    assert set(adapters.sites) == {("fc", "kernel")}
    assert "that get no adapter: \n  aside/kernel" in caplog.text
    caplog.clear()
    _, adapters, _ = adapt(Branches(), ".*", X, True, variables=variables)
    assert set(adapters.sites) == {("fc", "kernel"), ("aside", "kernel")}
    assert not caplog.text


class Sliced(nn.Module):
    """Sees one of eight matrices, and nothing but its numbers says which axis went."""

    @nn.compact
    def __call__(self, x):
        def first(tree):
            return jax.tree.map(lambda w: w[:, 0] if w.ndim == 3 else w, tree)

        def dense(module, x):
            return nn.Dense(8, use_bias=False, name="fc")(x)

        return nn.map_variables(dense, "params", first)(self, x)


def test_axes_of_a_stack_are_not_guessed():
    kernel = jax.random.normal(jax.random.key(3), (8, 8, 8))
    variables = {"params": {"fc": {"kernel": kernel}}}
    with pytest.raises(ValueError, match="nothing says which axes are the stack's"):
        adapt(Sliced(), "fc", variables=variables)


def test_a_model_of_another_binding_is_told_its_own():
    module, key = nn.Dense(4), jax.random.key(0)
    variables = module.init(key, X)
    calls = [
        (nnx.Linear(8, 4, rngs=nnx.Rngs(0)), "call snella_jax.adapt"),
        (variables["params"], "call snella_jax.pytree.adapt"),
        (nn.Dense, "expected an object of it"),
    ]
    for model, message in calls:
        with pytest.raises(TypeError, match=message):
            linen.adapt(model, variables, config(""), X, key=key)
    for wrong in (variables["params"], None):
        with pytest.raises(ValueError, match='have no "params": expected what module'):
            linen.adapt(module, wrong, config(""), X, key=key)
    for key in (0, jnp.zeros(2), np.int64(3)):
        with pytest.raises(TypeError, match="is no random key"):
            linen.adapt(module, variables, config(""), X, key=key)
        with pytest.raises(TypeError, match="is no random key"):
            pytree.adapt({"fc": jnp.ones((6, 4))}, config("fc"), key=key)
    linen.adapt(module, variables, config(""), X, key=jax.random.PRNGKey(0))
