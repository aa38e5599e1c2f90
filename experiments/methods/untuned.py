"""The model as it is: what tuning has to be better than."""

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Untuned:
    """Nothing trains: the base model is measured as it is."""

    title: ClassVar[str] = "untuned"
    knobs: ClassVar[tuple[str, ...]] = ()

    def check(self, name: str) -> None:
        """Raises nothing: there are no settings."""
        return None


@dataclasses.dataclass(frozen=True)
class TrueBox(Untuned):
    """Nothing trains, and the truth gives the prompt: the box around the true mask."""

    title: ClassVar[str] = "untuned, true box"
