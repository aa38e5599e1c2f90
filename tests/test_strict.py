"""JAX's strict settings change no number, and nothing fails under them.

Flax and optax work under each of these. The oracle is the same program without the
setting: bit for bit where XLA compiles the same, to rounding where it compiles nothing.
"""

import functools
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from every_kind import IMAGES, every, outputs
from flax import nnx
from generic import generic_factors, generic_inputs, run

import snella_jax as snella
from snella_jax import adapted_dense, kernels, linen, pytree
from snella_jax.sparsify import GATES

SETTINGS = {
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "x64": lambda: jax.enable_x64(True),
    "debug_nans": lambda: jax.debug_nans(True),
    "check_tracer_leaks": jax.checking_leaks,
    "disable_jit": jax.disable_jit,
}
KERNELS = {name: kernels.named(name) for name in kernels.KERNELS} | {
    "mix_k, temperature": kernels.mix_k(temperature=True, learn_piece_coeff=False),
    "mix_k over in": kernels.mix_k(normalize_over="in", pieces=1),
}
TX = optax.chain(snella.track_importance(), optax.adamw(1e-2, mask=snella.decay_mask))

each_setting = pytest.mark.parametrize("setting", SETTINGS)


def assert_same(got, expected, setting):
    """Types, too; a bfloat16 number may be on the other side of where it rounds."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    paths = jax.tree_util.tree_leaves_with_path(got)
    for (path, one), other in zip(paths, jax.tree.leaves(expected), strict=True):
        where = jax.tree_util.keystr(path)
        assert one.dtype == other.dtype, where
        one, other = np.float64(one), np.float64(other)
        part = 0 if setting != "disable_jit" else 1e-5
        np.testing.assert_allclose(
            one, other, 0, part * np.abs(other).max(initial=1), err_msg=where
        )


# The matmul


def matmuls(name, dtype):
    """Values and gradients by gate and path, dropping on the parallel one."""
    kernel, key = KERNELS[name], jax.random.key(0)
    gates = (*GATES, "none") if name == "mix_k" else ("product",)
    x, w0 = generic_inputs(dtype=dtype)
    factors = generic_factors(kernel, dtype=dtype)

    def loss(operands, gate, path):
        drop = {"dropout": 0.2, "drop_path": 0.2, "key": key}
        settings = {"gate": gate, "path": path, **(drop if path == "parallel" else {})}
        y = adapted_dense(*operands, 90, kernel=kernel, **settings)
        return jnp.sin(y.astype(jnp.float32)).sum(), y

    def both(*operands):
        graded = jax.value_and_grad(loss, has_aux=True)
        return {
            f"{gate} {path}": graded(operands, gate, path)
            for gate in gates
            for path in ("merged", "parallel")
        }

    return run(both, x, w0, factors)


@functools.cache
def usual_matmuls(name, dtype):
    return matmuls(name, dtype)


@each_setting
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_gate_and_path(name, setting):
    """In float32 and, which is where dtypes meet, bfloat16."""
    for dtype in (jnp.float32, jnp.bfloat16):
        if setting == "disable_jit" and dtype == jnp.bfloat16:
            continue  # where XLA rounds between operations is its own business
        expected = usual_matmuls(name, dtype)
        with SETTINGS[setting]():
            got = matmuls(name, dtype)
        assert_same(got, expected, setting)
