"""What a first stage is: it looks at a task and says what shall train on it."""

from typing import Any, Protocol

import numpy as np

from experiments.config.run_config import RunConfig
from experiments.training.session import Setting

Places = dict[str, np.ndarray]  # of ints or bools, by name: what was located


class Stage(Protocol):
    """A first stage."""

    def locate(self, setting: Setting) -> Places:
        """What it finds on a task; the test split plays no part."""
        ...

    def typical(self, config: RunConfig, base: Any) -> Places:
        """What it might find, without a look, to check settings and measure memory."""
        ...
