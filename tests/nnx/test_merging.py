"""Merged weights in the dtype that is asked for, and what rounding takes of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snella_jax as snella
from snella_jax import pytree

CONFIG = snella.SnellaConfig(
    rank=4,
    gate="hard",
    targets="fc",
    trainable="head",
    target_density=1.0,
    allocation="fixed",
)
LOST = (
    r"fc into bfloat16 lost \d+\.\d% of its moved weights to rounding: "
    r"merge\(dtype=jnp\.float32\) keeps them.*path='parallel'"
)


class Net(nnx.Module):
    """Two layers, stored in a dtype, and a count that is no float."""

    def __init__(self, dtype):
        rngs = nnx.Rngs(0)
        self.fc = nnx.Linear(16, 16, param_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(16, 2, param_dtype=dtype, rngs=rngs)
        self.fc.kernel[...] *= 64  # far above the update
        self.count = nnx.Param(jnp.int32(3))
        self.tree = nnx.Param({"scale": jnp.ones(2, dtype), "none": None})


def sums(w0, adapter):
    """`w0 + delta` in float64, and `delta`; the kernel by its class's own formula."""
    factors = {name: getattr(adapter, name)[...] for name in adapter.names}
    delta = np.asarray(snella.kernels.mix_k().apply(factors), np.float64)
    return np.asarray(w0, np.float64) + delta, delta


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_a_merged_model_has_the_dtype_that_is_asked_for(dtype, caplog):
    model = snella.adapt(Net(jnp.bfloat16), CONFIG, rngs=nnx.Rngs(1))
    w0 = model.fc.kernel[...]
    expected, delta = sums(w0, model.fc.adapter)
    plain = snella.merge(model, dtype=dtype)
    floats = [plain.fc.kernel, plain.fc.bias, plain.head.kernel, plain.head.bias]
    stored = jnp.dtype(dtype or jnp.bfloat16)
    assert {variable.dtype for variable in floats} == {stored}
    assert plain.tree.get_value()["scale"].dtype == stored
    assert plain.count.dtype == jnp.int32 and plain.count[...] == 3
    unit = jnp.finfo(stored).eps / 2
    got = np.asarray(plain.fc.kernel[...], np.float64)
    assert (abs(got - expected) <= unit * abs(expected) + 1e-7).all()
    lost = (got == np.asarray(w0, np.float64)) & (delta != 0)
    assert bool(lost.any()) == (stored == jnp.bfloat16)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (stored == jnp.bfloat16)
    for message in said:
        assert f"lost {100 * lost.sum() / (delta != 0).sum():.1f}%" in message
        assert re.search(LOST, message)
    assert model.fc.kernel.dtype == jnp.bfloat16  # the adapted one is as it was


def test_a_merged_tree_has_the_dtype_that_is_asked_for():
    params = {
        "fc": {"kernel": jnp.ones((6, 4), jnp.bfloat16)},
        "head": jnp.ones((4, 2), jnp.bfloat16),
        "count": jnp.int32(3),
        "empty": {},
    }
    adapters, adapted = pytree.adapt(params, CONFIG, key=jax.random.key(0))
    plain = adapters.merge(adapted, dtype=jnp.float32)
    assert plain["fc"]["kernel"].dtype == plain["head"].dtype == jnp.float32
    assert plain["count"].dtype == jnp.int32 and plain["empty"] == {}
    np.testing.assert_allclose(
        plain["fc"]["kernel"],
        1 + adapters.weights(adapted)[0].delta(),
        rtol=1e-6,
    )


def test_only_floating_point_dtypes_are_taken():
    model = snella.adapt(Net(jnp.float32), CONFIG, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="expected a floating-point dtype"):
        snella.merge(model, dtype=jnp.int8)
