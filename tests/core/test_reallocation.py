"""Reallocation by importance: what moves, what is said and what is refused."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from observed import broken, observe, tree

import snella_jax as snella
from snella_jax import (
    importance,
    reallocate,
    steps_since_reallocation,
    track_importance,
)

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
    for total in (0.3, np.float32(0.3), None):
        with pytest.raises(TypeError, match=r"expected a number of weights.*density"):
            reallocate(budgets, state, total)
    broken = {"blocks/query": np.array([1, np.nan, 1]), "fc1": np.array(1.0)}
    with pytest.raises(ValueError, match=r"matrices \[1\] are \[nan\]"):
        reallocate(budgets, state, 60, scores=broken)


def test_a_broken_factor_is_not_hidden():
    """Nothing mends a NaN there: reallocating by older scores would hide it."""
    thetas = [tree(0), tree(1), broken(tree(2), np.nan)]
    grads = [tree(10), tree(11), broken(tree(12), np.nan)]
    state = observe(track_importance(), thetas, grads)
    with pytest.raises(ValueError, match=r"matrices \[3\] are \[nan\]"):
        reallocate(toy_budgets(), state, 60)


def test_no_gradient_reached_the_factors():
    """After a third step without any; scores of one's own are not asked."""
    zeros = jax.tree.map(jnp.zeros_like, tree(0))
    state = observe(track_importance(), [tree(0)] * 3, [zeros] * 3)
    with pytest.raises(ValueError, match="no gradient reached the factors in 3 steps"):
        reallocate(toy_budgets(), state, 60)
    scores = {"blocks/query": np.ones(3), "fc1": np.array(1.0)}
    assert reallocate(toy_budgets(), state, 60, scores=scores)[1].budgets.sum() == 60
    state = observe(track_importance(), [tree(0)] * 2, [zeros] * 2)
    assert reallocate(toy_budgets(), state, 60)[1].budgets.sum() == 60


def test_steps_that_all_failed_are_no_steps():
    nans = jax.tree.map(lambda x: x * jnp.nan, tree(0))
    state = observe(track_importance(), [tree(0)] * 3, [nans] * 3)
    assert state.step == 0 and not importance(state)["fc1"]
    with pytest.raises(ValueError, match="before any step whose gradients were finite"):
        reallocate(toy_budgets(), state, 60)
