"""Answers of a language model: cross entropy of the next token, and accuracy by labels.

A record names its answers, `true` and `false`, say. Written out behind the record's
question they begin alike, and at one place their tokens differ for the first time: the
model's answer is that whose token is the likeliest there. So one forward of a record
with its right answer gives loss and accuracy: no token sees those after it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.axes import Axes

from experiments.training.objective import Batch, Metric, Sums

LOSS = Metric("loss", more_is_better=False)
ACCURACY = Metric("accuracy", percent=True)


@dataclasses.dataclass(frozen=True)
class Answers:
    """Objective of records with answers.

    Batches have, beside `valid` and `index`:

    - `tokens`, int32 `[B, T]`, and `mask`, bool `[B, T]`, True for real ones;
    - `learnt`, int32 `[B, A]`: places of the tokens that the loss predicts; 0, which
      nothing predicts, fills up;
    - `at`, int32 `[B]`: the place at which the candidates differ;
    - `candidates`, int32 `[B, C]`: their tokens there; -1 fills up;
    - `label`, int32 `[B]`: the right one of them;
    - `test`, int32 `[B]`: the test that a record is of.

    Attributes:
      tests: names of the tests.
    """

    tests: Sequence[str]

    score = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Loss, mean accuracy of the tests, and the accuracy of each.

        The loss is the mean over all tokens that are predicted. Tests without an
        example have no accuracy and do not count in the mean.
        """
        own = (Metric(accuracy_of(test), percent=True) for test in self.tests)
        return (LOSS, ACCURACY, *own)

    def loss(
        self, model: Any, batch: Batch, key: PRNGKeyArray | None
    ) -> Float[Array, ""]:
        """Returns the mean cross entropy of the learnt tokens, float32; 0 of none."""
        hidden = model.hidden(batch["tokens"], mask=batch["mask"])
        entropy, counts = _entropy(model, hidden, batch["tokens"], batch["learnt"])
        return entropy.sum() / jnp.maximum(counts.sum(), 1)

    def outputs(self, model: Any, batch: Batch) -> dict[str, Array]:
        """Returns each record's cross entropy, `[B]`, and its answer, int32 `[B]`."""
        hidden = model.hidden(batch["tokens"], mask=batch["mask"])
        entropy, _ = _entropy(model, hidden, batch["tokens"], batch["learnt"])
        logits = model.logits(_at(hidden, batch["at"][:, None] - 1)[:, 0])
        candidates = batch["candidates"]
        scores = jnp.take_along_axis(logits, jnp.maximum(candidates, 0), 1)
        scores = jnp.where(candidates < 0, -jnp.inf, scores)
        return {"entropy": entropy, "answer": scores.argmax(1)}

    def sums(self, outputs: dict[str, Array], batch: Batch) -> dict[str, Array]:
        """Returns the cross entropy, of how many tokens, and what each test adds."""
        valid = batch["valid"]
        right = (outputs["answer"] == batch["label"]) & valid
        found = {
            "entropy": jnp.where(valid, outputs["entropy"], 0).sum(),
            "tokens": ((batch["learnt"] > 0) & valid[:, None]).sum(),
        }
        for number in range(len(self.tests)):
            own = batch["test"] == number
            found[f"right_{number}"] = (own & right).sum()
            found[f"count_{number}"] = (own & valid).sum()
        return found

    def numbers(self, sums: Sums) -> dict[str, float]:
        """Returns the loss, and the accuracies of the tests that have examples."""
        own = {
            accuracy_of(test): sums[f"right_{number}"] / sums[f"count_{number}"]
            for number, test in enumerate(self.tests)
            if sums[f"count_{number}"]
        }
        loss = sums["entropy"] / sums["tokens"]
        mean = sum(own.values()) / len(own)
        return {LOSS.name: loss, ACCURACY.name: mean, **own}

    def draw(self, axes: Axes, example: Any, output: Any) -> None:
        """Writes the number of the answer, and that of the right one."""
        answer, right = int(output["answer"]), int(example["label"])
        text = f"{answer + 1}" + f" (is {right + 1})" * (answer != right)
        axes.set_title(text, fontsize=8)


def accuracy_of(test: str) -> str:
    """Returns the name of the metric of a test.

    >>> accuracy_of("boolq")
    'accuracy_boolq'
    """
    return f"accuracy_{test}"


def log_likelihoods(
    model: Any, batch: Batch, learnt: Int[Array, "B A"]
) -> Float[Array, " B"]:
    """Returns the sum of the log-likelihoods of some tokens of each text, float32.

    Args:
      model: in evaluation mode.
      batch: `tokens` and `mask`, `[B, T]`.
      learnt: places of the tokens; 0 fills up.
    """
    hidden = model.hidden(batch["tokens"], mask=batch["mask"])
    return -_entropy(model, hidden, batch["tokens"], learnt)[0]


def _entropy(
    model: Any,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    learnt: Int[Array, "B A"],
) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """Returns sums of the cross entropy, and of how many tokens.

    Logits are of what predicts a learnt token alone: of all tokens they would take
    `4 * vocab` bytes a token.
    """
    logits = model.logits(_at(hidden, jnp.maximum(learnt - 1, 0))).astype(jnp.float32)
    targets = jnp.take_along_axis(tokens, learnt, 1)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    counted = learnt > 0
    return jnp.where(counted, each, 0).sum(1), counted.sum(1)


def _at(hidden: Float[Array, "B T D"], places: Int[Array, "B A"]) -> Array:
    return jax.vmap(lambda rows, own: rows[own])(hidden, places)
