"""Importance against a NumPy loop, alone and inside optax."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from observed import SHAPES, assert_scores, at, broken, expected_scores, observe, tree

from snella_jax import importance, track_importance
from snella_jax.core.importance import importance_state


@pytest.mark.parametrize("metric", ["sensitivity", "magnitude"])
@pytest.mark.parametrize("beta1, beta2", [(0.85, 0.85), (0.3, 0.9)])
def test_scores_of_five_steps(metric, beta1, beta2):
    thetas = [tree(seed) for seed in range(5)]
    grads = [tree(seed) for seed in range(10, 15)]
    state = observe(track_importance(beta1, beta2, metric), thetas, grads)
    assert state.step == 5
    assert_scores(state, expected_scores(thetas, grads, beta1, beta2, metric))


def test_the_first_step_has_no_uncertainty():
    """I_bar = I and U_bar = 0, so every score is 0 (Eq. 8)."""
    theta, grad = tree(0), tree(1)
    state = observe(track_importance(), [theta], [grad])
    for path in SHAPES:
        for name in ("a", "b"):
            seen = np.abs(at(theta, path)[name] * at(grad, path)[name])
            np.testing.assert_array_equal(state.sensitivity[path][name], seen)
            np.testing.assert_array_equal(state.uncertainty[path][name], 0)
        np.testing.assert_array_equal(importance(state)[path], 0)


def test_factors_are_recognised_by_their_shapes():
    """An `a` and a `b` of some other layer are no pair of factors."""
    params = tree(0)
    others = {
        "vectors": {"a": jnp.ones(3), "b": jnp.ones(3)},
        "lonely": {"a": jnp.ones((2, 3, 4))},
        "other columns": {"a": jnp.ones((2, 3, 4)), "b": jnp.ones((2, 3, 5))},
        "other stack": {"a": jnp.ones((5, 2, 3, 4)), "b": jnp.ones((6, 2, 3, 4))},
    }
    state = track_importance().init(params | others)
    assert state.sensitivity.keys() == SHAPES.keys()


def test_updates_pass_through():
    """The very arrays, and nothing but factors in the state."""
    tx, grads = track_importance(), tree(1)
    state = tx.init(tree(0))
    assert {path: set(pair) for path, pair in state.sensitivity.items()} == {
        path: {"a", "b"} for path in SHAPES
    }
    updates, _ = tx.update(grads, state, tree(0))
    same = jax.tree.map(lambda new, old: new is old, updates, grads)
    assert all(jax.tree.leaves(same))


def test_bfloat16_factors_are_smoothed_in_float32():
    """The product of a bfloat16 factor and its gradient is not rounded again."""
    thetas = [tree(seed, jnp.bfloat16) for seed in range(3)]
    grads = [tree(seed, jnp.bfloat16) for seed in range(10, 13)]
    state = observe(track_importance(), thetas, grads)
    assert_scores(state, expected_scores(thetas, grads, 0.85, 0.85))


def run_chain(wrap, steps=3):
    """Trains by `tx = wrap(track_importance())`; the state and the trees it saw."""
    tx = wrap(track_importance())
    params, seen, grads = tree(0), [], []
    state = tx.init(params)
    update = jax.jit(tx.update)
    for seed in range(10, 10 + steps):
        seen.append(params)
        grads.append(tree(seed))
        updates, state = update(grads[-1], state, params)
        params = optax.apply_updates(params, updates)
    return state, seen, grads


def label(key_path, _):
    names = {key.key for key in key_path}
    return "trainable" if "head" in names else "adapter"


WRAPPERS = {
    "chain": lambda tracker: optax.chain(
        tracker, optax.clip_by_global_norm(1.0), optax.adamw(0.1)
    ),
    "partition": lambda tracker: optax.partition(
        {"adapter": optax.chain(tracker, optax.sgd(0.1)), "trainable": optax.sgd(0.1)},
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    ),
    "inject_hyperparams": lambda tracker: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(tracker, optax.adam(learning_rate))
    )(learning_rate=optax.linear_schedule(0.1, 0.0, 10)),
    "betas as hyperparameters": lambda _: optax.chain(
        optax.inject_hyperparams(track_importance)(beta1=0.85, beta2=0.85),
        optax.sgd(0.1),
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_inside_optax(name):
    """The raw gradient is measured, whatever happens to it afterwards."""
    state, thetas, grads = run_chain(WRAPPERS[name])
    assert_scores(state, expected_scores(thetas, grads, 0.85, 0.85), rtol=2e-5)


def test_accumulated_gradients_are_measured_once():
    """Under `optax.MultiSteps` a step sees the average of its micro-batches."""
    state, thetas, grads = run_chain(
        lambda tracker: optax.MultiSteps(optax.chain(tracker, optax.sgd(0.1)), 2), 6
    )
    assert importance_state(state).step == 3
    means = [
        jax.tree.map(lambda x, y: (x + y) / 2, *pair)
        for pair in zip(grads[::2], grads[1::2], strict=True)
    ]
    expected = expected_scores(thetas[1::2], means, 0.85, 0.85)
    assert_scores(state, expected, rtol=2e-5)


def test_state_is_found_or_refused():
    params = tree(0)
    with pytest.raises(ValueError, match="holds 0 importance states"):
        importance(optax.adam(0.1).init(params))
    twice = optax.chain(track_importance(), track_importance()).init(params)
    with pytest.raises(ValueError, match="holds 2 importance states"):
        importance(twice)


def test_errors():
    tx = track_importance()
    with pytest.raises(ValueError, match="found no factors"):
        tx.init({"fc1": {"a": jnp.ones((2, 3, 1))}, "b": jnp.ones(3)})
    state = tx.init(tree(0))
    with pytest.raises(ValueError, match="needs params"):
        tx.update(tree(1), state)
    for settings in ({"beta1": -0.1}, {"beta1": 1.1}, {"beta2": 2}, {"beta2": np.nan}):
        with pytest.raises(ValueError, match=r"expected 0 <= beta[12] <= 1"):
            track_importance(**settings)
    with pytest.raises(ValueError, match="metric='gradient'"):
        track_importance(metric="gradient")


@pytest.mark.parametrize("bad", [0, 2, 4], ids=["first", "middle", "last"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("path, name", [("fc1", "a"), ("head", "kernel")])
def test_what_is_not_finite_is_skipped_for_all(path, name, value, bad):
    """The step leaves no trace in the scores, the count and the first of them."""
    thetas = [tree(seed) for seed in range(5)]
    grads = [tree(seed) for seed in range(10, 15)]
    grads[bad] = broken(grads[bad], value, path, name)
    state = observe(track_importance(), thetas, grads)
    assert state.step == 4
    del thetas[bad], grads[bad]
    assert_scores(state, expected_scores(thetas, grads, 0.85, 0.85))


@pytest.mark.parametrize("around", [True, False], ids=["around", "behind"])
def test_with_apply_if_finite(around, x64):
    """Around the chain or behind the tracker: the step is left out of both."""
    tracker, adam = track_importance(), optax.adam(0.1)
    if around:
        tx = optax.apply_if_finite(optax.chain(tracker, adam), 3)
    else:
        tx = optax.chain(tracker, optax.apply_if_finite(adam, 3))
    params, thetas, seen = tree(0), [], []
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(10, 15):
        grads = tree(seed)
        if seed == 12:
            grads = broken(grads, np.nan)
        else:
            thetas.append(params)
            seen.append(grads)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert importance_state(state).step == 4
    assert_scores(state, expected_scores(thetas, seen, 0.85, 0.85), rtol=2e-5)


def test_a_product_that_overflows_is_skipped():
    """Finite factors and gradients, whose product float32 cannot hold."""
    thetas, grads = [tree(s) for s in range(4)], [tree(s) for s in range(10, 14)]
    thetas[1]["fc1"]["a"] *= 1e30
    grads[1]["fc1"]["a"] *= 1e30
    state = observe(track_importance(), thetas, grads)
    del thetas[1], grads[1]
    assert state.step == 3
    assert_scores(state, expected_scores(thetas, grads, 0.85, 0.85))


@pytest.mark.parametrize("wrapper", ["betas as hyperparameters", "chain"])
def test_the_state_stays_float32_under_x64(wrapper, x64):
    """Whatever dtype optax gives hyperparameters, and none of it compiles twice."""
    state, thetas, grads = run_chain(WRAPPERS[wrapper])
    assert_scores(state, expected_scores(thetas, grads, 0.85, 0.85), rtol=2e-5)


def test_an_exported_update_knows_the_state():
    """`jax.export` writes the type of the state, and reads it."""
    tx, grads, theta = track_importance(), [tree(1), tree(2)], tree(0)
    state = tx.init(theta)
    exported = jax.export.export(jax.jit(tx.update))(grads[0], state, theta)
    again = jax.export.deserialize(exported.serialize())
    for grad in grads:
        _, state = again.call(grad, state, theta)
    assert_scores(state, expected_scores([theta] * 2, grads, 0.85, 0.85))
    assert state.step == 2
