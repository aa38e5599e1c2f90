"""A tiny model that draws, with judges that look at colours, for runs on concepts."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from experiments.pretrained import picture_judges, sd3_models
from experiments.training.judges import Features
from experiments.training.objective import Metric
from snella_jax.models.sd3 import Pipeline
from snella_jax.models.sd3.mmdit import MMDiT, MMDiTConfig

SIDE, TOKENS, WIDTH, POOLED = 8, 3, 8, 6
CONFIG = MMDiTConfig(
    width=16,
    depth=2,
    heads=2,
    channels=3,
    positions=8,
    context_dim=WIDTH,
    pooled_dim=POOLED,
    mlp_ratio=1,
)


def model(seed=0, config=CONFIG):
    """An MMDiT with random weights: with those it begins with, its blocks do little."""
    shapes = nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(shapes)
    rng, (leaves, tree) = np.random.default_rng(seed), jax.tree.flatten(state)
    drawn = [jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype) for x in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, drawn))


class Encoder:
    """Draws the context of a prompt from its text; as large as it is told."""

    def __init__(self, size=0):
        self.weights = jnp.zeros(size)

    def encode(self, prompts):
        rngs = [np.random.default_rng(zlib.crc32(p.encode())) for p in prompts]
        context = np.stack([rng.normal(size=(TOKENS, WIDTH)) for rng in rngs])
        pooled = np.stack([rng.normal(size=POOLED) for rng in rngs])
        return jnp.float32(context), jnp.float32(pooled)


def pipeline(encoder_size=0):
    """The tiny model, whose latents are pixels, with its encoder."""
    return Pipeline(model(), None, Encoder(encoder_size), shift=1.0)


class Colours:
    """Judges of a picture by its pixels; its fit is how light it is."""

    fit = Metric("lightness")

    def features(self, pictures):
        rows = pictures.reshape(len(pictures), -1).astype(np.float32) + 1
        return Features(rows, rows)

    def fits(self, features, prompts):
        assert not any("sks" in prompt for prompt in prompts)
        return features.likeness.mean(1) / 256


def install(patch, encoder_size=0):
    """Puts the tiny model and its judges in the places of those with weights."""
    patch.setattr(sd3_models, "load", lambda config: pipeline(encoder_size))
    patch.setattr(sd3_models, "vae", lambda config: None)
    patch.setattr(sd3_models, "files", lambda config: [])
    patch.setattr(picture_judges, "load", lambda config, class_name: Colours())
    patch.setattr(picture_judges, "files", lambda config: [])


def photographs(folder, count=5):
    """A folder with so many photographs, and its path."""
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return folder
