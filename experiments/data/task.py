"""A classification task: three splits of images and labels, ready for a model."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Split:
    """`N` examples.

    Attributes:
      images: float32 `[N, H, W, C]`, normalised as the model expects.
      labels: int32 `[N]`, from 0.
    """

    images: Float[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run trains on; `name` is how tables call the data set."""

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
