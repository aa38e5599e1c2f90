"""Budgets over matrices and over time, by hand and against Algorithm 1 as printed."""

import numpy as np
import pytest

from snella_jax import allocate, budget_schedule

# name: (scores, total, capacities, budgets)
ALLOCATIONS = {
    "in proportion": ([1, 2, 3], 60, [100, 100, 100], [10, 20, 30]),
    "one matrix": ([0.3], 7, [10], [7]),
    "one matrix, no score": ([0], 7, [10], [7]),
    # 60 of 100 go to the first, which takes 20. Of the other 80, three quarters go to
    # the second, which takes 30. What is left, 50, goes to the third.
    "a chain of overflows": ([6, 3, 1], 100, [20, 30, 90], [20, 30, 50]),
    # Alone, the second would get 20 and have room; it fills up by the first's overflow.
    "filled up by overflow": ([3, 1, 1], 100, [10, 40, 90], [10, 40, 50]),
    "capacity met exactly": ([1, 1], 20, [10, 10], [10, 10]),
    "no scores": ([0, 0, 0], 30, [10, 20, 30], [5, 10, 15]),
    "no score, room elsewhere": ([0, 1], 10, [50, 50], [0, 10]),
    # The last takes its 10; the two without a score share 20 by their capacities.
    "no score gets what is left": ([0, 0, 5], 30, [10, 30, 10], [5, 15, 10]),
    "a tiny score is a score": ([1e-300, 1], 60, [50, 50], [10, 50]),
    "far apart": ([1e300, 1e-300], 30, [50, 50], [30, 0]),
    "a matrix of no capacity": ([5, 1], 10, [0, 20], [0, 10]),
    "nothing to hand out": ([1, 2], 0, [10, 10], [0, 0]),
    "all of it": ([1, 200], 30, [10, 20], [10, 20]),
    "more than there is": ([1, 2], 1000, [10, 20], [10, 20]),
    # Real shares 1/3 and 2/3 above whole numbers; ties go to the earlier.
    "remainders: the largest": ([1, 2], 4, [9, 9], [1, 3]),
    "remainders: a tie": ([1, 1, 1], 5, [9, 9, 9], [2, 2, 1]),
    "remainders: one left": ([1, 1, 1, 1], 1, [9, 9, 9, 9], [1, 0, 0, 0]),
    "remainders: no scores": ([0, 0], 5, [10, 10], [3, 2]),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_allocation_by_hand(name):
    scores, total, capacities, expected = ALLOCATIONS[name]
    budgets = allocate(scores, total, capacities)
    assert budgets.dtype == np.int64
    assert budgets.tolist() == expected


def algorithm_1(scores, total, capacities):
    """Algorithm 1 in floats, as the paper prints it.

    With two additions: it stops when nobody with a score has room, and then gives what
    remains to the others in proportion to their capacities.
    """
    p = np.array(scores, float)
    room = np.array(capacities, float)
    budgets = np.zeros(len(p))
    total = min(total, room.sum())
    remaining = float(total)
    while remaining > 1e-9 * total:
        if not p.any():
            p = np.where(budgets < room, room, 0)
        p = p / p.sum()
        budgets = np.minimum(budgets + p * remaining, room)
        p[budgets >= room * (1 - 1e-12)] = 0
        remaining = total - budgets.sum()
    return budgets


@pytest.mark.parametrize("seed", range(10))
def test_allocation_is_algorithm_1_in_whole_numbers(seed):
    """20 random problems each: the sum exact, room respected, within 1 of the reals."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        count = rng.integers(1, 30)
        scores = rng.lognormal(sigma=rng.uniform(0, 4), size=count)
        scores[rng.random(count) < rng.choice([0, 0.3])] = 0
        capacities = rng.integers(1, rng.choice([5, 3000]), count, endpoint=True)
        total = rng.integers(0, int(1.2 * capacities.sum()), endpoint=True)
        budgets = allocate(scores, total, capacities)
        assert budgets.sum() == min(total, capacities.sum())
        assert (budgets >= 0).all() and (budgets <= capacities).all()
        real = algorithm_1(scores, total, capacities)
        assert np.abs(budgets - real).max() < 1 + 1e-6 * capacities.max()


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5, 1.0])
def test_a_floor_is_divided_evenly_and_the_rest_by_score(floor):
    """Each matrix has its even part of the floor, and Algorithm 1's of what is left."""
    rng = np.random.default_rng(0)
    capacities = rng.integers(1000, 9000, 12)
    scores, total = rng.lognormal(sigma=4, size=12), 20_000
    scores[3] = 0
    budgets = allocate(scores, total, capacities, floor)
    assert budgets.sum() == total and (budgets <= capacities).all()
    even = floor * total * capacities / capacities.sum()
    assert (budgets >= np.floor(even)).all()
    rest = algorithm_1(scores, (1 - floor) * total, capacities - even)
    assert np.abs(budgets - even - rest).max() < 1 + 1e-6 * capacities.max()


def test_a_floor_of_nothing_or_of_all():
    assert allocate([1, 0], 0, [5, 5], 0.5).tolist() == [0, 0]
    assert allocate([1, 0], 10, [5, 5], 0.5).tolist() == [5, 5]
    scores = [1] + [0] * 99
    assert sorted(allocate(scores, 199, [100] * 100, 1.0)) == [1] + [2] * 99
    for floor in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="floor="):
            allocate([1, 0], 4, [5, 5], floor)


