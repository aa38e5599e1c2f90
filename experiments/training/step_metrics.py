"""Loss and gradient norm of each step, read while the devices go on."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax


class NotFinite(ArithmeticError):
    """A step whose loss or update is not finite.

    Attributes:
      step: number of the step in its round, from 1.
      examples: indices of its training examples.
    """

    def __init__(self, step: int, examples: jax.Array):
        super().__init__(f"not finite at step {step}")
        self.step, self.examples = step, examples


class Readings:
    """Losses and gradient norms, each read when the next step is under way.

    A number that is read at once makes the devices wait for the program, which prepares
    the next step only then.

    Attributes:
      losses: losses of the steps that were read.
      norms: norms of their gradients.
      seconds: times between one reading and the next.
    """

    def __init__(self, on_step: Callable[[float], None]):
        """Calls `on_step` with every loss."""
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []
        self._on_step = on_step
        self._waiting: tuple[jax.Array, jax.Array, Any] | None = None
        self._last = time.perf_counter()

    def as_json(self) -> dict[str, list[float]]:
        """Returns what was read, for `take_up`."""
        return {"losses": self.losses, "norms": self.norms, "seconds": self.seconds}

    def take_up(self, found: dict[str, list[float]]) -> None:
        """Begins with the readings of a round that was interrupted."""
        self.losses, self.norms, self.seconds = (
            list(found[name]) for name in ("losses", "norms", "seconds")
        )
        for loss in self.losses:
            self._on_step(loss)

    def add(self, loss: jax.Array, norm: jax.Array, examples: jax.Array) -> None:
        """Takes a step that was begun, and reads the one before it.

        Raises:
          NotFinite: the loss of the one before is not finite.
        """
        self.read()
        self._waiting = loss, norm, examples

    def read(self) -> None:
        """Waits for what was begun, and reads it.

        Raises:
          NotFinite: its loss is not finite.
        """
        if self._waiting is None:
            return
        (loss, norm, examples), self._waiting = self._waiting, None
        self.losses.append(float(loss))
        self.norms.append(float(norm))
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        if not math.isfinite(self.losses[-1]):
            raise NotFinite(len(self.losses), examples)
        self._on_step(self.losses[-1])
