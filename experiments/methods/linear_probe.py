"""Linear probe: only the head trains, on features that are computed once.

The head is a multinomial logistic regression, fitted to convergence by scikit-learn's
L-BFGS. Being convex it has no learning rate to choose; its L2 strength is chosen on the
validation split instead (ties: the stronger).
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression

from experiments.data.task import InMemory, Split


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted head and how it got there.

    Attributes:
      strength: scikit-learn's `C`, the inverse L2 strength, chosen on validation.
      steps: L-BFGS iterations to convergence.
      seconds_per_step: of one iteration, on features computed beforehand.
    """

    strength: float
    steps: int
    val_accuracy: float
    test_accuracy: float
    trainable: int
    seconds_per_step: float


def train(model: Any, task: InMemory, strengths: tuple[float, ...]) -> Probe:
    """Fits a head for each `C` in `strengths` and keeps the best on validation.

    Args:
      model: a classifier with a `head`; what comes before it stays as it is.
      task: the splits; the test split is used once, for the head that is kept.
      strengths: inverse L2 strengths to choose from.

    Raises:
      RuntimeError: a fit that does not converge in 10,000 iterations.
    """
    train, validation = (_features(model, s) for s in (task.train, task.validation))
    fits = []
    for strength in sorted(strengths):
        start = time.perf_counter()
        head = LogisticRegression(C=strength, max_iter=10_000)
        head.fit(train, task.train.labels)
        steps = int(head.n_iter_[0])
        if steps == head.max_iter:
            raise RuntimeError(f"C={strength} did not converge in {steps} iterations.")
        seconds = (time.perf_counter() - start) / steps
        accuracy = float(head.score(validation, task.validation.labels))
        fits.append((accuracy, head, strength, steps, seconds))
    accuracy, head, strength, steps, seconds = max(fits, key=lambda fit: fit[0])
    test = _features(model, task.test)
    return Probe(
        strength=strength,
        steps=steps,
        val_accuracy=accuracy,
        test_accuracy=float(head.score(test, task.test.labels)),
        trainable=head.coef_.size + head.intercept_.size,
        seconds_per_step=seconds,
    )


def _features(model: Any, split: Split) -> Float[np.ndarray, "N D"]:
    headless = nnx.clone(model)
    headless.head = lambda pooled: pooled
    graphdef, state = nnx.split(headless)
    return np.asarray(jax.jit(lambda x: nnx.merge(graphdef, state)(x))(split.images))
