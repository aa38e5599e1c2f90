"""Recipes: length, learning rate and batches of training."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import optax

import snella_jax as snella
from experiments.training import schedules
from experiments.training.rounds import Rounds
from snella_jax.core.paths import path_of


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Length, rates and regularisation of training with AdamW.

    Attributes:
      epochs: length of warm-up and decay in passes over the data.
      batch: examples in an update, over all devices.
      lr: peak of the learning rate.
      steps: length of warm-up and decay in updates instead; None to count `epochs`.
      round_steps: updates in a round; None for an epoch. After a round there is an
        evaluation, a checkpoint and a reallocation.
      schedule: course of the learning rate, see `schedules`.
      warmup_epochs: epochs (rounds, where `steps` gives the length) in which the rate
        rises, the first of the run.
      cooldown_epochs: epochs (or rounds) at the lowest rate, after the others.
      accumulate: micro-batches of an update, computed one after the other.
      weight_decay: AdamW's, on the leaves of `snella.decay_mask`.
      no_decay: regex of further paths that do not decay; "" for none.
      rates: pairs of a regex and a factor of the rate of the paths that it matches; 0
        freezes them.
      clip: norm at which the whole gradient is clipped; 0 for never. Importance is
        measured before that.
      ema: decay per update of a running mean of what trains; 0 for none.
      eval_every: rounds between evaluations.
      eval_last: rounds at the end that are all evaluated.
      seed: decides the order, the augmentation and the noise.
    """

    epochs: int
    batch: int
    lr: float
    steps: int | None = None
    round_steps: int | None = None
    schedule: schedules.Name = "cosine"
    warmup_epochs: int = 0
    cooldown_epochs: int = 0
    accumulate: int = 1
    weight_decay: float = 0.0
    no_decay: str = ""
    rates: tuple[tuple[str, float], ...] = ()
    clip: float = 0.0
    ema: float = 0.0
    eval_every: int = 1
    eval_last: int = 10
    seed: int = 0

    def __post_init__(self):
        """Raises a `ValueError` on a value outside the limits above."""
        self._check_length()
        for name in ("batch", "accumulate", "eval_every", "eval_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: expected at least 0.")
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate}: expected a divisor of "
                f"batch={self.batch}."
            )
        if not (0 <= self.clip < math.inf and 0 <= self.ema < 1):
            raise ValueError(
                f"clip={self.clip}, ema={self.ema}: expected clip >= 0 and "
                "0 <= ema < 1."
            )
        try:
            re.compile(self.no_decay)
        except re.error as error:
            raise ValueError(
                f"no_decay={self.no_decay!r} does not compile: {error}."
            ) from error

    def _check_length(self) -> None:
        for name in ("steps", "round_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        if self.cooldown_epochs < 0:
            raise ValueError(
                f"cooldown_epochs={self.cooldown_epochs}: expected at least 0."
            )
        if self.cooldown_epochs and self.schedule == "linear":
            raise ValueError(
                f"cooldown_epochs={self.cooldown_epochs}: schedule=linear has come to "
                "a rate of 0 by then, expected cooldown_epochs=0."
            )
        if self.steps is not None:
            if self.warmup_epochs < 0:
                raise ValueError(
                    f"warmup_epochs={self.warmup_epochs}: expected at least 0."
                )
        elif not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs}: expected fewer than "
                f"epochs={self.epochs}, such as 0."
            )

    @property
    def unit(self) -> str:
        """Name of a round in messages: "epoch", or "round" of so many updates."""
        return "round" if self.round_steps else "epoch"

    def rounds(self, examples: int) -> Rounds:
        """Returns the rounds of a run on so many training examples.

        Raises:
          ValueError: the batch is larger than that, or the warm-up takes all updates.
        """
        epoch = examples // self.batch
        if not epoch:
            raise ValueError(
                f"batch={self.batch}: expected 1 to {examples} (training examples)."
            )
        size = self.round_steps or epoch
        unit = epoch if self.steps is None else size
        return Rounds(
            main=self.epochs * epoch if self.steps is None else self.steps,
            size=size,
            warmup=self.warmup_epochs * unit,
            cooldown_updates=self.cooldown_epochs * unit,
        )

    def evaluates(self, passed: int, count: int) -> bool:
        """Returns True if there is an evaluation after `passed` of `count` rounds."""
        return passed > count - self.eval_last or passed % self.eval_every == 0

    def rate(self, rounds: Rounds) -> optax.Schedule:
        """Returns the learning rate by update, from 0."""
        return schedules.SCHEDULES[self.schedule](self.lr, rounds)

    def optimizer(
        self, rounds: Rounds, *watch: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """Returns AdamW, behind what watches the raw gradient."""
        clip = [optax.clip_by_global_norm(self.clip)] * bool(self.clip)
        adamw = optax.adamw(
            self.rate(rounds), weight_decay=self.weight_decay, mask=self.decays
        )
        scales = [
            optax.masked(optax.scale(factor), _matching(regex))
            for regex, factor in self.rates
        ]
        return optax.chain(*watch, *clip, adamw, *scales)

    def decays(self, params: Any) -> Any:
        """Returns a tree of bools, True for the leaves that decay.

        Raises:
          ValueError: `no_decay` matches none of them.
        """
        by_kind = snella.decay_mask(params)
        if not self.no_decay:
            return by_kind
        spared = []

        def keep(key_path, decays):
            path = "/".join(path_of(key_path))
            if decays and re.fullmatch(self.no_decay, path):
                spared.append(path)
            return decays and path not in spared

        mask = jax.tree_util.tree_map_with_path(keep, by_kind)
        if not spared:
            decaying = [
                "/".join(path_of(key_path))
                for key_path, decays in jax.tree_util.tree_leaves_with_path(by_kind)
                if decays
            ]
            raise ValueError(
                f"no_decay={self.no_decay!r} matches nothing that decays: "
                f"{', '.join(decaying)}."
            )
        return mask


def _matching(regex: str) -> Callable[[Any], Any]:
    """Returns a mask of the leaves whose paths a regex matches in full."""

    def matches(key_path, _):
        return re.fullmatch(regex, "/".join(path_of(key_path))) is not None

    return lambda tree: jax.tree_util.tree_map_with_path(matches, tree)
