"""The settings of every method, as `--METHOD.SETTING` takes them.

Those of SNELLA and its variants are in `kernelized`.
"""

import dataclasses
import math
from typing import Literal

Trained = Literal[
    "full",
    "partial1",
    "mlp3",
    "bias",
    "ssf",
    "vpt_shallow",
    "vpt_deep",
    "vqt",
    "adapter",
    "adaptformer",
    "mosa",
    "spt_adapter",
    "spt_lora",
    "gps",
    "noah",
    "lora",
    "dora",
    "klora",
    "mixk",
    "snell",
    "snella",
    "snella_masked",
    "snella_released",
]
"""The methods that are trained by steps."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """The linear probe."""

    strengths: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    """Inverse L2 strengths, from which the validation split chooses; it goes on beyond
    the lowest or the highest."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """A method that trains some of the model's own parameters."""

    lr: float
    """Peak learning rate."""
    weight_decay: float = 1e-4
    """Of AdamW."""

    @property
    def has_density(self) -> bool:
        """Whether there is a `target_density` that a search can choose."""
        return False

    def check(self, name: str) -> None:
        """Raises a `ValueError` on what would fail, as settings of a method."""
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"{name}.lr={self.lr}, {name}.weight_decay={self.weight_decay}: "
                "expected lr > 0 and weight_decay >= 0."
            )
        for field in COUNTS:
            if getattr(self, field, 1) < 1:
                raise ValueError(
                    f"{name}.{field}={getattr(self, field)}: expected at least 1."
                )


COUNTS = (
    "rank",
    "pieces",
    "floor_every",
    "count",
    "per_neuron",
    "limit",
    "population",
    "parents",
)


@dataclasses.dataclass(frozen=True)
class Ranked(Plain):
    """A method with factors or bottlenecks of some rank."""

    lr: float = 1e-2
    """Peak learning rate."""
    rank: int = 8
    """Columns of the factors."""


@dataclasses.dataclass(frozen=True)
class Parted(Ranked):
    """Bottlenecks in parts."""

    parts: int = 4
    """Into which the up-projection is divided."""

    def check(self, name: str) -> None:
        """As `Plain.check`."""
        super().check(name)
        if not 2 <= self.parts <= 127:
            raise ValueError(f"{name}.parts={self.parts}: expected 2 to 127.")


@dataclasses.dataclass(frozen=True)
class Located(Ranked):
    """What a first stage locates, SPT's way."""

    share: float = 0.005
    """Of the targeted weights: how many are sensitive."""
    ease: float = 10.0
    """A matrix gets a module of its own from 1 / ease as many sensitive weights on as
    the module has parameters."""

    def check(self, name: str) -> None:
        """As `Plain.check`."""
        super().check(name)
        if not (0 < self.share <= 1 and 0 < self.ease < math.inf):
            raise ValueError(
                f"{name}.share={self.share}, {name}.ease={self.ease}: expected "
                "0 < share <= 1 and ease > 0."
            )


@dataclasses.dataclass(frozen=True)
class Masked(Ranked):
    """Kernelized factors under a mask that a first stage fixes."""

    lr: float = 2e-2
    """Peak learning rate."""
    kernel: Literal["piecewise_linear", "mix_k"] = "mix_k"
    """Makes the update from the factors."""
    target_density: float = 0.3
    """Fraction of the targeted weights that move."""

    @property
    def has_density(self) -> bool:
        """That of the mask."""
        return True

    def check(self, name: str) -> None:
        """As `Plain.check`."""
        super().check(name)
        if not 0 < self.target_density <= 1:
            raise ValueError(
                f"{name}.target_density={self.target_density}: expected above 0, to 1."
            )
        if self.rank % 2:
            raise ValueError(
                f"{name}.rank={self.rank}: expected a multiple of 2, its pieces."
            )


@dataclasses.dataclass(frozen=True)
class Selected(Plain):
    """What a first stage selects, GPS's way."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Of AdamW; the selected weights have none in any case."""
    per_neuron: int = 1
    """Inputs of every output of the targeted kernels."""


@dataclasses.dataclass(frozen=True)
class Prompted(Plain):
    """A method with tokens of its own."""

    lr: float = 1e-2
    """Peak learning rate."""
    weight_decay: float = 1e-4
    """Of AdamW; the tokens have none in any case."""
    count: int = 10
    """Tokens, in each block where every block has its own."""


@dataclasses.dataclass(frozen=True)
class Searched(Plain):
    """What a search finds among prompts, LoRA and adapters, NOAH's way."""

    lr: float = 1e-3
    """Peak learning rate."""
    supernet_lr: float = 5e-4
    """That of the supernet."""
    supernet_epochs: int | None = None
    """For which the supernet trains. Default: as many as what is found."""
    sizes: tuple[int, ...] = (1, 5, 10)
    """Prompts of a block, rank of a matrix, or units of a bottleneck."""
    depths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Of the blocks, from the first on: how many may have modules of a kind."""
    limit: int = 640_000
    """Parameters that the modules may have."""
    generations: int = 15
    """Of the evolution, after the first."""
    population: int = 50
    """Subnets that are tried in a generation."""
    parents: int = 10
    """The best so far, from which a generation comes."""

    def check(self, name: str) -> None:
        """As `Plain.check`."""
        super().check(name)
        if not 0 < self.supernet_lr < math.inf:
            raise ValueError(f"{name}.supernet_lr={self.supernet_lr}: expected > 0.")
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"{name}.sizes={self.sizes}: expected positive numbers.")
        if not self.depths or not all(0 < share <= 1 for share in self.depths):
            raise ValueError(f"{name}.depths={self.depths}: expected shares of 1.")
        if self.generations < 0:
            raise ValueError(
                f"{name}.generations={self.generations}: expected at least 0."
            )
