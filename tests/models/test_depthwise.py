"""Depthwise convolutions as sums of products: against loops and XLA's convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snella_jax.models.layers.depthwise import shifted

CASES = [
    ((5, 6), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((6, 7), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((7, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((8, 9), (3, 2), (2, 3), ((0, 0), (0, 1))),
]


def loops(x, kernel, strides, padding):
    """The definition, pixel by pixel."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    size, (s, t) = kernel.shape[:2], strides
    rows, columns = ((x.shape[1 + a] - size[a]) // strides[a] + 1 for a in (0, 1))
    y = np.zeros((len(x), rows, columns, x.shape[3]))
    for i in range(rows):
        for j in range(columns):
            part = x[:, s * i : s * i + size[0], t * j : t * j + size[1]]
            y[:, i, j] = (part * kernel[:, :, 0]).sum((1, 2))
    return y


def xla(x, kernel, strides, padding):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=layout,
        feature_group_count=x.shape[3],
        precision="highest",
    )


@pytest.mark.parametrize(("grid", "size", "strides", "padding"), CASES)
def test_values_and_gradients(grid, size, strides, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *grid, 3)).astype(np.float32)
    kernel = rng.normal(size=(*size, 1, 3)).astype(np.float32)
    expected = loops(x.astype(float), kernel.astype(float), strides, padding)
    y, back = jax.vjp(lambda *own: shifted(*own, strides, padding), x, kernel)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    seed = jnp.asarray(rng.normal(size=y.shape), y.dtype)
    _, theirs = jax.vjp(lambda *own: xla(*own, strides, padding), x, kernel)
    for found, right in zip(back(seed), theirs(seed), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)


def test_sixteen_bits_stay():
    x, kernel = jnp.ones((1, 4, 4, 2), "bfloat16"), jnp.ones((3, 3, 1, 2), "bfloat16")
    y, back = jax.vjp(lambda *own: shifted(*own, (1, 1), ((1, 1),) * 2), x, kernel)
    assert y.dtype == "bfloat16"
    assert {g.dtype for g in back(y)} == {jnp.dtype("bfloat16")}
