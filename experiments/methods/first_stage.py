"""First stages: a look at a task that decides what trains on it."""

import abc
import dataclasses
from typing import Any

from experiments.methods.method import Method
from experiments.training.session import Places, Scope, Session


@dataclasses.dataclass(frozen=True)
class Staged(Method):
    """A method with a first stage, whose result `adapt` finds in `scope.places`."""

    @abc.abstractmethod
    def locate(self, session: Session) -> Places:
        """Returns what the first stage finds on a task, without its test split.

        Raises:
          FloatingPointError: a loss or score is not finite.
          ValueError, RuntimeError: it finds nothing; says why.
        """

    @abc.abstractmethod
    def typical(self, base: Any, scope: Scope) -> Places:
        """Returns places as `locate` might, without a look at the task.

        Checks of settings and measurements of memory use them.
        """

    @property
    def variant(self) -> str:
        """Part of the name of the file of places, for settings that change them."""
        return ""
