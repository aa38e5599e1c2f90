"""Linear probe: only the head trains, on features that are computed once.

The head is a multinomial logistic regression, fitted to convergence by scikit-learn's
L-BFGS. Being convex it has no learning rate to choose; its L2 strength is chosen on the
validation split instead (ties: the stronger), beyond those given where it is the lowest
or the highest of them.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from experiments.data.task import Task
from experiments.data.transforms import Transform
from experiments.training import evaluation
from experiments.training.grid import beyond


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear probe: a logistic regression on features, fitted to convergence."""

    title: ClassVar[str] = "linear probe"
    knobs: ClassVar[tuple[str, ...]] = ()

    strengths: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    """Inverse L2 strengths, from which the validation split chooses; it goes on beyond
    the lowest or the highest."""

    def check(self, name: str) -> None:
        """Raises a `ValueError` on strengths that no head can be fitted with."""
        good = all(0 < value < math.inf for value in self.strengths)
        if not self.strengths or not good:
            raise ValueError(
                f"{name}.strengths={self.strengths}: expected positive numbers."
            )


class NotConverged(RuntimeError):
    """L-BFGS did not converge."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted head and how it got there.

    Attributes:
      strength: scikit-learn's `C`, the inverse L2 strength, chosen on validation.
      steps: L-BFGS iterations to convergence.
      val_accuracy: on validation, of the head that was fitted to the training split.
      seconds_per_step: of one iteration, on features computed beforehand.
    """

    strength: float
    steps: int
    val_accuracy: float
    test_accuracy: float
    trainable: int
    seconds_per_step: float


def train(
    model: Any,
    task: Task,
    transform: Transform,
    mesh: Mesh,
    strengths: tuple[float, ...],
    extensions: int = 0,
    refit: bool = False,
    weights: str = "of the model",
    look: Callable[[int, Any], None] | None = None,
) -> Probe:
    """Fits a head for each `C` in `strengths` and keeps the best on validation.

    Args:
      model: a classifier with a `head`; what comes before it stays as it is.
      task: the splits; the test split is used once, for the head that is kept.
      transform: of the images.
      mesh: the devices that compute the features.
      strengths: inverse L2 strengths to choose from.
      extensions: how often to go on where the best is the lowest or the highest.
      refit: fit the head that is kept to training and validation together.
      weights: how errors call the model's weights.
      look: called with the index and the predicted class of every test example.

    Raises:
      NotConverged: one of `strengths` does not in 10,000 iterations.
      FloatingPointError: features that are not finite.
    """

    def features(source):
        found, labels = evaluation.features(model, source, transform, mesh)
        _check_finite(found, weights)
        return found, labels

    train, validation = features(task.train), features(task.validation)
    fits: dict[float, _Fit] = {}
    accuracies: dict[float, float] = {}

    def tried(new):
        """The best after some more; the stronger of those that are as good."""
        for strength in new:
            fits[strength] = _fitted(strength, *train)
            accuracies[strength] = float(fits[strength].head.score(*validation))
        return min(fits, key=lambda strength: (-accuracies[strength], strength))

    best = tried(strengths)
    with contextlib.suppress(NotConverged):  # of strengths that nobody asked for
        for _ in range(extensions):
            best = tried(beyond(list(fits), best))
    kept = fits[best]
    if refit:
        both = (np.concatenate(pair) for pair in zip(train, validation, strict=True))
        kept = _fitted(kept.head.C, *both)
    head = kept.head
    tested, labels = features(task.test)
    predicted = head.predict(tested)
    if look is not None:
        for index, label in enumerate(predicted.tolist()):
            look(index, label)
    return Probe(
        strength=head.C,
        steps=kept.steps,
        val_accuracy=accuracies[best],
        test_accuracy=float((predicted == labels).mean()),
        trainable=head.coef_.size + head.intercept_.size,
        seconds_per_step=kept.seconds_per_step,
    )


def _check_finite(features: np.ndarray, weights: str) -> None:
    if wrong := np.count_nonzero(~np.isfinite(features).all(1)):
        raise FloatingPointError(
            f"the weights {weights} give {wrong} of {len(features)} images features "
            "that are not finite (NaN, inf)"
        )


@dataclasses.dataclass(frozen=True)
class _Fit:
    head: Any  # LogisticRegression
    steps: int
    seconds_per_step: float


def _fitted(strength: float, features: np.ndarray, labels: np.ndarray) -> _Fit:
    from sklearn.linear_model import LogisticRegression  # slow to import

    start = time.perf_counter()
    head = LogisticRegression(C=strength, max_iter=10_000).fit(features, labels)
    steps = int(head.n_iter_[0])
    if steps == head.max_iter:
        raise NotConverged(f"C={strength} did not converge in {steps} iterations.")
    return _Fit(head, steps, (time.perf_counter() - start) / max(1, steps))
