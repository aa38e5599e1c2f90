"""How long, how fast and on what batches a method trains."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import optax

import snella_jax as snella
from snella_jax.core.paths import path_of

LAST_EPOCHS = 10  # each of which is evaluated, whatever `eval_every` says


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Length, rates and regularisation; AdamW with a warm-up and a cosine.

    Attributes:
      epochs: of warm-up and cosine.
      warmup_epochs: in which the rate rises from 0, the first of `epochs`.
      cooldown_epochs: at the cosine's end, after `epochs`.
      batch: images in a step, over all devices.
      accumulate: parts of a batch that are computed one after the other.
      lr: peak of the rate; it ends at 1% of it.
      weight_decay: AdamW's, on the leaves of `snella.decay_mask`.
      no_decay: regex of paths that do not decay besides; "" for none.
      rates: of paths that regexes match, times the rate: 0 freezes them.
      clip: norm at which the whole gradient is clipped; 0 for never. Importance is
        measured before that.
      ema: decay of a running mean of what trains, a step; 0 for none.
      eval_every: epochs between evaluations; the last ten are all evaluated.
      seed: of the order, the augmentation and the noise.
    """

    epochs: int
    batch: int
    lr: float
    warmup_epochs: int = 0
    cooldown_epochs: int = 0
    accumulate: int = 1
    weight_decay: float = 0.0
    no_decay: str = ""
    rates: tuple[tuple[str, float], ...] = ()
    clip: float = 0.0
    ema: float = 0.0
    eval_every: int = 1
    seed: int = 0

    def __post_init__(self):
        """Raises a `ValueError` on a value outside what is said above."""
        for name in ("batch", "accumulate", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        for name in ("cooldown_epochs", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 0.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs}: expected fewer than "
                f"epochs={self.epochs}."
            )
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

    @property
    def total_epochs(self) -> int:
        """With the cool-down."""
        return self.epochs + self.cooldown_epochs

    def evaluates(self, epoch: int) -> bool:
        """Whether what is followed is evaluated after an epoch, from 1."""
        last = epoch > self.total_epochs - LAST_EPOCHS
        return last or epoch % self.eval_every == 0

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate by step, for so many steps an epoch."""
        return optax.warmup_cosine_decay_schedule(
            0.0,
            self.lr,
            self.warmup_epochs * steps,
            self.epochs * steps,
            self.lr / 100,
        )

    def optimizer(
        self, steps: int, *watch: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """AdamW for so many steps an epoch, behind what watches the raw gradient."""
        clip = [optax.clip_by_global_norm(self.clip)] * bool(self.clip)
        adamw = optax.adamw(
            self.rate(steps), weight_decay=self.weight_decay, mask=self.decays
        )
        scales = [
            optax.masked(optax.scale(factor), _matching(regex))
            for regex, factor in self.rates
        ]
        return optax.chain(*watch, *clip, adamw, *scales)

    def decays(self, params: Any) -> Any:
        """True for the leaves that decay.

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
    """A mask of the leaves whose paths a regex matches in full."""

    def matches(key_path, _):
        return re.fullmatch(regex, "/".join(path_of(key_path))) is not None

    return lambda tree: jax.tree_util.tree_map_with_path(matches, tree)
