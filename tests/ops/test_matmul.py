"""A matmul's own gradient against JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from snella_jax.ops import matmul as contraction

ROWS = {"[n]": (), "[B, n]": (7,), "[B, T, n]": (3, 5)}
WIDE, NARROW = (6, 9), (9, 6)


def operands(rows, shape, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(*rows, shape[0])), rng.normal(size=shape)
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def pulled(matmul, x, w):
    y, pull = jax.vjp(matmul, x, w)
    return y, *pull(jnp.cos(y))


@pytest.mark.parametrize("shape", [WIDE, NARROW])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_value_and_gradients(rows, shape, x64):
    x, w = operands(rows, shape)
    got, expected = pulled(contraction.matmul, x, w), pulled(jnp.matmul, x, w)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_dtypes_are_those_of_jax(dtype):
    """bfloat16 operands, with and without a float32 product."""
    x, w = operands((3, 5), WIDE, jnp.bfloat16)
    dims = (((2,), (0,)), ((), ()))

    def with_(dot_general):
        return pulled(
            lambda x, w: dot_general(x, w, dims, preferred_element_type=dtype), x, w
        )

    got, expected = with_(contraction.dot_general), with_(lax.dot_general)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(
            np.float32(ours), np.float32(theirs), rtol=0.02, atol=0.05
        )


def test_the_weight_gradient_transposes_the_narrow_operand():
    """`[n, m]` directly where n <= m, which is what the file is for."""

    def last_steps(matmul, shape):
        x, w = operands((3, 5), shape, jnp.float32)
        g = jnp.ones((3, 5, shape[1]))
        gradient = jax.make_jaxpr(lambda w: jax.vjp(lambda w: matmul(x, w), w)[1](g))
        return [str(e.primitive) for e in gradient(w).eqns][-1]

    assert last_steps(contraction.matmul, WIDE) == "dot_general"
    assert last_steps(contraction.matmul, NARROW) == "transpose"
    assert last_steps(jnp.matmul, WIDE) == "transpose"  # the test can fail


def test_other_contractions_are_left_to_jax():
    x, w = operands((4,), (3, 9), jnp.float32)
    x, dims = x.reshape(3, 4), (((0,), (0,)), ((), ()))
    ours = contraction.dot_general(x, w, dims)
    np.testing.assert_array_equal(ours, lax.dot_general(x, w, dims))


def test_explicit_axes_and_shard_map():
    """There the sharding is part of the type: the gradients are JAX's."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    x, w = operands((8,), WIDE, jnp.float32)
    expected = jax.grad(lambda w: jnp.sin(x @ w).sum())(w)
    split = jax.device_put(x, NamedSharding(mesh, P("data")))
    whole = jax.device_put(w, NamedSharding(mesh, P()))

    def explicit(w):
        return jnp.sin(contraction.matmul(split, w)).sum()

    def manual(x, w):
        return lax.psum(jnp.sin(contraction.matmul(x, w)).sum(), "data")

    total = jax.shard_map(manual, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    with jax.set_mesh(mesh):
        gradients = jax.grad(explicit)(whole), jax.grad(total, argnums=1)(split, whole)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)
