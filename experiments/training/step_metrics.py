"""What the program reads of an epoch's steps while the devices go on."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax


class NotFinite(ArithmeticError):
    """The loss of a step, or its update, was not finite.

    Attributes:
      step: of the epoch, from 1.
      images: the indices of its training images.
    """

    def __init__(self, step: int, images: jax.Array):
        super().__init__(f"not finite at step {step}")
        self.step, self.images = step, images


class Readings:
    """Losses and gradient norms, each read when the next step is under way.

    A number that is read at once makes the devices wait for the program, which prepares
    the next step only then.

    Attributes:
      losses: of the steps that were read.
      norms: of their gradients.
      seconds: between one reading and the next.
    """

    def __init__(self, on_step: Callable[[float], None]):
        """Calls `on_step` with every loss."""
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []
        self._on_step = on_step
        self._waiting: tuple[jax.Array, jax.Array, Any] | None = None
        self._last = time.perf_counter()

    def add(self, loss: jax.Array, norm: jax.Array, images: jax.Array) -> None:
        """Takes a step that was begun, and reads the one before it.

        Raises:
          NotFinite: by the one before.
        """
        self.read()
        self._waiting = loss, norm, images

    def read(self) -> None:
        """Waits for what was begun.

        Raises:
          NotFinite: by its loss.
        """
        if self._waiting is None:
            return
        (loss, norm, images), self._waiting = self._waiting, None
        self.losses.append(float(loss))
        self.norms.append(float(norm))
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        if not math.isfinite(self.losses[-1]):
            raise NotFinite(len(self.losses), images)
        self._on_step(self.losses[-1])
