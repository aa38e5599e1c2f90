"""Convolutions of single pixels as matrix products: against NumPy and XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snella_jax.models.layers.pointwise import multiplied
from snella_jax.models.sam.tiny_vit import TinyViT, TinyViTConfig


def xla(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=layout, precision="highest"
    )


def test_values_and_gradients():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    kernel = rng.normal(size=(1, 1, 3, 6)).astype(np.float32)
    y, back = jax.vjp(
        lambda *own: multiplied(*own, (1, 1), "VALID", precision="highest"), x, kernel
    )
    expected = np.einsum("bijn,nm->bijm", x.astype(float), kernel[0, 0].astype(float))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    seed = jnp.asarray(rng.normal(size=y.shape), y.dtype)
    _, theirs = jax.vjp(xla, x, kernel)
    for found, right in zip(back(seed), theirs(seed), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)


def test_sixteen_bits_stay():
    x, kernel = jnp.ones((1, 2, 2, 3), "bfloat16"), jnp.ones((1, 1, 3, 2), "bfloat16")
    y, back = jax.vjp(lambda *own: multiplied(*own, (1, 1), "VALID"), x, kernel)
    assert y.dtype == "bfloat16"
    assert {g.dtype for g in back(y)} == {jnp.dtype("bfloat16")}


def test_a_tiny_vit_convolves_with_three_kernels_only():
    config = TinyViTConfig(
        widths=(4, 4, 4, 4), depths=(1, 1, 1, 1), heads=(1, 1, 1), image_size=32
    )
    model = nnx.eval_shape(lambda: TinyViT(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    traced = jax.make_jaxpr(lambda s, x: nnx.merge(graph, s)(x))(state, images)
    # The stem's two and the neck's second, of 3 x 3 each.
    assert str(traced).count("conv_general_dilated[") == 3
