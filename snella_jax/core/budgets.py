"""Budgets: how many weights may move, over time and across matrices (Eq. 12, Alg. 1).

>>> schedule = budget_schedule(1000, 300, steps=3)
>>> [schedule(t) for t in range(3)]
[1000, 388, 300]
>>> allocate([3.0, 1.0], 300, [200, 200]).tolist()
[200, 100]
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from operator import index
from typing import Any

import numpy as np
from jaxtyping import Int

FIXED = -1  # in an adapter's `allocated_at`: its budgets do not compete


def budget_schedule(
    initial: int,
    target: int,
    steps: int,
    power: float = 3,
    warmup: int = 0,
    cooldown: int = 0,
) -> Callable[[float], int]:
    """Returns the total budget of each step, from `initial` to `target` (Eq. 12).

    `b_t = b_T + (1 - t/T)^power * (b_0 - b_T)`, with `T = steps - 1`. A step ends with
    a reallocation: an epoch in the paper, or any number of optimizer steps. Step `t`
    trains with `schedule(t)` weights, `t = 0 .. steps - 1`; the last one with `target`.
    `t` may be fractional: 1.5 in the middle of the second epoch.

    Args:
      initial: `b_0`, weights that may move at first.
      target: `b_T`, weights that may move at last.
      steps: number of steps, at least 2 unless `initial == target`.
      power: 3 in the paper; 2 and 1 in its ablation (Table XII).
      warmup: steps at the start that keep `initial`, counted before `t = 0` of Eq. 12.
      cooldown: steps at the end that keep `target`, counted after `t = T` of Eq. 12.

    Returns:
      A function from the step to the total budget; steps past the last give `target`.

    Raises:
      TypeError: a budget that is no integer (a density, say).
      ValueError: a negative budget or hold, a power that is not positive, or too few
        steps to get from `initial` to `target`; from the function, a negative step.
    """
    initial, target = whole(initial, "initial"), whole(target, "target")
    if min(initial, target, warmup, cooldown) < 0 or not power > 0:
        raise ValueError(
            f"initial={initial}, target={target}, power={power}, warmup={warmup}, "
            f"cooldown={cooldown}: expected power > 0 and none of the others negative."
        )
    last = steps - 1 - warmup - cooldown
    if last < 1 and initial != target:
        raise ValueError(
            f"steps={steps} with warmup={warmup} and cooldown={cooldown} leave no "
            f"step to move the budget from {initial} to {target}: expected at least "
            f"{2 + warmup + cooldown}."
        )

    def schedule(t: float) -> int:
        if t < 0:
            raise ValueError(f"t={t}: expected a step of at least 0.")
        if initial == target:
            return target
        progress = min(max((t - warmup) / last, 0.0), 1.0)
        return target + round((1 - progress) ** power * (initial - target))

    return schedule


def allocate(
    scores: Sequence[float] | np.ndarray,
    total: int,
    capacities: Sequence[int] | np.ndarray,
    floor: float = 0.0,
) -> Int[np.ndarray, " L"]:
    """Divides a total budget over matrices in proportion to their scores (Algorithm 1).

    What a full matrix cannot take goes to the others in proportion to their scores;
    matrices with a score of 0 get only what is left then, in proportion to their
    capacities. The real-valued solution is found exactly, in rational arithmetic, and
    rounded by largest remainder (ties: the earlier matrix first).

    Args:
      scores: importance of each of `L` matrices, finite and not negative.
      total: weights to hand out, at least 0; may exceed what fits.
      capacities: weights that each matrix has.
      floor: share of the total, in [0, 1], that is divided in proportion to capacities
        whatever the scores say, so that no matrix loses all it has (if its part of
        that is at least 1): 0 in the paper, 1 for the same density in every matrix.

    Returns:
      int64 `[L]`; sums to `min(total, sum(capacities))`, none above its capacity, each
      within 1 of the real solution.

    Raises:
      TypeError: a total or capacity that is no integer (a density, say).
      ValueError: lengths that differ, a score that is negative, NaN or infinite, a
        negative total or capacity, or a floor outside [0, 1].
    """
    weights = np.asarray(scores, np.float64)
    room = [whole(capacity, "capacity") for capacity in capacities]
    total = whole(total)
    if weights.ndim != 1 or len(weights) != len(room) or not room:
        raise ValueError(
            f"{weights.shape} scores and {len(room)} capacities: expected one of each "
            "for every matrix, and at least one matrix."
        )
    if not np.isfinite(weights).all() or (weights < 0).any():
        bad = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
        raise ValueError(
            f"scores of matrices {bad.tolist()} are {weights[bad].tolist()}: expected "
            "finite numbers of at least 0. Did the loss or a gradient overflow?"
        )
    if total < 0 or min(room) < 0:
        raise ValueError(f"total={total}, capacities={room}: expected none negative.")

    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor}: expected 0 to 1.")

    total = min(total, sum(room))
    even = Fraction(float(floor)) * Fraction(total, sum(room) or 1)
    above = [capacity * (1 - even) for capacity in map(Fraction, room)]
    exact = [Fraction(float(w)) for w in weights]
    shares = _fill(exact, total - even * sum(room), above)
    left = total - even * sum(room) - sum(shares)
    if left:
        idle = [
            Fraction(0) if e else Fraction(c) for e, c in zip(exact, room, strict=True)
        ]
        for i, share in enumerate(_fill(idle, left, above)):
            shares[i] += share
    return _round([s + even * c for s, c in zip(shares, room, strict=True)], total)


def whole(count: Any, name: str = "total") -> int:
    """Returns a number of weights as an `int`.

    Raises:
      TypeError: it is no integer.

    >>> whole(np.int32(3))
    3
    """
    try:
        return index(count)
    except TypeError as error:
        raise TypeError(
            f"{name}={count!r}: expected a number of weights, an integer. A density is "
            "a fraction of them: round(density * snella.adapted_weights(model))."
        ) from error


def _fill(weights: list[Fraction], total: Fraction | int, room: list[Fraction]):
    """Divides a total by weights, none above its room, as far as it fits."""
    shares = [Fraction(0)] * len(room)
    left, weight = Fraction(total), sum(weights, Fraction(0))
    positive = (i for i, w in enumerate(weights) if w)
    # The matrix that fills up first has the least room for its weight.
    for i in sorted(positive, key=lambda i: room[i] / weights[i]):
        shares[i] = min(Fraction(room[i]), left * weights[i] / weight)
        left -= shares[i]
        weight -= weights[i]
    return shares


def _round(shares: list[Fraction], total: int) -> Int[np.ndarray, " L"]:
    whole = [int(share) for share in shares]
    remainders = [share - floor for share, floor in zip(shares, whole, strict=True)]
    by_remainder = sorted(range(len(shares)), key=lambda i: -remainders[i])
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return np.array(whole, np.int64)
