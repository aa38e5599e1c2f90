"""Lengths in epochs and in updates, the rounds they make, and learning rates."""

import numpy as np
import pytest

from experiments.training import schedules
from experiments.training.recipe import Recipe
from experiments.training.rounds import Rounds

PEAK = 2e-3
E, W = 40, 8  # updates until the end, and of the warm-up
COSINE = PEAK * (0.01 + 0.99 * (1 + np.cos(np.pi * np.arange(E - W) / (E - W))) / 2)
ROUND = np.arange(E + 6) // 4  # of each update
RISE, FALL = PEAK * np.arange(W) / W, PEAK * np.arange(E - W, 0, -1) / (E - W)
WAVE = (1 + np.cos(np.pi * np.minimum(ROUND, 10) / 10)) / 2
STEPPED = PEAK / 1000 + ROUND / 2 * (PEAK - PEAK / 1000)
EXPECTED = {
    "cosine": [*RISE, *COSINE, *[PEAK / 100] * 6],
    "linear": [*RISE, *FALL, *[0] * 6],
    "constant": [*RISE, *[PEAK] * (E - W + 6)],
    "cosine_epoch": np.where(ROUND < 2, STEPPED, PEAK / 100 + 0.99 * PEAK * WAVE),
    "annealed_epoch": np.where(ROUND < 2, STEPPED, 1e-7 + (PEAK - 1e-7) * WAVE),
}  # fmt: skip


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_rates_are_those_of_the_formula(name):
    """Eight updates of warm-up, 32 of decay and six of cool-down, in rounds of four."""
    rounds = Rounds(main=E, size=4, warmup=W, cooldown_updates=6)
    rate = schedules.SCHEDULES[name](PEAK, rounds)
    np.testing.assert_allclose(rate(np.arange(E + 6)), EXPECTED[name], atol=1e-9)


def test_behind_a_short_last_round_is_the_end():
    """Where a run stands that was killed in its tests."""
    rounds = Rounds(main=7, size=3)
    assert [rounds.span(i) for i in range(4)] == [(0, 3), (3, 6), (6, 7), (7, 7)]


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_without_a_warm_up_the_rate_starts_at_its_peak(name):
    rate = schedules.SCHEDULES[name](PEAK, Rounds(main=E, size=4))
    assert float(rate(0)) == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("options", "updates", "size", "count", "last", "warmup"),
    [
        # 25 examples in batches of 4: six updates an epoch.
        ({"epochs": 3, "warmup_epochs": 1}, 18, 6, 3, 2, 6),
        ({"epochs": 3, "cooldown_epochs": 2}, 30, 6, 5, 2, 0),
        ({"epochs": 3, "round_steps": 5, "warmup_epochs": 1}, 18, 5, 4, 3, 6),
        ({"epochs": 1, "steps": 100, "round_steps": 30}, 100, 30, 4, 3, 0),
        ({"epochs": 1, "steps": 20, "warmup_epochs": 2}, 20, 6, 4, 3, 12),
        ({"epochs": 1, "steps": 3, "round_steps": 9}, 3, 9, 1, 0, 0),
        ({"epochs": 1, "steps": 8, "round_steps": 3, "cooldown_epochs": 2},
         14, 3, 5, 2, 0),
    ],
)  # fmt: skip
def test_a_length_makes_rounds(options, updates, size, count, last, warmup):
    rounds = Recipe(batch=4, lr=1.0, **options).rounds(25)
    assert (rounds.updates, rounds.size, rounds.count) == (updates, size, count)
    assert (rounds.last, rounds.warmup) == (last, warmup)
    assert rounds.cooldown == count - 1 - last
    spans = [rounds.span(index) for index in range(count)]
    flat = [update for start, end in spans for update in range(start, end)]
    assert flat == list(range(updates))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"round_steps": 0}, "round_steps=0: expected at least 1"),
        ({"epochs": 2, "warmup_epochs": 2}, "expected fewer than epochs=2"),
        ({"steps": 12, "warmup_epochs": 2}, "warm-up takes 12 of 12 updates"),
        ({"batch": 26}, r"batch=26: expected 1 to 25 \(training examples\)"),
        ({"schedule": "linear", "cooldown_epochs": 1}, "rate of 0 by then"),
    ],
)
def test_lengths_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"epochs": 5, "batch": 4, "lr": 1.0, **options}).rounds(25)
