"""Every method moves what it says and nothing else, and is tested as it was trained."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snella_jax as snella
from experiments import mesh, train
from experiments.config import RunConfig
from experiments.data.source import Arrays
from experiments.data.transforms import Transform
from experiments.methods.trained import METHODS
from experiments.recipe import Recipe
from snella_jax.models.vit import ViT, ViTConfig

TINY = ViTConfig(
    width=8, depth=2, heads=2, patch_size=4, image_size=8, channels=1, num_classes=3
)
TRANSFORM = Transform((8, 8), mean=(0.5,), std=(0.5,))
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), np.uint8)
SOURCE = Arrays(PIXELS, np.arange(24) % 3)
CONFIG = RunConfig(epochs=3, warmup_epochs=0)
TARGETS = r"blocks/(attn|mlp)/(query|key|value|out|fc1|fc2)"
OWN = r"head/(kernel|bias)|cls_token"
FACTORS = rf"{TARGETS}/adapter/(a|b|alpha|beta|piece_coeff)"
TRAINS = {  # all that trains, and nothing else
    "full": r".*",
    "bias": rf"{OWN}|.*/bias",
    "ssf": rf"{OWN}|.*/ssf/(scale|shift)",
    "adapter": rf"{OWN}|blocks/mlp/bottleneck/(down|up)/(kernel|bias)",
    "adaptformer": rf"{OWN}|blocks/mlp/bottleneck/(down|up)/(kernel|bias)",
    "dora": rf"{OWN}|{TARGETS}/(magnitude|lora/(a|b))",
    "lora": rf"{OWN}|{TARGETS}/lora/(a|b)",
    "klora": rf"{OWN}|{TARGETS}/adapter/(a|b|piece_coeff)",
    "mixk": rf"{OWN}|{FACTORS}",
    "snell": rf"{OWN}|{TARGETS}/adapter/(a|b|piece_coeff)",
    "snella": rf"{OWN}|{FACTORS}",
}


# Attention ignores what is added to all keys alike.
UNMOVED = r"blocks/attn/key/(bias|ssf/shift)"


def base():
    model = ViT(TINY, rngs=nnx.Rngs(0))
    # From a head of 0 nothing behind it would move in the first step.
    model.head.kernel[...] = jax.random.normal(jax.random.key(1), (8, 3))
    return model


def leaves(model, kind=nnx.Variable):
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {"/".join(map(str, path)): np.array(value[...]) for path, value in flat}


@functools.cache
def trained(name):
    """The adapted model before and after three epochs, and the epochs."""
    method, model = METHODS[name], METHODS[name].adapt(CONFIG, base())
    trainer = train.Trainer(
        model,
        train.Data(SOURCE, None, TRANSFORM, TRANSFORM),
        Recipe(epochs=3, batch=8, lr=3e-2),
        mesh.make("data=1"),
        watch=method.watch(CONFIG),
        schedule=method.schedule(CONFIG, model),
    )
    with contextlib.closing(trainer):
        rows = list(trainer.epochs(lambda _: None))
        return model, trainer.model, rows


def test_every_method_is_here():
    assert TRAINS.keys() == METHODS.keys()


@pytest.mark.parametrize("name", TRAINS)
def test_what_trains_moves_and_all_else_is_bit_identical(name):
    before, after, rows = trained(name)
    assert rows[-1].train_loss < rows[0].train_loss
    trains = set(leaves(before, nnx.Param))
    every = leaves(before)
    assert trains == {path for path in every if re.fullmatch(TRAINS[name], path)}
    now = leaves(after)
    for path, was in every.items():
        same = np.array_equal(was, now[path])
        counts = path.rsplit("/", 1)[-1] in ("budget", "allocated_at")
        if path in trains:
            # attention ignores what is added to all keys alike
            assert not same or re.fullmatch(UNMOVED, path), path
        elif not (counts and METHODS[name].schedule(CONFIG, before)):
            assert same, path
    for path, was in leaves(base()).items():  # the caller's weights are no others
        if path in every and path not in trains:
            np.testing.assert_array_equal(was, every[path])


@pytest.mark.parametrize("name", TRAINS)
def test_what_is_tested_computes_what_was_trained(name):
    """And the weights that moved are counted."""
    method = METHODS[name]
    _, after, rows = trained(name)
    merged = method.merged(after)
    images = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    np.testing.assert_allclose(merged(images), after(images), rtol=1e-4, atol=1e-5)
    moved = method.moved(CONFIG, base(), after, merged)
    weights = 2 * (4 * 8 * 8 + 2 * 8 * 32)
    none = dict.fromkeys(("bias", "adapter", "adaptformer"), 0.0)
    share = {**none, "snell": 0.3, "snella": 0.3}.get(name, 1.0)
    assert share * weights * 0.98 <= moved <= share * weights + 1
    densities = [row.density for row in rows]
    if name == "snella":
        assert densities[0] == 1 and densities[-1] == pytest.approx(0.3, abs=1e-3)
    elif name == "snell":
        assert densities == [pytest.approx(0.3, abs=1e-3)] * 3
    elif name in ("klora", "mixk"):
        assert densities == [1.0] * 3
    else:
        assert densities == [None] * 3


@pytest.mark.parametrize(
    "name", ["full", "bias", "adapter", "adaptformer", "lora", "dora"]
)
def test_training_starts_at_the_base(name):
    images = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    model = METHODS[name].adapt(CONFIG, base())
    np.testing.assert_allclose(model(images), base()(images), rtol=1e-4, atol=1e-5)


def test_snell_gives_every_matrix_the_same_share():
    model = METHODS["snell"].adapt(CONFIG, base())
    budgets = leaves(model, snella.Budget)
    shares = {
        path: budgets[path] / size
        for path, size in (
            ("blocks/attn/query/adapter/budget", 64),
            ("blocks/mlp/fc1/adapter/budget", 256),
        )
    }
    for share in shares.values():
        np.testing.assert_allclose(share, 0.3, atol=1 / 64)


def test_settings_of_a_method_are_its_own():
    changed = dataclasses.replace(CONFIG.klora, rank=4)
    config = dataclasses.replace(CONFIG, klora=changed)
    model = METHODS["klora"].adapt(config, base())
    assert model.blocks.mlp.fc1.adapter.a.shape == (2, 2, 8, 2)
    assert METHODS["mixk"].adapt(config, base()).blocks.mlp.fc1.adapter.rule.rank == 8
    assert jnp.isfinite(model(jnp.zeros((1, 8, 8, 1)))).all()
