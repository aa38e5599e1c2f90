"""Judges of the toy's pictures: a ViT-S/14, and a probe of emoji's subcategories.

They stand where CLIP and DINOv2 stand in the published evaluation, and are called what
they are: the fit of a picture to its prompt is `probe`, the probability that the probe
gives the subcategory of what the prompt is about.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from experiments.names import unknown
from experiments.pretrained import emoji_probe
from experiments.pretrained.emoji_probe import Probe
from experiments.training.judges import Features
from experiments.training.objective import Metric
from snella_jax.models.vit import ViT

PROBE = Metric("probe")
# Where emoji have what DreamBooth's classes and emoji's families are called.
SUBCATEGORIES: dict[str, tuple[str, ...]] = {
    "backpack": ("clothing",),
    "book": ("book-paper",),
    "boot": ("clothing",),
    "bowl": ("food-prepared",),
    "can": ("food-prepared",),
    "candle": ("light & video",),
    "cartoon": ("face-costume",),
    "cat": ("animal-mammal", "cat-face"),
    "clock": ("time",),
    "dog": ("animal-mammal",),
    "glasses": ("clothing",),
    "monkey": ("animal-mammal", "monkey-face"),
    "moon": ("sky & weather",),
    "postbox": ("mail",),
    "sneaker": ("clothing",),
    "stuffed animal": ("game",),
    "teapot": ("drink",),
    "toy": ("game",),
    "vase": ("dishware",),
}
HELP = "experiments/pretrained/toy_judges.py"


@dataclasses.dataclass(frozen=True, eq=False)
class ToyJudges:
    """The ViT for likeness and variety, the probe for the fit.

    Attributes:
      vit: the network whose class token the features are.
      probe: names subcategories from them.
      subcategories: those that count as right.
    """

    vit: ViT
    probe: Probe
    subcategories: tuple[str, ...]

    @property
    def fit(self) -> Metric:
        """Metric of the fit."""
        return PROBE

    def features(self, pictures: UInt8[np.ndarray, "N H W 3"]) -> Features:
        """Returns the class tokens, for both."""
        found = emoji_probe.features(self.vit, pictures)
        return Features(found, found)

    def fits(
        self, features: Features, prompts: Sequence[str]
    ) -> Float[np.ndarray, " N"]:
        """Returns the probability of the subcategories, whatever the place."""
        right = [self.probe.names.index(name) for name in self.subcategories]
        return self.probe.probabilities(features.likeness)[:, right].sum(1)


def load(class_name: str) -> ToyJudges:
    """Loads the judges of pictures of a class.

    Raises:
      ValueError: the class is none of an emoji or of DreamBooth.
      ModuleNotFoundError: the ViT's package is missing; says how to install it.
    """
    if class_name not in SUBCATEGORIES:
        text = unknown("class", class_name, SUBCATEGORIES, HELP)
        raise ValueError(f"--class_name: {text}")
    right = SUBCATEGORIES[class_name]
    return ToyJudges(emoji_probe.vit(), emoji_probe.load()[0], right)
