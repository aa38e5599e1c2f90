"""Importance against a NumPy loop, inside optax, and the reallocation that uses it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import snella_jax as snella
from snella_jax import (
    importance,
    reallocate,
    steps_since_reallocation,
    track_importance,
)
from snella_jax.importance import importance_state

SHAPES = {  # a and b of one plain matrix and of a stack of three
    "fc1": ((2, 6, 2), (2, 4, 2)),
    "blocks/query": ((3, 1, 5, 3), (3, 1, 7, 3)),
}


def tree(seed, dtype=jnp.float32):
    """Random parameters or gradients: two adapters and a head."""
    rng = np.random.default_rng(seed)

    def adapter(name):
        a, b = SHAPES[name]
        alpha = a[:-3]
        shapes = {"a": a, "b": b, "alpha": alpha}
        return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}

    return {
        "fc1": adapter("fc1"),
        "blocks": {"query": adapter("blocks/query")},
        "head": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype)},
    }


def at(params, path):
    for name in path.split("/"):
        params = params[name]
    return params


def expected_scores(thetas, grads, beta1, beta2, metric="sensitivity"):
    """Eq. 7 to 11 in float64 for the trees of every step."""
    scores = {}
    for path in SHAPES:
        total = 0
        for name in ("a", "b"):
            smooth = uncertain = None
            for theta, grad in zip(thetas, grads, strict=True):
                theta = np.float64(at(theta, path)[name])
                grad = np.float64(at(grad, path)[name])
                seen = np.abs(theta * grad if metric == "sensitivity" else theta)
                if smooth is None:
                    smooth, uncertain = seen, np.zeros_like(seen)
                else:
                    smooth = beta1 * smooth + (1 - beta1) * seen
                    change = np.abs(smooth - seen)
                    uncertain = beta2 * uncertain + (1 - beta2) * change
            total += (smooth * uncertain).mean((-3, -2, -1))
        scores[path] = total
    return scores


def observe(tx, thetas, grads):
    """The state after one update for every pair of trees."""
    state = tx.init(thetas[0])
    for theta, grad in zip(thetas, grads, strict=True):
        _, state = tx.update(grad, state, theta)
    return state


def assert_scores(state, expected, rtol=2e-6):
    scores = importance(state)
    assert scores.keys() == expected.keys()
    for path, score in scores.items():
        assert score.dtype == np.float32
        assert score.shape == SHAPES[path][0][:-3]
        np.testing.assert_allclose(score, expected[path], rtol=rtol)


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


# Reallocation

NAMES = ("blocks/query[0]", "blocks/query[1]", "blocks/query[2]", "fc1")


def toy_budgets():
    """Everything may move, since the start."""

    def adapter(lead, capacity):
        return {
            "budget": jnp.full(lead, capacity, jnp.int32),
            "allocated_at": jnp.zeros(lead, jnp.int32),
        }

    return {"blocks": {"query": adapter((3,), 35)}, "fc1": adapter((), 24)}


def toy_state(steps=4):
    seeds = range(steps)
    return observe(
        track_importance(), [tree(s) for s in seeds], [tree(10 + s) for s in seeds]
    )


def test_reallocate_refuses_fixed_budgets():
    """-1 in `allocated_at` says that budgets do not compete."""
    budgets = toy_budgets()
    budgets["fc1"]["allocated_at"] -= 1
    with pytest.raises(ValueError, match=r"budgets of \['fc1'\] are fixed"):
        reallocate(budgets, toy_state(), 60)
    assert steps_since_reallocation(budgets, toy_state(4)) == 4


def test_reallocate_divides_by_importance():
    """The budgets are `allocate`'s, and the report says what went where."""
    state, budgets = toy_state(), toy_budgets()
    new, report = reallocate(budgets, state, 60)

    scores = importance(state)
    flat = np.append(np.float64(scores["blocks/query"]), np.float64(scores["fc1"]))
    expected = snella.allocate(flat, 60, [35, 35, 35, 24])
    assert len(set(expected.tolist())) > 2 and expected.sum() == 60
    np.testing.assert_array_equal(new["blocks"]["query"]["budget"], expected[:3])
    assert new["fc1"]["budget"] == expected[3]

    assert report.step == report.steps_since == 4
    assert report.names == NAMES
    np.testing.assert_array_equal(report.scores, flat)
    np.testing.assert_array_equal(report.budgets, expected)
    np.testing.assert_array_equal(report.capacities, [35, 35, 35, 24])
    assert report.budgets.dtype == report.capacities.dtype == np.int64
    assert report.died == ()
    assert report.density == 60 / 129


def test_reallocate_keeps_structure_dtype_and_devices(x64):
    """int32 even where NumPy's int64 would stay; the old budgets are not touched."""
    device = jax.devices()[1]
    budgets = jax.device_put(toy_budgets(), device)
    new, _ = reallocate(budgets, toy_state(), 60)
    assert jax.tree.structure(new) == jax.tree.structure(budgets)
    for old_leaf, new_leaf in zip(*map(jax.tree.leaves, (budgets, new)), strict=True):
        assert new_leaf.dtype == old_leaf.dtype == np.int32
        assert new_leaf.shape == old_leaf.shape
        assert new_leaf.sharding == old_leaf.sharding
        assert new_leaf.weak_type == old_leaf.weak_type
    assert budgets["fc1"]["budget"] == 24 and budgets["fc1"]["allocated_at"] == 0