def test_allocation_depends_on_ratios_of_scores_alone():
    """Sensitivities are tiny numbers: subnormal ones count as much as large ones."""
    scores = np.array([3.0, 5.0, 9.0, 1.0])
    expected = allocate(scores, 1000, [400] * 4)
    for scale in (2.0**-1060, 2.0**-500, 2.0**1000):
        np.testing.assert_array_equal(
            allocate(scores * scale, 1000, [400] * 4), expected
        )


def test_allocation_beyond_32_bits():
    """Llama-size: 224 matrices of 4096 x 11008 and 6.5e9 weights, to the last one."""
    scores = np.random.default_rng(0).lognormal(size=224)
    capacity, total = 4096 * 11008, 6_500_000_001
    budgets = allocate(np.float32(scores), total, [capacity] * 224)
    assert budgets.dtype == np.int64
    assert budgets.sum() == total
    assert budgets.max() == capacity
    free = budgets < capacity
    ratio = budgets[free] / np.float32(scores)[free]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)


@pytest.mark.parametrize(
    "scores, total, capacities, message",
    [
        ([1, np.nan], 5, [9, 9], r"scores of matrices \[1\] are \[nan\]"),
        ([np.inf, 1], 5, [9, 9], r"scores of matrices \[0\] are \[inf\]"),
        ([-1, 1, -2], 5, [9, 9, 9], r"matrices \[0, 2\] are \[-1\.0, -2\.0\]"),
        ([1, 1], -5, [9, 9], "total=-5"),
        ([1, 1], 5, [9, -9], "expected none negative"),
        ([1, 1], 5, [9], "one of each for every matrix"),
        ([], 5, [], "at least one matrix"),
        ([[1, 1]], 5, [9], "one of each for every matrix"),
    ],
)
def test_allocation_refuses(scores, total, capacities, message):
    with pytest.raises(ValueError, match=message):
        allocate(scores, total, capacities)


def test_budgets_are_integers_and_no_densities():
    """NumPy's integers are integers; 0.3, or 30.0, is somebody's mistake."""
    assert allocate([1, 1], np.int64(4), np.array([9, 9])).tolist() == [2, 2]
    assert budget_schedule(np.int64(9), np.int32(5), steps=2)(0) == 9
    for total, capacities in ((0.3, [9, 9]), (30.0, [9, 9]), (4, [9.0, 9.0])):
        with pytest.raises(TypeError):
            allocate([1, 1], total, capacities)
    for initial, target in ((1.0, 0), (9, 0.3)):
        with pytest.raises(TypeError):
            budget_schedule(initial, target, steps=2)


@pytest.mark.parametrize(
    "power, expected",
    # (1 - t/4)^power * 800 + 200 for t = 0 .. 4
    [
        (3, [1000, 537.5, 300, 212.5, 200]),
        (2, [1000, 650, 400, 250, 200]),
        (1, [1000, 800, 600, 400, 200]),
    ],
)
def test_schedule_is_equation_12(power, expected):
    schedule = budget_schedule(1000, 200, steps=5, power=power)
    budgets = [schedule(t) for t in range(5)]
    assert all(type(budget) is int for budget in budgets)
    np.testing.assert_allclose(budgets, expected, rtol=0, atol=0.5)


def test_a_step_may_be_fractional():
    schedule = budget_schedule(1000, 200, steps=5)
    assert schedule(0.5) == 200 + round((1 - 0.125) ** 3 * 800)
    assert schedule(4.2) == 200


def test_schedule_holds():
    """2 steps of `initial`, then Eq. 12 from t = 0 to T = 4, then 3 of `target`."""
    schedule = budget_schedule(1000, 200, steps=10, power=1, warmup=2, cooldown=3)
    eq_12 = [1000, 800, 600, 400, 200]
    assert [schedule(t) for t in range(10)] == [1000, 1000, *eq_12, 200, 200, 200]


def test_schedule_stays_at_its_target():
    """Whoever trains longer, or evaluates at `steps`, uses the last budget."""
    schedule = budget_schedule(1000, 200, steps=5)
    assert schedule(5) == schedule(500) == 200


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("steps", [2, 3, 100])
def test_schedule_ends_exact_and_never_turns_back(power, steps):
    """With totals beyond 32 bits, and those that no float32 holds."""
    initial, target = 6_500_000_001, 1_950_000_001
    schedule = budget_schedule(initial, target, steps, power)
    budgets = [schedule(t) for t in range(steps)]
    assert budgets[0] == initial and budgets[-1] == target
    assert np.all(np.diff(budgets) < 0)


def test_schedule_rises_too():
    schedule = budget_schedule(0, 100, steps=3, power=1)
    assert [schedule(t) for t in range(3)] == [0, 50, 100]


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_constant_schedule(steps):
    """A constant needs no steps to get anywhere."""
    schedule = budget_schedule(300, 300, steps)
    assert {schedule(t) for t in range(10)} == {300}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 1}, "steps=1 .* expected at least 2"),
        ({"steps": 6, "warmup": 2, "cooldown": 3}, "expected at least 7"),
        ({"steps": 5, "initial": -1}, "initial=-1"),
        ({"steps": 5, "target": -1}, "target=-1"),
        ({"steps": 5, "power": -1}, "power=-1"),
        ({"steps": 5, "power": 0}, "expected power > 0"),
        ({"steps": 5, "warmup": -1}, "warmup=-1"),
        ({"steps": 5, "cooldown": -1}, "cooldown=-1"),
    ],
)
def test_schedule_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        budget_schedule(**({"initial": 1000, "target": 200} | settings))


def test_schedule_refuses_a_negative_step():
    for target in (200, 1000):
        schedule = budget_schedule(1000, target, steps=5)
        with pytest.raises(ValueError, match="t=-1"):
            schedule(-1)
