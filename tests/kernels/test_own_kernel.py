"""A kernel of the user's own: names that its factors cannot have."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import snella_jax as snella
from snella_jax import kernels, pytree
from snella_jax.adapters.tree import COUNTS, KEY
from snella_jax.core.weight import OWN_NAMES
from snella_jax.nnx.layers import adapters_of


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A product of two factors, times a scalar of any name."""

    name: str

    def init(self, key, shape, rank, dtype=jnp.float32):
        own = kernels.linear().init(key, shape, rank, dtype)
        return own | {self.name: jnp.ones((), dtype)}

    def apply(self, factors):
        return kernels.linear().apply(factors) * factors[self.name]


def on_nnx(config):
    model = nnx.Dict(fc=nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    return snella.adapt(model, config, rngs=nnx.Rngs(1))


def on_arrays(config):
    params = {"fc": {"kernel": jnp.ones((6, 4))}}
    return pytree.adapt(params, config, key=jax.random.key(1))


@pytest.mark.parametrize("adapt", [on_nnx, on_arrays])
@pytest.mark.parametrize("name", sorted(OWN_NAMES))
def test_a_factor_cannot_be_named_as_what_an_adapter_has(adapt, name):
    with pytest.raises(ValueError, match=f"factor named '{name}': expected another"):
        adapt(
            snella.SnellaConfig(targets="fc", trainable="", rank=2, kernel=Scaled(name))
        )


@pytest.mark.parametrize("name", ["rule", "factors", "needs_key", "eval"])
def test_a_factor_cannot_be_named_as_an_attribute_of_a_module(name):
    config = snella.SnellaConfig(
        targets="fc", trainable="", rank=2, kernel=Scaled(name)
    )
    with pytest.raises(ValueError, match=f"factor named '{name}': expected another"):
        on_nnx(config)
    assert on_arrays(config)


@pytest.mark.parametrize("adapt", [on_nnx, on_arrays])
def test_another_name_is_taken(adapt):
    assert adapt(
        snella.SnellaConfig(targets="fc", trainable="", rank=2, kernel=Scaled("scale"))
    )


def test_the_names_are_all_that_an_adapter_has():
    model = on_nnx(snella.SnellaConfig(targets="fc", trainable="", rank=2))
    (adapter,) = adapters_of(model.fc).values()
    own = {name for name in vars(adapter) if not name.startswith("_")}
    assert own - {*adapter.names} == OWN_NAMES
    assert {*COUNTS, KEY} < OWN_NAMES
