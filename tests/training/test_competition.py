"""When budgets move, by which scores, and what a round leaves behind."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import snella_jax as snella
from experiments.config.images import ImageConfig
from experiments.data.source import Arrays
from experiments.data.transforms import Transform
from experiments.methods.snella import Snella
from experiments.training import sharding
from experiments.training.classification import Classification
from experiments.training.competition import Competition, agreement
from experiments.training.recipe import Recipe
from experiments.training.rounds import Rounds
from experiments.training.trainer import Data, Trainer
from snella_jax.models.vit import ViT, ViTConfig
from snella_jax.nnx.selection import weights_of

TINY = ViTConfig(
    width=8, depth=2, heads=2, patch_size=4, image_size=8, channels=1, num_classes=2
)
TRANSFORM = Transform((8, 8), mean=(0.5,), std=(0.5,))
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), np.uint8)
SOURCE = Arrays(PIXELS, np.arange(24) % 2)
TARGETS = r"blocks/.*/(query|fc1)"  # of every shape one: steps compile faster
EPOCHS = 4


def trained(epochs=EPOCHS, **changes):
    """Epochs, model and opt_state of a tiny model, trained with some settings."""
    own = dataclasses.replace(Snella(lr=1e-2, rank=4), **changes)
    how = {"epochs": epochs, "warmup_epochs": 0, "batch": 8, "targets": TARGETS}
    config = ImageConfig(**how, settings={"snella": own})
    base = ViT(TINY, rngs=nnx.Rngs(0))
    base.head.kernel[...] = jax.random.normal(jax.random.key(1), (8, 2))
    model = own.adapt(base, config.scope())
    rules = own.competition(model, config.scope())
    trainer = Trainer(
        model,
        Data(SOURCE, None, TRANSFORM, TRANSFORM),
        Classification(),
        config.recipe("snella"),
        sharding.make("data=1"),
        watch=own.watch(),
        competition=rules,
    )
    with contextlib.closing(trainer):
        rows = list(trainer.train(lambda _: None))
        return rows, trainer.model, trainer.state["opt_state"]


def budgets(model):
    flat = nnx.to_flat_state(nnx.state(model, snella.Budget))
    return {path: np.asarray(v[...]) for path, v in flat if path[-1] == "budget"}


def leaves(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


def test_budgets_move_between_epochs_or_steps():
    """Three steps an epoch; the same total at the end of both."""
    by_epoch, by_step = (trained(every=every)[0] for every in ("epoch", "step"))
    assert [row.moves for row in by_epoch] == [0, 1, 1, 1]
    assert [row.moves for row in by_step] == [2, 3, 3, 3]
    assert by_epoch[-1].density == by_step[-1].density == pytest.approx(0.3, abs=1e-3)
    # Within the second epoch the schedule has gone on by two thirds of an epoch.
    share = (1 - (1 + 2 / 3) / (EPOCHS - 1)) ** 3
    assert by_step[1].density == pytest.approx(0.3 + 0.7 * share, abs=1e-3)
    assert by_epoch[1].density == pytest.approx(0.3 + 0.7 * (2 / 3) ** 3, abs=1e-3)


def test_settled_budgets_wait_for_the_ranking():
    """With an impossible correlation they move once, before the last epoch."""
    never, always = (
        trained(every="settled", settled=settled, beta1=0.0)[0] for settled in (2, -1)
    )
    assert [row.moves for row in never] == [0, 0, 0, 1]
    assert [row.density for row in never][-1] == pytest.approx(0.3, abs=1e-3)
    # A window of one step: each but the first of an epoch has one to compare with.
    assert [row.moves for row in always] == [1, 2, 2, 3]


def test_a_round_compares_scores_a_window_apart(monkeypatch):
    calls = []

    def reallocate(budgets, opt_state, total, scores, floor):
        calls.append((total, floor))
        return budgets, None

    monkeypatch.setattr(snella, "reallocate", reallocate)
    scores = iter(
        [{"w": np.array(values)} for values in ([1.0, 2, 3], [3.0, 2, 1], [4.0, 3, 2])]
    )
    monkeypatch.setattr(snella, "importance", lambda opt_state: next(scores))

    def schedule(steps, cooldown):
        assert (steps, cooldown) == (3, 0)
        return lambda t: round(100 * t)

    rules = Competition(schedule, every="settled", window=5)
    moves = rules.begin(1, Rounds(main=60, size=20))
    for step in range(15):
        moves.before(step, None, None, lambda: None)
    assert calls == [(150, 0.0)] and moves.count == 1  # at step 10: the second pair


def test_agreement_is_a_rank_correlation():
    one = {"a": np.array([1.0, 2.0]), "b": np.array(3.0)}
    assert agreement(one, one) == 1
    other = {"a": np.array([5.0, 9.0]), "b": np.array(7.0)}
    assert agreement(one, other) == pytest.approx(0.5)  # 1 - 6 * 2 / (3 * 8)
    assert agreement(one, {"a": np.array([9.0, 5.0]), "b": np.array(1.0)}) == -1
    flat = {"a": np.zeros(2), "b": np.zeros(())}
    assert agreement(flat, flat) == 1 and agreement(one, flat) == 0


def test_matrices_compete_by_the_metric():
    """The last budgets are those of the scores at the last move, which differ."""
    metrics = ("sensitivity", "magnitude", "merged_magnitude")
    found = [trained(metric=metric, epochs=2)[0][-1].moved for metric in metrics]
    for moved in found:
        expected = snella.allocate(moved.scores, moved.budgets.sum(), moved.capacities)
        np.testing.assert_array_equal(moved.budgets, expected)
    for one, other in itertools.combinations(found, 2):
        assert not np.isclose(one.scores, other.scores, rtol=0.1).any()


def test_the_merged_magnitude_is_that_of_the_update():
    _, model, opt_state = trained(epochs=2)
    rules = Competition(None, metric="merged_magnitude", exponent=0.5)
    scores = rules.scores(opt_state, lambda: model)
    for weight in weights_of(model):
        expected = np.abs(np.asarray(weight.delta(), np.float64)).mean((-2, -1))
        found = scores[f"{weight.path}/adapter"]
        np.testing.assert_allclose(found, expected**0.5, rtol=1e-5)


def test_a_floor_keeps_matrices_alive():
    rows, model, _ = trained(floor=1.0)
    for values in budgets(model).values():
        assert values.min() > 0
    moved = rows[-1].moved
    np.testing.assert_allclose(moved.budgets / moved.capacities, 0.3, atol=0.02)


def test_a_floor_now_and_then_revives():
    """In epoch 2 (from 0) all have some; in the last the scores alone decide."""
    rows, _, _ = trained(floor=0.5, floor_every=2, target_density=0.02)
    free, plain = rows[2].moved, rows[3].moved
    even = 0.5 * free.budgets.sum() * free.capacities / free.capacities.sum()
    assert (free.budgets >= np.floor(even)).all()
    expected = snella.allocate(plain.scores, plain.budgets.sum(), plain.capacities)
    np.testing.assert_array_equal(plain.budgets, expected)


def test_beta_has_a_rate_of_its_own():
    """It starts at 0."""
    one, tenth, frozen = (
        leaves(trained(epochs=1, target_density=1.0, beta_rate=rate)[1])
        for rate in (1.0, 0.1, 0.0)
    )
    betas = [path for path in one if path.endswith("beta")]
    assert betas
    for path in betas:
        assert not frozen[path].any()
        ratio = np.abs(tenth[path] / one[path])
        assert ((ratio > 0.03) & (ratio < 0.3)).all()


def test_rates_scale_what_a_regex_matches():
    recipe = Recipe(epochs=2, batch=1, lr=0.5, rates=(("x/beta", 0.25), (".*/z", 0.0)))
    params = {"x": {"beta": jnp.ones(3), "alpha": jnp.ones(3)}, "y": {"z": jnp.ones(3)}}
    one = Rounds(main=2, size=1)
    tx = recipe.optimizer(one)
    updates, _ = tx.update(params, tx.init(params), params)
    plain = dataclasses.replace(recipe, rates=()).optimizer(one)
    expected, _ = plain.update(params, plain.init(params), params)
    np.testing.assert_allclose(updates["x"]["beta"], 0.25 * expected["x"]["beta"])
    np.testing.assert_array_equal(updates["x"]["alpha"], expected["x"]["alpha"])
    assert not updates["y"]["z"].any() and expected["y"]["z"].all()


def test_the_gradient_norm_is_that_of_the_factors():
    """Checked by hand at the factors' start, in an epoch of one step."""
    base = ViT(TINY, rngs=nnx.Rngs(0))
    base.head.kernel[...] = jax.random.normal(jax.random.key(1), (8, 2))
    config = snella.SnellaConfig(targets=TARGETS, rank=4, target_density=1.0)
    for model in (snella.adapt(base, config, rngs=nnx.Rngs(1)), base):
        trainer = Trainer(
            model,
            Data(SOURCE, None, TRANSFORM, TRANSFORM),
            Classification(),
            Recipe(epochs=1, batch=24, lr=1e-3),
            sharding.make("data=1"),
        )
        with contextlib.closing(trainer):
            (row,) = trainer.train(lambda _: None)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        images = np.stack([TRANSFORM(x, np.random.default_rng(0)) for x in PIXELS])

        def loss(params, images, graphdef, rest):
            logits = nnx.merge(graphdef, params, rest)(images)
            labels = jnp.arange(24) % 2
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return each.mean()

        gradient = jax.jit(jax.grad(loss), static_argnums=2)
        grads = nnx.to_flat_state(gradient(params, images, graphdef, rest))
        own = [
            np.asarray(leaf[...])
            for path, leaf in grads
            if model is base or path[-2:] in (("adapter", "a"), ("adapter", "b"))
        ]
        assert own
        norm = np.sqrt(sum(np.square(leaf).sum() for leaf in own))
        assert row.gradient_norm == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beta_rate": -1.0}, "beta_rate=-1.0: expected at least 0"),
        ({"beta_rate": 0.0, "kernel": "rbf"}, "kernel=rbf, centred=none has no beta"),
        ({"floor": 1.5}, "floor=1.5"),
        ({"exponent": -1.0}, "exponent=-1.0"),
        ({"settled": 2.0}, "settled=2.0: expected -1 to 1"),
        ({"floor_every": 0}, "floor_every=0: expected at least 1"),
        ({"pieces": 3}, "rank=8 is not a positive multiple of pieces=3"),
        ({"pieces": 4, "kernel": "rbf"}, "kernel=rbf has no pieces"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    own = dataclasses.replace(Snella(), **changes)
    with pytest.raises(ValueError, match=message):
        ImageConfig(methods=("snella",), settings={"snella": own}).check()
