"""Rounds: the parts of a run that end with an evaluation and a checkpoint."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Rounds of a run, each an epoch or a fixed number of updates.

    >>> rounds = Rounds(main=10, size=4, cooldown_updates=5)
    >>> rounds.count, [rounds.span(i) for i in range(rounds.count)]
    (4, [(0, 4), (4, 8), (8, 12), (12, 15)])
    >>> rounds.last, rounds.cooldown
    (2, 1)

    Attributes:
      main: updates of warm-up and decay.
      size: updates in a round; the last round may have fewer.
      warmup: updates at the start of `main` in which the rate rises.
      cooldown_updates: updates after `main`, at the lowest rate.
    """

    main: int
    size: int
    warmup: int = 0
    cooldown_updates: int = 0

    def __post_init__(self):
        if not 0 <= self.warmup < self.main:
            raise ValueError(
                f"The warm-up takes {self.warmup} of {self.main} updates: expected "
                "fewer. Lower warmup_epochs, or lengthen the run."
            )

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return self.main + self.cooldown_updates

    @property
    def count(self) -> int:
        """Number of rounds."""
        return -(-self.updates // self.size)

    @property
    def last(self) -> int:
        """Index of the round, from 0, in which `main` ends: that of the last budget."""
        return -(-self.main // self.size) - 1

    @property
    def cooldown(self) -> int:
        """Number of rounds after `last`."""
        return self.count - 1 - self.last

    def span(self, index: int) -> tuple[int, int]:
        """Returns the first update of a round, from 0, and that of the next round."""
        start = min(index * self.size, self.updates)  # of the last one's next, the end
        return start, min(start + self.size, self.updates)
