"""The trainer's arithmetic: recipes, accumulation, running means, meshes."""

import contextlib
import dataclasses
import functools
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import snella_jax as snella
from experiments.data.mix import Mix
from experiments.data.source import Arrays
from experiments.data.transforms import Transform
from experiments.methods import lora
from experiments.training import sharding, step
from experiments.training.checkpoints import Checkpoints
from experiments.training.classification import Classification
from experiments.training.competition import Competition
from experiments.training.recipe import Recipe
from experiments.training.rounds import Rounds
from experiments.training.trainer import Data, Trainer
from snella_jax.models.vit import ViT, ViTConfig

TINY = ViTConfig(
    width=8, depth=2, heads=2, patch_size=4, image_size=8, channels=1, num_classes=2
)
TRANSFORM = Transform((8, 8), mean=(0.5,), std=(0.5,))
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), np.uint8)
SOURCE = Arrays(PIXELS, np.arange(24) % 2)
TARGETS = r"blocks/.*/(query|fc1)"  # of every shape one: steps compile faster
RECIPE = Recipe(epochs=2, batch=8, lr=1e-2)
CLASSES = Classification()


def adapted(**options):
    base = ViT(dataclasses.replace(TINY, **options), rngs=nnx.Rngs(0))
    config = snella.SnellaConfig(targets=TARGETS, rank=4, target_density=0.3)
    return snella.adapt(base, config, rngs=nnx.Rngs(1))


@contextlib.contextmanager
def training(recipe=RECIPE, devices="data=1", model=None, mix=None, follow=None):
    model = adapted() if model is None else model
    budgets = any(True for _ in nnx.to_flat_state(nnx.state(model, snella.Budget)))
    weights = snella.adapted_weights(model) if budgets else 1
    config = snella.SnellaConfig(target_density=0.3)
    schedule = functools.partial(config.schedule, weights)
    trainer = Trainer(
        model,
        Data(SOURCE, follow, TRANSFORM, TRANSFORM, mix),
        CLASSES,
        recipe,
        sharding.make(devices),
        watch=(snella.track_importance(),) * budgets,
        competition=Competition(schedule) if budgets else None,
    )
    with contextlib.closing(trainer):
        yield trainer


def run(trainer):
    losses = []
    rows = list(trainer.train(losses.append))
    return rows, losses


@pytest.fixture(scope="module")
def one_device():
    """Rows, losses and weights of whole batches on one device."""
    with training(follow=SOURCE) as trainer:
        rows, losses = run(trainer)
        return rows, losses, leaves(trainer.model)


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


# Recipes


def test_the_rate_rises_falls_and_stays_in_the_cool_down():
    recipe = Recipe(epochs=10, warmup_epochs=2, cooldown_epochs=3, batch=1, lr=1e-3)
    rate = recipe.rate(recipe.rounds(5))
    assert rate(0) == 0 and rate(5) == pytest.approx(5e-4)
    assert rate(10) == pytest.approx(1e-3)
    halfway = (1e-3 + 1e-5) / 2
    assert rate(30) == pytest.approx(halfway, rel=1e-5)
    for update in (50, 55, 64, 65):
        assert rate(update) == pytest.approx(1e-5)
    assert recipe.rounds(5).count == 13


def test_every_k_epochs_and_the_last_ten_are_evaluated():
    recipe = Recipe(epochs=30, cooldown_epochs=5, batch=1, lr=1.0, eval_every=10)
    assert [e for e in range(1, 36) if recipe.evaluates(e, 35)] == [
        10,
        20,
        *range(26, 36),
    ]


