"""Judges of drawn pictures: likeness to photographs, fit to prompts, variety.

The published measures are CLIP's and DINOv2's; other networks may stand in their
places, and then the measures have names of their own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8

from experiments.training.objective import Metric
from experiments.training.vendi import vendi

ALIGNMENT = Metric("image_alignment")
OF_PROMPTS, OF_CONCEPT = Metric("vendi_prompt"), Metric("vendi_concept")
Pictures = UInt8[np.ndarray, "N H W 3"]


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of `N` pictures, a row for each.

    Attributes:
      likeness: features whose cosines say how alike pictures are, and what prompts are
        compared with.
      variety: features of the Vendi score; may be the same.
    """

    likeness: Float[np.ndarray, "N D"]
    variety: Float[np.ndarray, "N E"]


class Judges(Protocol):
    """Networks that look at pictures."""

    @property
    def fit(self) -> Metric:
        """Metric of the fit of pictures to their prompts."""
        ...

    def features(self, pictures: Pictures) -> Features:
        """Returns the features of pictures of any size."""
        ...

    def fits(
        self, features: Features, prompts: Sequence[str]
    ) -> Float[np.ndarray, " N"]:
        """Returns how well each picture fits its prompt.

        Args:
          features: those of the pictures.
          prompts: a prompt for each picture, with the class's name alone, without the
            token that stands for a concept.
        """
        ...


def metrics(judges: Judges) -> tuple[Metric, ...]:
    """Returns the metrics that `measured` gives values of."""
    return ALIGNMENT, judges.fit, OF_PROMPTS, OF_CONCEPT


def measured(
    judges: Judges,
    pictures: UInt8[np.ndarray, "P K H W 3"],
    prompts: Sequence[str],
    photographs: Pictures,
) -> dict[str, float]:
    """Returns the metrics of a concept.

    Args:
      judges: the networks.
      pictures: `K` pictures for each of `P` prompts.
      prompts: the prompts without the token.
      photographs: those of the concept.

    Returns:
      `image_alignment`, the mean cosine of the features of every picture with those of
      every photograph; the metric of `judges.fit`, the mean over all pictures;
      `vendi_prompt`, the mean over the prompts of the Vendi score of their `K`
      pictures; `vendi_concept`, that of all `P K` pictures.
    """
    count, each = pictures.shape[:2]
    seen = judges.features(pictures.reshape(count * each, *pictures.shape[2:]))
    concept = judges.features(photographs)
    cosines = unit(seen.likeness) @ unit(concept.likeness).T
    repeated = [prompt for prompt in prompts for _ in range(each)]
    by_prompt = seen.variety.reshape(count, each, -1)
    return {
        ALIGNMENT.name: float(cosines.mean()),
        judges.fit.name: float(np.mean(judges.fits(seen, repeated))),
        OF_PROMPTS.name: float(np.mean([vendi(own) for own in by_prompt])),
        OF_CONCEPT.name: vendi(seen.variety),
    }


def unit(rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Returns rows of length 1, float64."""
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
