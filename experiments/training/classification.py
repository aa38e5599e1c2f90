"""Classification of images: cross entropy and accuracy."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.axes import Axes

from experiments import plotting
from experiments.data.source import Example
from experiments.training.objective import Batch, Metric, Sums


@dataclasses.dataclass(frozen=True)
class Classification:
    """Objective of batches with `image [B, ...]` and `label`.

    Labels are int32 `[B]`, or, to train on, distributions over the classes,
    `[B, classes]`.

    Attributes:
      names: names of the classes, for pictures; numbers stand for missing ones.
    """

    names: tuple[str, ...] = ()

    metrics = (Metric("accuracy", percent=True),)
    score = None

    def loss(
        self, model: Any, batch: Batch, key: PRNGKeyArray | None
    ) -> Float[Array, ""]:
        """Returns the mean cross entropy, computed in float32."""
        logits, labels = model(batch["image"], key).astype(jnp.float32), batch["label"]
        entropy = (
            optax.softmax_cross_entropy_with_integer_labels
            if labels.ndim == 1
            else optax.softmax_cross_entropy
        )
        return entropy(logits, labels).mean()

    def outputs(self, model: Any, batch: Batch) -> Int[Array, " B"]:
        """Returns the most likely classes."""
        return model(batch["image"]).argmax(-1)

    def sums(self, outputs: Int[Array, " B"], batch: Batch) -> dict[str, Array]:
        """Returns how many are right, of how many."""
        right = (outputs == batch["label"]) & batch["valid"]
        return {"right": right.sum(), "count": batch["valid"].sum()}

    def numbers(self, sums: Sums) -> dict[str, float]:
        """Returns the accuracy."""
        return {"accuracy": sums["right"] / sums["count"]}

    def draw(self, axes: Axes, example: Example, output: int) -> None:
        """Draws the image under its predicted class, and the true one where it differs.

        Args:
          output: the predicted class.
        """
        image, truth = example["image"], int(example["label"])
        axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray")
        right = int(output) == truth
        title = self._name(int(output)) + (
            "" if right else f"\n(is {self._name(truth)})"
        )
        axes.set_title(title, fontsize=8, color="black" if right else "tab:red")

    def _name(self, label: int) -> str:
        known = label < len(self.names)
        return plotting.label(self.names[label] if known else str(label))


@dataclasses.dataclass(frozen=True)
class ByLoss(Classification):
    """Classification whose mean cross entropy is followed, and then its accuracy."""

    metrics = (Metric("loss", more_is_better=False), Metric("accuracy", percent=True))

    def outputs(self, model: Any, batch: Batch) -> Float[Array, "B classes"]:
        """Returns the logits, in float32."""
        return model(batch["image"]).astype(jnp.float32)

    def sums(
        self, outputs: Float[Array, "B classes"], batch: Batch
    ) -> dict[str, Array]:
        """Returns the sum of the cross entropies, how many are right, of how many."""
        entropy = optax.softmax_cross_entropy_with_integer_labels(
            outputs, batch["label"]
        )
        loss = jnp.where(batch["valid"], entropy, 0).sum()
        return {"loss": loss, **super().sums(outputs.argmax(-1), batch)}

    def numbers(self, sums: Sums) -> dict[str, float]:
        """Returns the mean cross entropy and the accuracy."""
        return {"loss": sums["loss"] / sums["count"], **super().numbers(sums)}

    def draw(self, axes: Axes, example: Example, output: Any) -> None:
        """Draws as `Classification`; `output` is the logits."""
        super().draw(axes, example, int(output.argmax()))