def test_what_decays_goes_by_kind_and_path():
    params = {
        "blocks": {"fc1": {"adapter": {n: jnp.ones((1, 2, 2)) for n in ("a", "b")}}},
        "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    }
    params["blocks"]["fc1"]["adapter"]["alpha"] = jnp.ones(())

    def decays(**change):
        recipe = dataclasses.replace(RECIPE, lr=0.5, weight_decay=0.1, **change)
        tx = recipe.optimizer(Rounds(main=2, size=1))

        @jax.jit
        def update(params):
            zeros = jax.tree.map(jnp.zeros_like, params)
            return tx.update(zeros, tx.init(params), params)[0]

        updates = update(params)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
            if (leaf != 0).any()
        }

    factors = {f"blocks/fc1/adapter/{n}" for n in ("a", "b")}
    assert decays() == factors | {"head/kernel"}
    assert decays(no_decay="head/.*") == factors
    assert decays(no_decay=".*/a") == {"blocks/fc1/adapter/b", "head/kernel"}
    with pytest.raises(ValueError, match="no_decay='fc1' matches nothing that decays"):
        decays(no_decay="fc1")


def test_clipping_comes_after_importance():
    recipe = dataclasses.replace(RECIPE, clip=1e-3)
    params = {"a": jnp.ones((1, 2, 2)), "b": jnp.ones((1, 2, 2))}
    grads = jax.tree.map(lambda p: 100 * p, params)
    tx = recipe.optimizer(Rounds(main=2, size=1), snella.track_importance())
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(state[0].sensitivity[""]["a"], 100.0)
    mean = optax.tree.get(state, "mu")["a"]
    assert 0.1 * 1e-3 / np.sqrt(8) == pytest.approx(float(mean[0, 0, 0]), rel=1e-5)


# Steps


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(one_device):
    """Without dropout, to rounding; with an image in every part of every label."""
    expected, losses, weights = one_device
    with training(dataclasses.replace(RECIPE, accumulate=4)) as trainer:
        rows, others = run(trainer)
    np.testing.assert_allclose(others, losses, rtol=1e-4)
    budgets = rows[-1].moved.budgets
    np.testing.assert_allclose(budgets, expected[-1].moved.budgets, atol=2)
    for one, other in zip(leaves(trainer.model), weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-2, atol=2e-4)


def test_soft_labels_are_learnt_as_their_distribution():
    """The loss of a smoothed label is that of the mixture of all labels."""
    images = jax.random.normal(jax.random.key(0), (6, 2))
    kernel = jax.random.normal(jax.random.key(1), (2, 2))

    def loss(labels):
        return stepped(Steep(kernel), images, labels)

    zeros, ones = (loss(jnp.full(6, label, jnp.int32)) for label in (0, 1))
    soft = loss(jnp.tile(jnp.array([0.7, 0.3]), (6, 1)))
    assert float(soft) == pytest.approx(float(0.7 * zeros + 0.3 * ones), rel=1e-5)


