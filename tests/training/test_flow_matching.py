"""The loss of flow matching by hand, its gradient by differences, and what it draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments.training import flow_matching
from experiments.training.flow_matching import FlowMatching
from snella_jax.models.sd3 import flow

RNG = np.random.default_rng


def arrays(seed, *shapes):
    rng = RNG(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def batch_of(count, seed=0, **more):
    mean, logvar, context, pooled = arrays(
        seed, (count, 2, 3, 4), (count, 2, 3, 4), (count, 5, 6), (count, 7)
    )
    return {"mean": mean, "logvar": logvar, "context": context, "pooled": pooled} | more


def velocity(x, time, context, pooled):
    """A model that all of its inputs matter to."""
    text = context.mean((1, 2)) + pooled.mean(1)
    return 0.5 * x + (time / 1000 + text)[:, None, None, None]


# Levels of the table: index i is sigma = 3 s / (1 + 2 s) at s = 1 - i / 1000.
@pytest.mark.parametrize(("index", "sigma"), [(0, 1.0), (500, 0.75), (900, 0.25)])
@pytest.mark.parametrize("precondition", [True, False])
def test_the_loss_by_hand_at_a_noise_level(index, sigma, precondition):
    x0, noise, context, pooled = arrays(
        0, (2, 2, 3, 4), (2, 2, 3, 4), (2, 5, 6), (2, 7)
    )
    found = FlowMatching(precondition=precondition).errors(
        velocity, x0, noise, np.array([index, index]), context, pooled
    )
    for row in range(2):
        x = np.float64(x0[row]) * (1 - sigma) + sigma * np.float64(noise[row])
        v = 0.5 * x + sigma + np.float64(context[row]).mean() + pooled[row].mean()
        if precondition:  # the picture that the velocity leads to
            error = np.mean((x - sigma * v - x0[row]) ** 2)
        else:
            error = np.mean((v - (np.float64(noise[row]) - x0[row])) ** 2)
        assert found[row] == pytest.approx(error, rel=1e-5)


def test_levels_are_logit_normal_and_begin_with_pure_noise():
    index = np.asarray(flow_matching.levels(jax.random.key(0), 20_000))
    assert index.min() >= 0 and index.max() <= 999
    logits = np.log((index + 0.5) / 1000) - np.log1p(-(index + 0.5) / 1000)
    assert stats.kstest(logits, "norm").pvalue > 0.01
    sigmas = flow.training_sigmas()[index]
    assert np.median(sigmas) == pytest.approx(0.75, abs=0.01)
    assert flow.training_sigmas()[0] == 1.0


def test_latents_are_drawn_anew_from_their_moments_then_shifted_and_scaled():
    objective = FlowMatching(scale=1.5305, shift=0.0609)
    mean, logvar = arrays(1, (1, 1, 1, 2), (1, 1, 1, 2))
    keys = jax.random.split(jax.random.key(0), 4000)
    batch = {"mean": jnp.asarray(mean), "logvar": jnp.asarray(logvar)}
    drawn = np.asarray(jax.vmap(lambda key: objective.latents(batch, key))(keys))
    expected = (mean - 0.0609) * 1.5305
    deviation = 1.5305 * np.exp(logvar / 2)
    np.testing.assert_allclose(drawn.mean(0), expected, atol=4 * deviation.max() / 63)
    np.testing.assert_allclose(drawn.std(0), deviation, rtol=0.05)
    np.testing.assert_allclose(objective.latents(batch, None), expected, rtol=1e-6)
    given = {"mean": batch["mean"]}  # without moments latents are what they are
    np.testing.assert_allclose(objective.latents(given, keys[0]), expected, rtol=1e-6)


def test_the_loss_is_the_mean_of_the_errors_at_what_was_drawn():
    """Latents, levels and noise come of three keys of the step's."""
    objective, batch = FlowMatching(), batch_of(3)
    one, two = (jax.random.key(seed) for seed in (0, 1))
    of_latents, of_level, of_noise = jax.random.split(one, 3)
    errors = objective.errors(
        velocity,
        objective.latents(batch, of_latents),
        jax.random.normal(of_noise, batch["mean"].shape),
        flow_matching.levels(of_level, 3),
        batch["context"],
        batch["pooled"],
    )
    assert objective.loss(velocity, batch, one) == pytest.approx(errors.mean())
    assert objective.loss(velocity, batch, two) != objective.loss(velocity, batch, one)
    with pytest.raises(ValueError, match="expected a key"):
        objective.loss(velocity, batch, None)


def test_the_class_counts_by_its_weight():
    """The sum is linear in the weight, and at 0 that of the photographs alone."""
    own = batch_of(2)
    prior = {f"prior_{name}": x for name, x in batch_of(2, seed=5).items()}
    key = jax.random.key(0)

    def loss(weight, **changes):
        batch = own | prior | changes
        return float(FlowMatching(prior_weight=weight).loss(velocity, batch, key))

    of_class = loss(1.0) - loss(0.0)
    assert of_class > 0 and loss(3.0) == pytest.approx(loss(0.0) + 3 * of_class)
    moved = {"prior_mean": prior["prior_mean"] + 1}
    assert loss(0.0, **moved) == loss(0.0) and loss(1.0, **moved) != loss(1.0)


@pytest.mark.parametrize("precondition", [True, False])
def test_the_gradient_is_that_of_differences(precondition, x64):
    """Of a model with one number, in float64."""
    objective = FlowMatching(scale=1.5, shift=0.1, precondition=precondition)
    batch = {name: np.float64(x) for name, x in batch_of(2).items()}
    key = jax.random.key(3)

    def loss(a):
        def model(x, time, context, pooled):
            return jnp.tanh(a * x) + velocity(x, time, context, pooled)

        return objective.loss(model, batch, key)

    step = 1e-5
    slope = (float(loss(0.7 + step)) - float(loss(0.7 - step))) / (2 * step)
    assert jax.grad(loss)(0.7) == pytest.approx(slope, rel=1e-6)


def test_an_evaluation_has_the_same_noise_each_time_and_counts_no_fillers():
    objective = FlowMatching()
    batch = batch_of(3) | {
        "index": np.array([4, 1, 0]),
        "valid": np.array([True, True, False]),
    }
    whole = objective.outputs(velocity, batch)["loss"]
    turned = {name: x[::-1] for name, x in batch.items()}
    np.testing.assert_allclose(
        objective.outputs(velocity, turned)["loss"], whole[::-1], rtol=1e-6
    )
    sums = objective.sums({"loss": whole}, batch)
    assert objective.numbers({n: float(x) for n, x in sums.items()}) == {
        "loss": pytest.approx(float(whole[:2].mean()))
    }
    # The mean over levels 62, 187 ... 937, each with noise of its own.
    keys = jax.random.fold_in(jax.random.key(0), 4)
    by_hand = []
    for level in range(62, 1000, 125):
        noise = jax.random.normal(jax.random.fold_in(keys, level), (1, 2, 3, 4))
        own = (batch[name][:1] for name in ("context", "pooled"))
        x0 = objective.latents({"mean": batch["mean"][:1]}, None)
        error = objective.errors(velocity, x0, noise, np.array([level]), *own)
        by_hand.append(float(error[0]))
    assert whole[0] == pytest.approx(np.mean(by_hand), rel=1e-5)
