"""A small Swin and ConvNeXt, for tests."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from compiled import called
from flax import nnx

from snella_jax import models
from snella_jax.models import convnext, swin

BOTH = ("swin", "convnext")
# Of two stages, which compile faster than the files' three; padded and shifted, too.
SMALL = {
    "swin": swin.SwinConfig(8, (2, 2), (2, 4), 2, image_size=20, num_classes=3),
    "convnext": convnext.ConvNeXtConfig((8, 12), (1, 2), image_size=20, num_classes=3),
}
PIXELS = np.random.default_rng(6).normal(size=(2, 20, 20, 3)).astype(np.float32)


def small(name, **changes):
    """Random weights, with biases and a head that would show mistakes."""
    model = models.of(dataclasses.replace(SMALL[name], **changes), nnx.Rngs(0))
    for path, value in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("bias", "scale") or path[0] == "head":
            rng = np.random.default_rng(zlib.crc32("/".join(map(str, path)).encode()))
            noise = 0.3 * rng.normal(size=value.shape)
            value.set_value(jnp.asarray(np.asarray(value[...]) + noise, value.dtype))
    return model


def run(model, pixels, key=None):
    """The grids of the stages, what the head sees, and what it says."""
    return _run(*nnx.split(model), pixels, key)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, pixels, key):
    model = nnx.merge(graphdef, state)
    return model.features(pixels, key), model.pooled(pixels, key), model(pixels, key)


def logits(model, key=None):
    return called(model, PIXELS, key)


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)