def stepped(model, images, labels):
    """The loss that a training step finds."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.adamw(1e-3)
    update = jax.jit(step.training_step(graphdef, tx, CLASSES.loss))
    batch = {"image": images, "label": labels}
    return update(params, tx.init(params), nnx.State({}), rest, batch, KEY)[2]


KEY = jax.random.key(0)


def test_mixed_batches_train(one_device):
    with training(mix=Mix(2, mixup=0.5, cutmix=0.5, smoothing=0.1)) as trainer:
        _, losses = run(trainer)
    assert np.isfinite(losses).all() and losses != one_device[1]
    assert min(losses) > 0.19  # no less than the entropy of a smoothed label


def test_the_running_mean_is_that_of_the_weights_after_every_step():
    recipe = dataclasses.replace(RECIPE, ema=0.9)
    with training(recipe, follow=SOURCE) as trainer:
        expected, after = leaves(trainer.model), []
        losses = trainer.train(lambda _: None)
        inner = trainer.step

        def spy(*arguments):
            state, *numbers = inner(*arguments)
            after.append(jax.tree.map(np.array, jax.tree.leaves(state["trainable"])))
            return state, *numbers

        trainer.step = spy
        rows = list(losses)
        for weights in after:
            pairs = zip(expected, weights, strict=True)
            expected = [0.9 * mean + 0.1 * now for mean, now in pairs]
        assert len(after) == 6
        for got, want in zip(leaves(trainer.ema_model), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert all(0 <= row.ema_metrics["accuracy"] <= 1 for row in rows)


def test_a_loss_is_read_when_the_next_step_is_under_way():
    order = []
    with training() as trainer:
        inner = trainer.step

        def spy(*arguments):
            order.append("begun")
            return inner(*arguments)

        trainer.step = spy
        rows = list(trainer.train(order.append))
    for row, events in zip(rows, (order[:6], order[6:]), strict=True):
        losses = [loss for loss in events if loss != "begun"]
        one, two, three = losses
        assert events == ["begun", "begun", one, "begun", two, three]
        assert row.train_loss == pytest.approx(np.mean(losses))


def test_scores_that_are_not_finite_name_the_step_before_them():
    """Budgets that move in every step see its scores before its loss is read."""
    with training() as trainer:
        trainer.competition = Competition(trainer.competition.schedule, every="step")
        inner, steps = trainer.step, itertools.count(1)

        def spoil(*arguments):
            state, loss, norm = inner(*arguments)
            if next(steps) == 2:
                spoilt = jax.tree.map(lambda x: x + x * jnp.nan, state["opt_state"])
                return {**state, "opt_state": spoilt}, loss * jnp.nan, norm
            return state, loss, norm

        trainer.step = spoil
        with pytest.raises(FloatingPointError, match="at step 2 of epoch 1, on the"):
            run(trainer)


def test_the_callers_model_stays_as_it_was():
    """Steps donate their state; what the caller holds is not the trainer's."""
    base = ViT(TINY, rngs=nnx.Rngs(0))
    model = lora.branched(base, TARGETS, "head|cls_token", 4, nnx.Rngs(1))
    before = leaves(base)
    with training(model=model) as trainer:
        run(trainer)
    for was, now in zip(before, leaves(base), strict=True):
        np.testing.assert_array_equal(was, now)
    assert not np.array_equal(trainer.model.head.kernel[...], base.head.kernel[...])


def test_the_cool_down_keeps_the_budget():
    recipe = Recipe(epochs=3, cooldown_epochs=2, batch=8, lr=1e-2)
    model = adapted()
    weights = snella.adapted_weights(model)
    config = snella.SnellaConfig(target_density=0.3)
    schedule = functools.partial(config.schedule, weights)
    data = Data(SOURCE, None, TRANSFORM, TRANSFORM)
    watch = (snella.track_importance(),)
    one = sharding.make("data=1")
    rules = Competition(schedule)
    how = CLASSES, recipe, one
    trainer = Trainer(model, data, *how, watch=watch, competition=rules)
    with contextlib.closing(trainer):
        rows, _ = run(trainer)
    assert [row.metrics for row in rows] == [{}] * 5
    assert [row.density for row in rows[2:]] == [pytest.approx(0.3, abs=1e-3)] * 3
    assert rows[0].density == 1 and rows[1].density > 0.35
    assert [row.lr for row in rows[2:]] == [pytest.approx(r) for r in RATES]


PLAIN = Recipe(epochs=3, batch=8, lr=1e-2)
RATES = [float(PLAIN.rate(PLAIN.rounds(24))(8)), 1e-4, 1e-4]


