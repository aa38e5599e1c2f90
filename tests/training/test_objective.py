"""Objectives: one without labels, through the trainer, and classification."""

import contextlib
import functools
import itertools
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from flax import nnx
from pixels import SIDE, Nearest, Pictures, PixelNet, Regression, resized

import snella_jax as snella
from experiments.data.source import Arrays
from experiments.reports import figures
from experiments.training import evaluation, sharding
from experiments.training.checkpoints import Checkpoints
from experiments.training.classification import Classification
from experiments.training.competition import Competition
from experiments.training.objective import followed
from experiments.training.recipe import Recipe
from experiments.training.step import training_step
from experiments.training.trainer import Data, Trainer

# Three updates an epoch: every round ends in the midst of one.
RECIPE = Recipe(epochs=1, steps=10, round_steps=4, batch=2, lr=1e-2)
FOLLOWED = Pictures(5, seed=1)
CONFIG = snella.SnellaConfig(
    targets="stem|body", trainable="head", rank=2, target_density=0.25
)


@contextlib.contextmanager
def training(folder):
    """A trainer of regression with SNELLA that goes on where `folder` is."""
    objective, model = Regression(), PixelNet(nnx.Rngs(0))
    model = snella.adapt(model, CONFIG, rngs=nnx.Rngs(1))
    schedule = functools.partial(CONFIG.schedule, snella.adapted_weights(model))
    with contextlib.closing(Checkpoints(folder, objective.metrics[0])) as saved:
        trainer = Trainer(
            model,
            Data(Pictures(7, seed=0), FOLLOWED, Nearest(), Nearest()),
            objective,
            RECIPE,
            sharding.make("data=2"),
            watch=(snella.track_importance(),),
            competition=Competition(schedule),
            checkpoints=saved,
        )
        with contextlib.closing(trainer):
            yield trainer


def trained(folder, rounds=None):
    """Rounds, the final state and, of each round, the errors by NumPy."""
    with training(folder) as trainer:
        rows, errors = [], []
        for row in itertools.islice(trainer.train(lambda _: None), rounds):
            rows.append(row)
            errors.append(errors_of(trainer.model))
        state = jax.tree.map(np.array, jax.tree.leaves(trainer.state))
        best = trainer.best_model() if rounds is None else None
        return rows, state, errors, best


