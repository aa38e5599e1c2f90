"""A small Swin and ConvNeXt, for tests."""

import dataclasses
import zlib

import jax
import numpy as np
from flax import nnx

from snella_jax import models
from snella_jax.models import convnext, swin

BOTH = ("swin", "convnext")
# Of two stages, which compile faster than the files' three; padded and shifted, too.
SMALL = {
    "swin": swin.SwinConfig(8, (2, 2), (2, 4), 2, image_size=20, num_classes=3),
    "convnext": convnext.ConvNeXtConfig((8, 12), (1, 2), image_size=20, num_classes=3),
}
PIXELS = jax.random.normal(jax.random.key(6), (2, 20, 20, 3))


def small(name, **changes):
    """Random weights, with biases and a head that would show mistakes."""
    model = models.of(dataclasses.replace(SMALL[name], **changes), nnx.Rngs(0))
    for path, value in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("bias", "scale") or path[0] == "head":
            key = jax.random.key(zlib.crc32("/".join(map(str, path)).encode()))
            value[...] += 0.3 * jax.random.normal(key, value.shape, value.dtype)
    return model


def run(model, pixels, key=None):
    """The grids of the stages, what the head sees, and what it says."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def compiled(state, pixels, key):
        model = nnx.merge(graphdef, state)
        return (
            model.features(pixels, key),
            model.pooled(pixels, key),
            model(pixels, key),
        )

    return compiled(state, pixels, key)


def logits(model, key=None):
    return run(model, PIXELS, key)[-1]


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)