def test_a_run_with_everything_goes_on_bit_for_bit(tmp_path):
    """Mixed and accumulated batches, noise, budgets that move in every step, a mesh."""
    recipe = Recipe(epochs=3, batch=8, lr=1e-2, accumulate=2, ema=0.9, clip=1.0)
    data = Data(SOURCE, SOURCE, TRANSFORM, TRANSFORM, Mix(2, mixup=0.5))
    config = snella.SnellaConfig(
        targets=TARGETS, rank=4, path="parallel", dropout=0.2, drop_path=0.2
    )
    base = ViT(dataclasses.replace(TINY, drop_path=0.5), rngs=nnx.Rngs(0))
    weights = snella.adapted_weights(snella.adapt(base, config, rngs=nnx.Rngs(1)))
    schedule = functools.partial(config.schedule, weights)
    rules = Competition(schedule, every="step", floor=0.1, floor_every=2)

    def trained(folder, copied=None):
        """Rows and state; copies what lies there when the second epoch is over."""
        model = snella.adapt(base, config, rngs=nnx.Rngs(1))
        saved = Checkpoints(folder, CLASSES.metrics[0])
        trainer = Trainer(
            model,
            data,
            CLASSES,
            recipe,
            sharding.make("data=2,model=2"),
            watch=(snella.track_importance(),),
            competition=rules,
            checkpoints=saved,
        )
        rows = []
        with contextlib.closing(saved), contextlib.closing(trainer):
            for row in trainer.train(lambda _: None):
                rows.append(dataclasses.replace(row, seconds_per_step=0.0, moved=None))
                if copied and row.number == 2:
                    assert saved.last() == 1  # the second is not saved yet
                    shutil.copytree(folder, copied)
            return rows, jax.tree.map(np.array, jax.tree.leaves(trainer.state))

    whole, expected = trained(tmp_path / "whole", tmp_path / "broken")
    rows, got = trained(tmp_path / "broken")
    assert [row.number for row in rows] == [2, 3] and rows == whole[1:]
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_gradient_too_large_to_be_squared_is_not_finite():
    """AdamW would divide it by the root of infinity, and go on."""
    for scale, finite in ((1e3, True), (1e25, False)):
        images, labels = jnp.full((2, 2), scale), jnp.zeros(2, jnp.int32)
        loss = stepped(Steep(jnp.zeros((2, 2))), images, labels)
        assert np.isfinite(loss) == finite


class Steep(nnx.Module):
    """A head alone, whose gradient is as large as its images."""

    def __init__(self, kernel):
        self.kernel = nnx.Param(kernel)

    def __call__(self, images, key):
        return images @ self.kernel[...]


# Meshes


def assert_numbers(got, losses, one_device):
    (expected, *_), others, _ = one_device
    np.testing.assert_allclose(losses, others, rtol=1e-4)
    assert got.density == expected.density
    assert got.metrics == pytest.approx(expected.metrics, abs=2 / 24)


def test_a_mesh_gives_the_numbers_of_one_device(one_device):
    with training(devices="data=4", follow=SOURCE) as trainer:
        (got, *_), losses = run(trainer)
        assert len(jax.tree.leaves(trainer.state)[0].sharding.device_set) == 4
    assert_numbers(got, losses, one_device)


@pytest.mark.parametrize(
    "mesh, kernel_spec, factor_spec",
    [
        ("data=2,model=2", P(None, None, "tensor"), P(None, None, "tensor")),
        (
            "fsdp=2,tensor=2",
            P(None, "fsdp", "tensor"),
            P(None, None, ("fsdp", "tensor")),
        ),
    ],
)
def test_a_mesh_splits_kernels_and_factors(mesh, kernel_spec, factor_spec, one_device):
    """It gives the numbers of one device, also from accumulated parts."""
    recipe = dataclasses.replace(RECIPE, accumulate=2)
    with training(recipe, mesh, follow=SOURCE) as trainer:
        kernel = trainer.frozen["blocks"]["mlp"]["fc1"]["kernel"][...]
        assert kernel.sharding.spec == kernel_spec
        factor = trainer.state["trainable"]["blocks"]["mlp"]["fc1"]["adapter"]["a"]
        assert factor[...].sharding.spec == factor_spec
        (got, *_), losses = run(trainer)
        assert len(jax.tree.leaves(trainer.state)[0].sharding.device_set) == 4
        assert kernel.sharding.spec == kernel_spec
        assert trainer.step._cache_size() <= 1  # budgets moved, nothing recompiled
    assert_numbers(got, losses, one_device)
