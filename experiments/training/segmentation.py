"""Segmentation: cross entropy and soft IoU of one mask; Dice and IoU by image.

Two kinds of number stand side by side. `dice` and `iou` are what the literature on
polyps calls mDice and mIoU: each image is measured at its own size, and the images are
averaged. `recall_pooled` and `dice_of_recall` are what GPS's evaluation of SAM
(github.com/FightingFighting/GPS), whose protocol SNELLA's Table V follows, prints as
mIoU and mDice. They are not comparable with the first two: it leaves out all pixels
that are background in truth, so that false alarms cost nothing and a prediction of
foreground everywhere gets 1.0 for both.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from matplotlib.axes import Axes

from experiments import plotting
from experiments.data.mask_transforms import MaskTransform
from experiments.data.pairs import Pair
from experiments.training.objective import Batch, Metric, Sums

POOLINGS = ("image", "batch")
RELEASED = 128  # of 255: the released script's threshold of probabilities


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """Objective of batches with `image`, `mask` and `inside`, as `MaskTransform` makes.

    The model takes images and returns mask logits `[B, M, h, w]` and something else;
    the first mask counts, resized bilinearly to the size of the transform.

    Attributes:
      transform: makes the arrays of what is evaluated, and undoes its resizing.
      pooling: "image" takes the sums of the loss by image and averages the images, as
        GPS's `_iou_loss` does; "batch" takes them over all pixels of a batch. In
        batches of one, as in GPS's recipe, the two are the same.
    """

    transform: MaskTransform
    pooling: Literal["image", "batch"] = "image"

    metrics = tuple(
        Metric(name, percent=True)
        for name in ("dice", "iou", "recall_pooled", "dice_of_recall")
    )

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise ValueError(
                f"pooling={self.pooling!r}: expected {' or '.join(POOLINGS)}."
            )

    def loss(
        self, model: Any, batch: Batch, key: PRNGKeyArray | None
    ) -> Float[Array, ""]:
        """Returns the mean binary cross entropy plus the soft IoU loss, in float32.

        With probabilities p and the mask t, the second is
        `1 - sum(p t) / (sum(p) + sum(t) - sum(p t))`, and 0 where the denominator is:
        nothing is there and nothing was found. Padding counts in neither.
        """
        logits = self._logits(model, batch)
        inside, target = batch["inside"].astype(jnp.float32), batch["mask"]
        axes = None if self.pooling == "batch" else (1, 2)
        entropy = optax.sigmoid_binary_cross_entropy(logits, target)
        mean = (entropy * inside).sum(axes) / inside.sum(axes)
        found = jax.nn.sigmoid(logits) * inside
        both = (found * target).sum(axes)
        either = found.sum(axes) + target.sum(axes) - both
        iou = jnp.where(either > 0, both / jnp.where(either > 0, either, 1), 1)
        return (mean + 1 - iou).mean()

    def outputs(self, model: Any, batch: Batch) -> Float[Array, "B size size"]:
        """Returns the probabilities of foreground at the transform's size, float32."""
        return jax.nn.sigmoid(self._logits(model, batch))

    def sums(
        self, outputs: Float[Array, "B size size"], batch: Batch
    ) -> dict[str, Array]:
        """Returns the pixels of the foreground, and how many of them were found.

        As released: at the model's size, probabilities above 128 / 255.
        """
        truth = (batch["mask"] > 0) & batch["valid"][:, None, None]
        found = (outputs * 255 > RELEASED) & truth
        return {"found": found.sum(), "foreground": truth.sum()}

    def score(
        self, example: Pair, output: Float[np.ndarray, "size size"]
    ) -> dict[str, float]:
        """Returns Dice and IoU of an image at its own size, of probabilities over 0.5.

        Both are 1 where image and prediction are empty.
        """
        truth, found = example["mask"] > 0, self.found(example, output)
        dice, iou = dice_and_iou(found, truth)
        return {"dice": dice, "iou": iou, "images": 1}

    def found(
        self, example: Pair, output: Float[np.ndarray, "size size"]
    ) -> Bool[np.ndarray, "H W"]:
        """Returns the predicted mask at the size of the image."""
        height, width = example["mask"].shape
        return self.transform.restored(output, (height, width)) > 0.5

    def numbers(self, sums: Sums) -> dict[str, float]:
        """Returns the means of Dice and IoU, and the released measure.

        With r, the share of all foreground pixels that were found (1 if there are
        none), GPS prints r as mIoU and 2 r / (1 + r) as mDice: without
        background in truth, nothing that was found is wrong.
        """
        images, foreground = sums["images"], sums["foreground"]
        recall = sums["found"] / foreground if foreground else 1.0
        return {
            "dice": sums["dice"] / images,
            "iou": sums["iou"] / images,
            "recall_pooled": recall,
            "dice_of_recall": 2 * recall / (1 + recall),
        }

    def draw(
        self, axes: Axes, example: Pair, output: Float[np.ndarray, "size size"]
    ) -> None:
        """Draws the predicted mask on the image, with the contour of the true one."""
        truth, found = example["mask"] > 0, self.found(example, output)
        plotting.overlay(axes, example["image"], found, truth)
        axes.set_title(f"Dice {dice_and_iou(found, truth)[0]:.3f}", fontsize=8)

    def masks(self, model: Any, batch: Batch) -> Float[Array, "B M h w"]:
        """Returns the model's logits of masks, without a prompt."""
        return model(batch["image"])[0]

    def _logits(self, model: Any, batch: Batch) -> Float[Array, "B size size"]:
        logits = self.masks(model, batch)[:, 0].astype(jnp.float32)
        return jax.image.resize(logits, batch["mask"].shape, "bilinear")


def dice_and_iou(
    found: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]
) -> tuple[float, float]:
    """Returns `2 TP / (2 TP + FP + FN)` and `TP / (TP + FP + FN)`; 1 for empty masks.

    >>> dice_and_iou(np.array([[True, True]]), np.array([[True, False]]))
    (0.6666666666666666, 0.5)
    """
    both, either = int((found & truth).sum()), int((found | truth).sum())
    return (2 * both / (both + either), both / either) if either else (1.0, 1.0)
