"""Runs on images: their protocol says which splits are trained on and followed."""

import dataclasses
from typing import Literal, Self

from experiments.config.run_config import RunConfig
from experiments.training.session import Followed

Protocol = Literal["choose", "final", "released"]


@dataclasses.dataclass(frozen=True)
class SplitConfig(RunConfig):
    """A run that trains and follows what its protocol says.

    Attributes:
      protocol: "choose" trains on the training split and follows validation; "final"
        trains on both and follows nothing; "released" trains on both and follows the
        test split.
    """

    protocol: Protocol = "choose"

    @property
    def trains_on_all(self) -> bool:
        """True if what is tested is trained on training and validation images."""
        return self.search or self.protocol != "choose"

    @property
    def followed(self) -> Followed | None:
        """The split that is evaluated during training."""
        if not self.trains_on_all:
            return "validation"
        return "test" if self.protocol == "released" else None

    def trial(self) -> Self:
        """Returns the config of a trial of the search, which follows validation."""
        return dataclasses.replace(super().trial(), protocol="choose")

    def check_search(self) -> None:
        """Raises a `ValueError` on a search that would fail in its midst."""
        if self.protocol == "released":
            raise ValueError(
                "search with protocol=released would follow the test split: expected "
                "protocol=final."
            )
        super().check_search()