@pytest.mark.parametrize("committed", [True, False])
def test_reallocate_does_not_recompile_the_step(committed):
    """Nor does a budget that was on no particular device get committed to one."""
    budgets = toy_budgets()
    if committed:
        budgets = jax.device_put(budgets, jax.devices()[0])
    step = jax.jit(lambda budgets: budgets["fc1"]["budget"] + 1)
    assert step(budgets) == 25
    new, _ = reallocate(budgets, toy_state(), 60)
    assert new["fc1"]["budget"].committed == committed
    assert step(new) == new["fc1"]["budget"] + 1 != 25
    assert step._cache_size() == 1


def test_steps_since_reallocation():
    budgets, state = toy_budgets(), toy_state(4)
    assert steps_since_reallocation(budgets, state) == 4
    budgets, _ = reallocate(budgets, state, 60)
    assert steps_since_reallocation(budgets, state) == 0
    later = toy_state(6)
    assert steps_since_reallocation(budgets, later) == 2
    _, report = reallocate(budgets, later, 60)
    assert (report.step, report.steps_since) == (6, 2)
    # A new optimizer knows nothing of the steps of the one before.
    assert steps_since_reallocation(budgets, toy_state(3)) == 3
    with pytest.raises(ValueError, match="There are no budgets"):
        steps_since_reallocation({}, state)


def test_reallocate_with_scores_of_ones_own():
    """After the first step every score is 0: the uniform density is the same in all."""
    scores = {"blocks/query": np.array([1.0, 0.0, 3.0]), "fc1": np.array(2.0)}
    new, report = reallocate(toy_budgets(), toy_state(1), 12, scores=scores)
    assert new["blocks"]["query"]["budget"].tolist() == [2, 0, 6]
    assert new["fc1"]["budget"] == 4
    np.testing.assert_array_equal(report.scores, [1, 0, 3, 2])

    _, report = reallocate(toy_budgets(), toy_state(1), 129 // 3)
    np.testing.assert_allclose(report.budgets / report.capacities, 1 / 3, atol=0.02)


def test_reallocate_says_what_died(caplog):
    """Once, when the budget falls to 0."""
    scores = {"blocks/query": np.array([1.0, 0.0, 3.0]), "fc1": np.array(0.0)}
    state = toy_state()
    with caplog.at_level(logging.WARNING, "snella_jax"):
        budgets, report = reallocate(toy_budgets(), state, 12, scores=scores)
    assert report.died == ("blocks/query[1]", "fc1")
    assert "may never come back: blocks/query[1], fc1" in caplog.text

    caplog.clear()
    _, report = reallocate(budgets, state, 12, scores=scores)
    assert report.died == () and not caplog.records


def test_reallocate_refuses():
    budgets, state = toy_budgets(), toy_state()
    with pytest.raises(ValueError, match="before any step"):
        reallocate(budgets, track_importance().init(tree(0)), 60)
    with pytest.raises(ValueError, match="expected the same adapters"):
        reallocate({"fc1": budgets["fc1"]}, state, 60)
    with pytest.raises(ValueError, match="expected the same adapters"):
        reallocate(budgets | {"fc2": budgets["fc1"]}, state, 60)
    with pytest.raises(ValueError, match="expected the same adapters"):
        reallocate(budgets, state, 60, scores={"fc1": np.array(1.0)})
    with pytest.raises(ValueError, match="total=-1"):
        reallocate(budgets, state, -1)
    with pytest.raises(TypeError):
        reallocate(budgets, state, 0.3)
    broken = {"blocks/query": np.array([1, np.nan, 1]), "fc1": np.array(1.0)}
    with pytest.raises(ValueError, match=r"matrices \[1\] are \[nan\]"):
        reallocate(budgets, state, 60, scores=broken)


def test_a_nan_gradient_is_not_hidden():
    """One NaN in a gradient makes its matrix's score NaN, which is refused."""
    grads = tree(10)
    grads["fc1"]["a"] = grads["fc1"]["a"].at[0, 0, 0].set(jnp.nan)
    state = observe(track_importance(), [tree(0)] * 2, [grads, tree(11)])
    assert np.isnan(importance(state)["fc1"])
    with pytest.raises(ValueError, match=r"matrices \[3\] are \[nan\]"):
        reallocate(toy_budgets(), state, 60)


def test_decay_mask_goes_by_name():
    """In stacked blocks a bias has two axes and alpha one: no rank tells them apart."""
    stacked = jnp.ones((12, 8))
    params = {
        "blocks": {
            "fc1": {
                "kernel": jnp.ones((12, 8, 8)),
                "bias": stacked,
                "adapter": {
                    **{name: jnp.ones((12, 2, 8, 4)) for name in "ab"},
                    **{name: jnp.ones(12) for name in ("alpha", "beta", "gamma")},
                    "piece_coeff": jnp.ones((12, 2)),
                },
            },
            "norm": {"scale": stacked, "bias": stacked},
        },
        "embed": {"embedding": stacked},
        "a": jnp.ones(3),  # not a factor: there is no b beside it
        "cls_token": jnp.ones((1, 1, 8)),
        "pos_embed": jnp.ones((1, 9, 8)),
        "head": {"kernel": stacked, "bias": jnp.ones(8)},
    }
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, value in jax.tree_util.tree_leaves_with_path(
            snella.decay_mask(params)
        )
        if value
    }
    assert decayed == {
        "blocks/fc1/kernel",
        "blocks/fc1/adapter/a",
        "blocks/fc1/adapter/b",
        "embed/embedding",
        "head/kernel",
    }
