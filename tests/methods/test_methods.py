"""Every method moves what it says and nothing else, and is tested as it was trained."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiled import called
from flax import nnx
from tiny import SOURCE, TRANSFORM, base, leaves, scores, sizes

import snella_jax as snella
from experiments.methods import mosa
from experiments.methods.first_stage import Staged
from experiments.methods.registry import METHODS
from experiments.methods.snella import Klora
from experiments.training import sharding
from experiments.training.classification import Classification
from experiments.training.recipe import Recipe
from experiments.training.trainer import Data, Trainer
from snella_jax import models

# A square and another one: every matrix more is traced again in every method.
TARGETS = r"blocks/(attn/query|mlp/fc1)"
CONFIG = dataclasses.replace(tiny.CONFIG, targets=TARGETS)
WEIGHTS = 2 * (8 * 8 + 8 * 32)
OWN = r"head/(kernel|bias)|cls_token"
FACTORS = rf"{TARGETS}/adapter/(a|b|alpha|beta|piece_coeff)"
BOTTLENECKS = r"blocks/mlp/bottleneck/(down|up)/(kernel|bias)"
EACH = r"blocks/[01]/(attn/query|mlp/fc1)"
TRAINS = {  # all that trains, and nothing else
    "full": r".*",
    "partial1": r"head/(kernel|bias)|norm/(scale|bias)|blocks/1/.*",
    "mlp3": r"head/layers/[012]/(kernel|bias)",
    "bias": rf"{OWN}|.*/bias",
    "ssf": rf"{OWN}|.*/ssf/(scale|shift)",
    "vpt_shallow": rf"{OWN}|prompts",
    "vpt_deep": rf"{OWN}|blocks/prompts",
    "vqt": r"head/(kernel|bias)|blocks/queries",
    "adapter": rf"{OWN}|{BOTTLENECKS}",
    "adaptformer": rf"{OWN}|{BOTTLENECKS}",
    "mosa": rf"{OWN}|{BOTTLENECKS}",
    "spt_adapter": rf"{OWN}|{EACH}/(bottleneck/(down|up)/(kernel|bias)|sparse/values)",
    "spt_lora": rf"{OWN}|{EACH}/(lora/(a|b)|sparse/values)",
    "gps": rf"{OWN}|{TARGETS}/sparse/values",
    "noah": rf"{OWN}|blocks/[01]/prompts|blocks/1/attn/(query|key|value)/lora/(a|b)"
    r"|blocks/0/mlp/bottleneck/(down|up)/(kernel|bias)",
    "dora": rf"{OWN}|{TARGETS}/(magnitude|lora/(a|b))",
    "lora": rf"{OWN}|{TARGETS}/lora/(a|b)",
    "klora": rf"{OWN}|{TARGETS}/adapter/(a|b|piece_coeff)",
    "mixk": rf"{OWN}|{FACTORS}",
    "snell": rf"{OWN}|{TARGETS}/adapter/(a|b|piece_coeff)",
    "snella": rf"{OWN}|{FACTORS}",
    "snella_masked": rf"{OWN}|{TARGETS}/update/(a|b|alpha|beta|piece_coeff)",
    "snella_released": rf"{OWN}|{TARGETS}/adapter/(a|b|alpha|beta|gamma)",
    "snella_plus": rf"{OWN}|{TARGETS}/adapter/(a|b|alpha|piece_coeff)",
}
MOVED = {  # of them, where not all do
    "partial1": WEIGHTS // 2,
    **dict.fromkeys(("mlp3", "bias", "vpt_shallow", "vpt_deep", "vqt"), 0),
    **dict.fromkeys(("adapter", "adaptformer", "mosa"), 0),
    "gps": 2 * (8 + 32),
    "noah": 8 * 8,
    **dict.fromkeys(
        ("snell", "snella", "snella_masked", "snella_released", "snella_plus"),
        0.3 * WEIGHTS,
    ),
}


# Attention ignores what is added to all keys alike.
UNMOVED = r"blocks/attn/key/(bias|ssf/shift)"


@functools.cache
def trained(name):
    """The adapted model before and after three epochs, and the epochs."""
    method, model = CONFIG.settings[name], tiny.adapted(name, CONFIG)
    trainer = Trainer(
        model,
        Data(SOURCE, None, TRANSFORM, TRANSFORM),
        Classification(),
        Recipe(epochs=3, batch=8, lr=3e-2),
        sharding.make("data=1"),
        watch=method.watch(),
        competition=method.competition(model, CONFIG.scope()),
    )
    with contextlib.closing(trainer):
        rows = list(trainer.train(lambda _: None))
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
        elif not (counts and CONFIG.settings[name].watch()):
            assert same, path
    plain = base() if before.config.stacked else models.unstack(base())
    kept = leaves(plain).keys() & every.keys() - trains
    assert kept or name == "full"
    for path in kept:  # the base's, not others
        np.testing.assert_array_equal(leaves(plain)[path], every[path])


@pytest.mark.parametrize("name", TRAINS)
def test_what_is_tested_computes_what_was_trained(name):
    """And the weights that moved are counted."""
    method = METHODS[name]
    _, after, rows = trained(name)
    after = nnx.clone(after)
    after.eval()
    merged = method.merged(after)
    images = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    logits = called(merged, images), called(after, images)
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)
    moved = method.moved(base(), merged, CONFIG.scope())
    if name in ("spt_lora", "spt_adapter"):  # what was located
        structured, single = (
            sum(size for path, size in sizes(after).items() if part in path)
            for part in ("lora/", "sparse/values")
        )
        assert structured > 0 if name == "spt_lora" else moved == single
        assert 0 < single <= moved < WEIGHTS
    else:
        expected = MOVED.get(name, WEIGHTS)
        assert expected * 0.98 <= moved <= expected + 1
    densities = [row.density for row in rows]
    if name in ("snella", "snella_released", "snella_plus"):
        assert densities[0] == 1 and densities[-1] == pytest.approx(0.3, abs=1e-3)
    elif name == "snell":
        assert densities == [pytest.approx(0.3, abs=1e-3)] * 3
    elif name in ("klora", "mixk"):
        assert densities == [1.0] * 3
    else:
        assert densities == [None] * 3


ELSEWHERE = {"ssf", "vpt_shallow", "vpt_deep", "vqt", "mlp3", "noah", "klora", "mixk",
             "snell", "snella", "snella_masked", "snella_released"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TRAINS.keys() - ELSEWHERE))
def test_training_starts_at_the_base(name):
    images = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    model = tiny.adapted(name, CONFIG)
    logits = called(model, images), called(base(), images)
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


def test_masked_weights_move_by_the_kernel_alone():
    """In NumPy's float64, from the factors after training."""
    before, after, _ = trained("snella_masked")
    merged, was = leaves(METHODS["snella_masked"].merged(after)), leaves(before)
    now = {path: np.float64(value) for path, value in leaves(after).items()}
    share = 0
    for path in was:
        if not path.endswith("update/mask"):
            continue
        layer, mask = path.removesuffix("/update/mask"), was[path]
        a, b, coeff, alpha, beta = (
            now[f"{layer}/update/{name}"]
            for name in ("a", "b", "piece_coeff", "alpha", "beta")
        )
        apart = np.linalg.norm(a[:, :, :, None] - b[:, :, None], axis=-1)
        kappa = np.einsum("lp,lpnm->lnm", coeff, apart)
        powers = np.exp(kappa - kappa.max(2, keepdims=True))
        soft = powers / powers.sum(2, keepdims=True)
        delta = kappa + alpha[:, None, None] * soft + beta[:, None, None]
        kernel = f"{layer}/kernel"
        expected = was[kernel] + mask * delta
        np.testing.assert_allclose(merged[kernel], expected, rtol=1e-4, atol=1e-6)
        share += mask.sum() / WEIGHTS
    assert share == pytest.approx(0.3, abs=1e-3)


