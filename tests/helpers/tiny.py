"""A tiny ViT and images for it, adapted by any method."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from experiments.config.images import ImageConfig
from experiments.data.source import Arrays
from experiments.data.transforms import Transform
from experiments.methods import sensitivity
from experiments.methods.first_stage import Staged
from experiments.methods.prompts import VptDeep
from experiments.methods.sensitivity import Scored
from experiments.methods.spt import SptAdapter, SptLora
from experiments.training import sharding
from experiments.training.classification import Classification
from experiments.training.trainer import Data
from snella_jax.models.vit import ViT, ViTConfig

TINY = ViTConfig(
    width=8, depth=2, heads=2, patch_size=4, image_size=8, channels=1, num_classes=3
)
TRANSFORM = Transform((8, 8), mean=(0.5,), std=(0.5,))
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), np.uint8)
SOURCE = Arrays(PIXELS, np.arange(24) % 3)
DATA = Data(SOURCE, None, TRANSFORM, TRANSFORM)
# So few that some matrices are sensitive and some are not.
LOCATED = {"share": 0.2, "ease": 2.0, "rank": 1}
CONFIG = ImageConfig(
    epochs=3,
    warmup_epochs=0,
    settings={
        "spt_lora": SptLora(**LOCATED),
        "spt_adapter": SptAdapter(**LOCATED),
        "vpt_deep": VptDeep(count=2),
    },
)
SUBNET = {"prompts": np.array([2, 1]), "lora": np.array([0, 3]),
          "adapter": np.array([2, 0])}  # fmt: skip
WEIGHTS = 2 * (4 * 8 * 8 + 2 * 8 * 32)  # of the targeted kernels


def base():
    model = ViT(TINY, rngs=nnx.Rngs(0))
    # From a head of 0 nothing behind it would move in the first step.
    model.head.kernel[...] = jax.random.normal(jax.random.key(1), (8, 3))
    return model


def sizes(model):
    return {path: value.size for path, value in leaves(model).items()}


def leaves(model, kind=nnx.Variable):
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {"/".join(map(str, path)): np.array(value[...]) for path, value in flat}


@functools.cache
def scores(rule, targets=CONFIG.targets):
    how = (DATA, Classification(), sharding.make("data=1"), 8, 0)
    return sensitivity.scores(base(), targets, rule, *how)


def adapted(name, config=CONFIG):
    method, scope, own = config.settings[name], config.scope(), base()
    if isinstance(method, Scored):
        places = method.choose(scores(method.rule, config.targets))
        scope = dataclasses.replace(scope, places=places)
    elif isinstance(method, Staged):
        scope = dataclasses.replace(scope, places=SUBNET)
    model = method.adapt(own, scope)
    before = leaves(base())  # nothing happened to what was adapted
    assert all(np.array_equal(before[p], value) for p, value in leaves(own).items())
    return model
