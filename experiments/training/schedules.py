"""Learning rates by update: rise, fall, and stay in the cool-down."""

from typing import Literal, get_args

import jax.numpy as jnp
import optax

from experiments.training.rounds import Rounds

Name = Literal["cosine", "linear", "constant", "cosine_epoch", "annealed_epoch"]
END = 0.01  # of the peak, at which a cosine ends
ANNEALED = 1e-7  # the rate at which `annealed_epoch` ends, whatever the peak
START = 0.001  # of the peak, at which the warm-up of `cosine_epoch` starts


def cosine(peak: float, rounds: Rounds) -> optax.Schedule:
    """Rises linearly from 0 to the peak, then falls along a cosine to 1% of it."""
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, rounds.warmup, rounds.main, peak / 100
    )


def linear(peak: float, rounds: Rounds) -> optax.Schedule:
    """Rises linearly from 0 to the peak, then falls linearly to 0."""
    decay = optax.linear_schedule(peak, 0.0, rounds.main - rounds.warmup)
    return _behind_warmup(decay, peak, rounds)


def constant(peak: float, rounds: Rounds) -> optax.Schedule:
    """Rises linearly from 0 to the peak, and stays there, also in the cool-down."""
    return _behind_warmup(optax.constant_schedule(peak), peak, rounds)


def cosine_epoch(peak: float, rounds: Rounds) -> optax.Schedule:
    """Stays the same within a round, as timm's and the released code's in an epoch.

    The warm-up rises from a thousandth of the peak. The cosine counts from the start of
    the run, not from the end of the warm-up, and ends at 1% of the peak.
    """
    return _by_round(peak, END, rounds)


def annealed_epoch(peak: float, rounds: Rounds) -> optax.Schedule:
    """Falls as `cosine_epoch` does, but to 1e-7: `CosineAnnealingLR` of SAM-Adapter.

    Epoch e of E, from 0, has 1e-7 + (peak - 1e-7)(1 + cos(pi e / E)) / 2.
    """
    return _by_round(peak, min(1.0, ANNEALED / peak), rounds)


def _by_round(peak: float, share: float, rounds: Rounds) -> optax.Schedule:
    warmup, main = rounds.warmup / rounds.size, rounds.main / rounds.size

    def rate(update):
        t = jnp.asarray(update) // rounds.size
        rise = peak * (START + (1 - START) * t / max(warmup, 1))
        wave = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(t / main, 1)))
        return jnp.where(t < warmup, rise, peak * (share + (1 - share) * wave))

    return rate


def _behind_warmup(
    schedule: optax.Schedule, peak: float, rounds: Rounds
) -> optax.Schedule:
    warmup = optax.linear_schedule(0.0, peak, rounds.warmup)
    return optax.join_schedules([warmup, schedule], [rounds.warmup])


SCHEDULES = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "cosine_epoch": cosine_epoch,
    "annealed_epoch": annealed_epoch,
}
assert tuple(SCHEDULES) == get_args(Name)