def test_snell_gives_every_matrix_the_same_share():
    model = METHODS["snell"].adapt(base(), CONFIG.scope())
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
    config = CONFIG.with_settings(klora=Klora(rank=4))
    model = config.settings["klora"].adapt(base(), config.scope())
    assert model.blocks.mlp.fc1.adapter.a.shape == (2, 2, 8, 2)
    other = config.settings["mixk"].adapt(base(), config.scope())
    assert other.blocks.mlp.fc1.adapter.rule.rank == 8
    assert jnp.isfinite(model(jnp.zeros((1, 8, 8, 1)))).all()


def test_the_parts_of_an_adapter_are_equal_and_take_turns():
    model = tiny.adapted("mosa")
    bottleneck = model.blocks.mlp.bottleneck
    parts = np.asarray(bottleneck.part[...])
    assert [(parts[block] == p).sum() for block in (0, 1) for p in range(4)] == [16] * 8
    assert (parts[0] != parts[1]).any()
    bottleneck.up.kernel[...] = jnp.ones((2, 8, 8))
    images = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    whole = model(images)
    outputs = [model(images, jax.random.key(seed)) for seed in range(4)]
    assert len({out.tobytes() for out in map(np.asarray, outputs)}) > 1
    np.testing.assert_array_equal(model(images), whole)  # nothing of a draw stays
    hidden = jax.random.normal(jax.random.key(4), (1, 3, 8))
    one = nnx.merge(*_first(bottleneck))
    outputs = []
    for part in range(4):
        one.active[...] = jnp.int32(part)
        outputs.append(one(hidden, jax.nn.relu))
    one.active[...] = jnp.int32(mosa.WHOLE)
    mean = sum(outputs) / 4
    np.testing.assert_allclose(mean, one(hidden, jax.nn.relu), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"mosa\.parts=1"):
        mosa.Mosa(parts=1).check("mosa")


def _first(stacked):
    graphdef, state = nnx.split(stacked)
    return graphdef, jax.tree.map(lambda leaf: leaf[0], state)


def test_targets_may_name_stacked_blocks_alone():
    """Those of a list have other paths; what is counted is the same."""
    config = dataclasses.replace(CONFIG, targets=r"blocks/attn/(query|value)")
    for name in ("partial1", "spt_lora"):
        method, scope = config.settings[name], config.scope()
        own = {path: s for path, s in scores("squares").items()
               if re.fullmatch(config.targets, path)}  # fmt: skip
        if isinstance(method, Staged):
            scope = dataclasses.replace(scope, places=method.choose(own))
        merged = method.merged(method.adapt(base(), scope))
        assert method.moved(base(), merged, scope) == 0