def errors_of(model):
    """Both metrics in float64, an example at a time."""
    merged = snella.merge(model, unmoved_budgets=True)
    layers = [
        [np.float64(x[...]) for x in (layer.kernel, layer.bias)]
        for layer in (merged.stem, merged.body, merged.head)
    ]
    errors, squares = [], []
    for index in range(len(FOLLOWED)):
        example = FOLLOWED[index]
        x = resized(example["image"], (SIDE, SIDE))[..., None]
        for kernel, bias in layers[:-1]:
            x = np.maximum(x @ kernel + bias, 0)
        kernel, bias = layers[-1]
        found = (x @ kernel + bias)[..., 0]
        target = resized(example["target"], (SIDE, SIDE))
        squares.append(np.mean((found - target) ** 2))
        whole = resized(found, example["target"].shape)
        errors.append(np.mean(np.abs(whole - example["target"])))
    return {"error": np.mean(errors), "mse": np.mean(squares)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole"))


def test_an_objective_without_labels_is_measured_as_numpy_measures_it(whole):
    """Five examples on two devices: one that fills the batch does not count."""
    rows, _, errors, _ = whole
    assert [row.updates for row in rows] == [4, 8, 10]
    for row, expected in zip(rows, errors, strict=True):
        assert row.metrics == pytest.approx(expected, rel=1e-4)
    assert rows[-1].metrics["mse"] < rows[0].metrics["mse"]


def test_the_budget_of_a_round_is_that_of_eq_12(whole):
    """It counts rounds: t = 0, 1, 2 of T = 2."""
    rows, *_ = whole
    expected = [0.25 + (1 - t / 2) ** 3 * 0.75 for t in range(3)]
    assert [row.density for row in rows] == pytest.approx(expected, abs=0.01)
    assert [row.moves for row in rows] == [0, 1, 1]


def test_the_best_round_is_that_of_the_least_error(whole):
    rows, _, errors, (number, model) = whole
    every = [row.metrics["error"] for row in rows]
    assert number == 1 + int(np.argmin(every))
    assert errors_of(model) == pytest.approx(errors[number - 1])


def test_a_run_goes_on_in_the_midst_of_an_epoch_bit_for_bit(whole, tmp_path):
    """Killed twice, when the round after the first, or second, was not yet saved."""
    rows, state, *_ = whole
    for rounds in (2, 2, None):
        some, now, *_ = trained(tmp_path, rounds)
        for row in some:
            same = rows[row.number - 1]
            assert (row.train_loss, row.metrics) == (same.train_loss, same.metrics)
    assert [row.number for row in some] == [3]
    for one, other in zip(now, state, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("devices", ["data=1", "data=4", "data=2,model=2"])
def test_every_example_is_scored_once_on_any_mesh(devices):
    """Also where devices have copies; two of four have nothing but fillers."""
    seen, inner = [], Regression.score

    class Noted(Regression):
        def score(self, example, output):
            seen.append(example["target"].shape)
            return inner(self, example, output)

    source, model = Pictures(2, seed=1), PixelNet(nnx.Rngs(0))
    mesh = sharding.make(devices)
    found = evaluation.evaluate(model, source, Nearest(), mesh, Noted(), show=1)
    assert seen == [source[i]["target"].shape for i in range(2)]
    one = evaluation.evaluate(
        model, source, Nearest(), sharding.make("data=1"), Regression()
    )
    assert found.metrics == pytest.approx(one.metrics, rel=1e-5) and not one.shown
    ((index, output),) = found.shown
    image = resized(source[0]["image"], (SIDE, SIDE))
    assert index == 0
    np.testing.assert_allclose(output["pixels"], model(image), rtol=1e-4, atol=1e-6)


def test_sums_of_hosts_are_added_by_name(monkeypatch):
    """Two processes are added up, one of which had no example."""
    mine = {"dice": 0.1 + 0.2, "pixels": 7}
    text = np.frombuffer(json.dumps({}).encode(), np.uint8)

    def gather(value):
        value = np.asarray(value)
        other = np.int32(len(text)) if value.ndim == 0 else np.zeros_like(value)
        if value.ndim:
            other[: len(text)] = text
        return np.stack([value, other])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(evaluation.multihost_utils, "process_allgather", gather)
    assert evaluation._over_processes(mine) == mine


# Importance


class Bilinear(nnx.Module):
    """Predicts x a b^T: one matrix of rank 2, with factors as an adapter has them."""

    def __init__(self, a, b):
        self.a, self.b = nnx.Param(a), nnx.Param(b)

    def __call__(self, x):
        return x @ self.a[0] @ self.b[0].T


def test_importance_sees_the_mean_gradient_of_an_update():
    """Three micro-batches give |theta * gradient| (Eq. 7) at the first step."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1, 4, 2)), rng.normal(size=(1, 3, 2))
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))

    def loss(model, batch, key):
        return jnp.square(model(batch["x"]) - batch["y"]).sum(-1).mean()

    model = Bilinear(*(jnp.asarray(f, jnp.float32) for f in (a, b)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.chain(snella.track_importance(), optax.sgd(1.0))
    step = jax.jit(training_step(graphdef, tx, loss, accumulate=3))
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    new, state, _ = step(
        params, tx.init(params), nnx.State({}), rest, batch, jax.random.key(0)
    )
    off = 2 * (x @ a[0] @ b[0].T - y) / len(x)  # of the loss, by the prediction
    grads = {"a": (x.T @ off @ b[0])[None], "b": (off.T @ x @ a[0])[None]}
    for name, theta in (("a", a), ("b", b)):
        seen = state[0].sensitivity[""][name]
        np.testing.assert_allclose(seen, np.abs(theta * grads[name]), rtol=1e-4)
        np.testing.assert_allclose(
            new[name][...], theta - grads[name], rtol=1e-4, atol=1e-5
        )


# Pictures


def test_a_predicted_class_stands_above_its_image(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), np.uint8)
    source, objective = Arrays(images, np.array([0, 1, 2])), Classification(("a", "b"))
    figure, axes = plt.subplots(1, 3)
    for one, (index, output) in zip(axes, enumerate([0, 0, 2]), strict=True):
        objective.draw(one, source[index], np.int32(output))
    assert [one.get_title() for one in axes] == ["a", "a\n(is b)", "2"]
    np.testing.assert_array_equal(axes[1].images[0].get_array(), images[1])
    plt.close(figure)
    outputs = [(0, np.int32(0)), (2, np.int32(1))]
    for name in ("one.png", "other.png"):
        figures.predictions(tmp_path / name, objective, source, outputs)
    one, other = ((tmp_path / n).read_bytes() for n in ("one.png", "other.png"))
    assert one == other and one[1:4] == b"PNG"


def test_a_host_stage_adds_to_the_sums_of_the_devices():
    """2.5 of the devices and 1 of the example that is valid."""
    objective: Any = SimpleNamespace(
        score=lambda example, output: {"hits": 1.0}, numbers=dict
    )
    batch = {"index": jnp.arange(2), "valid": jnp.array([True, False])}

    def measure(states, batch):
        return {"hits": jnp.float32(2.5)}, {"y": jnp.zeros(2)}

    found = evaluation.measured(measure, (), [0, 1], [batch], objective)
    assert found == {"hits": 3.5}


def test_an_objective_without_a_metric_is_refused():
    class Nothing(Regression):
        metrics = ()

    with pytest.raises(ValueError, match="Nothing has no metrics: expected at least"):
        followed(Nothing())
