"""The training loop: steps that update importance, epochs that move the budgets."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

import snella_jax as snella
from experiments.checkpoints import Checkpoints
from experiments.data import pipeline
from experiments.data.source import Source
from experiments.data.task import Task
from experiments.data.transforms import Transform

Schedule = Callable[[int], int]


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What one epoch left behind.

    Attributes:
      epoch: from 1.
      train_loss: mean over the epoch's steps.
      val_accuracy: on the validation split, after the epoch.
      density: fraction of the adapted weights that could move in this epoch; None where
        the method has no budgets.
      seconds_per_step: median over the epoch's steps but the first, which may compile.
      moved: what the reallocation before this epoch did, if there was one.
    """

    epoch: int
    train_loss: float
    val_accuracy: float
    density: float | None
    seconds_per_step: float
    moved: snella.Reallocation | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long and how fast to train."""

    epochs: int
    warmup_epochs: int
    batch: int
    lr: float
    weight_decay: float
    seed: int

    def optimizer(self, steps: int, *first: optax.GradientTransformation):
        """AdamW with a linear warm-up and a cosine to 1% of `lr`, after `first`."""
        schedule = optax.warmup_cosine_decay_schedule(
            0.0,
            self.lr,
            self.warmup_epochs * steps,
            self.epochs * steps,
            self.lr / 100,
        )
        decay = {"weight_decay": self.weight_decay, "mask": snella.decay_mask}
        return optax.chain(*first, optax.adamw(schedule, **decay))


class Trainer:
    """Trains every `nnx.Param` of a model, an epoch at a time.

    Order, augmentation and noise depend on the seed and the step alone: a run that goes
    on from a checkpoint, on the same machine with the same versions, ends with the same
    numbers as one that was not interrupted (as far as the device is deterministic).

    Attributes:
      passed: epochs that are over.
    """

    def __init__(
        self,
        model: nnx.Module,
        task: Task,
        recipe: Recipe,
        transform: Transform,
        watch: tuple[optax.GradientTransformation, ...] = (),
        schedule: Schedule | None = None,
        checkpoints: Checkpoints | None = None,
    ):
        """Goes on where the newest checkpoint was, if there is one.

        Args:
          model: a classifier, adapted or not, whose frozen parts are no `nnx.Param`.
          task: trains on its training source and follows the validation source.
          recipe: length and rates.
          transform: of the images.
          watch: transformations in front of the optimizer (`snella.track_importance`).
          schedule: the total budget of each epoch, from 0; None where nothing has
            budgets.
          checkpoints: where each epoch's end is saved.
        """
        self.task, self.recipe, self.transform = task, recipe, transform
        self.schedule, self.checkpoints = schedule, checkpoints
        self.steps = len(task.train) // recipe.batch
        self.graphdef, trainable, budgets, self.frozen = nnx.split(
            model, nnx.Param, snella.Budget, ...
        )
        tx = recipe.optimizer(self.steps, *watch)
        self.state: dict[str, Any] = {
            "trainable": trainable,
            "opt_state": tx.init(trainable),
            "budgets": budgets,
        }
        self.weights = snella.adapted_weights(model) if budgets else 0
        self.step = jax.jit(training_step(self.graphdef, tx))
        self.predict = jax.jit(_predict(self.graphdef))
        self.stream = iter(
            pipeline.training(
                task.train,
                transform,
                batch=recipe.batch,
                epochs=recipe.epochs,
                seed=recipe.seed,
            )
        )
        self.passed = 0
        if checkpoints and (found := checkpoints.newest(self.state)):
            self.passed, self.state, position = found
            self.stream.set_state(position)

    @property
    def model(self) -> Any:
        """The model as it is now."""
        return nnx.merge(self.graphdef, *self._states)

    @property
    def _states(self) -> tuple[Any, Any, Any]:
        return self.state["trainable"], self.state["budgets"], self.frozen

    def epochs(self, on_step: Callable[[float], None]) -> Iterator[Epoch]:
        """Trains; yields after each epoch that is left, and saves it after that.

        Args:
          on_step: called with the loss after every step.

        Raises:
          FloatingPointError: a loss or update that is not finite; names the step, the
            images and the last good checkpoint, which stays.
        """
        for epoch in range(self.passed, self.recipe.epochs):
            moved = None
            if self.schedule is not None and epoch:
                self.state["budgets"], moved = snella.reallocate(
                    self.state["budgets"], self.state["opt_state"], self.schedule(epoch)
                )
            losses, seconds = self._train(epoch, on_step)
            val = count_hits(
                self.predict, self._states, self.task.validation, self.transform
            )
            yield Epoch(
                epoch=epoch + 1,
                train_loss=float(np.mean(losses)),
                val_accuracy=val,
                density=_density(self.state["budgets"], self.weights),
                seconds_per_step=float(np.median(seconds[1:] or seconds)),
                moved=moved,
            )
            self.passed = epoch + 1
            if self.checkpoints is not None:  # now: what was yielded is on record
                position = self.stream.get_state()
                self.checkpoints.save(self.passed, self.state, position, val)

    def _train(
        self, epoch: int, on_step: Callable[[float], None]
    ) -> tuple[list[float], list[float]]:
        """Losses and seconds of an epoch's steps."""
        key, losses, seconds = jax.random.key(self.recipe.seed), [], []
        for index in range(self.steps):
            start = time.perf_counter()
            batch = next(self.stream)
            trainable, budgets, frozen = self._states
            self.state["trainable"], self.state["opt_state"], loss = self.step(
                trainable,
                self.state["opt_state"],
                budgets,
                frozen,
                batch["image"],
                batch["label"],
                jax.random.fold_in(key, epoch * self.steps + index),
            )
            losses.append(float(loss))
            seconds.append(time.perf_counter() - start)
            if not math.isfinite(losses[-1]):
                images = batch["index"].tolist()
                raise FloatingPointError(
                    f"the loss or its gradient is not finite at step {index + 1} of "
                    f"epoch {epoch + 1}, on the training images {images}; "
                    f"{self._last_good()}"
                )
            on_step(losses[-1])
        return losses, seconds

    def _last_good(self) -> str:
        saved = self.checkpoints and self.checkpoints.last()
        if self.checkpoints is None or not saved:
            return "there is no checkpoint before it"
        return f"the checkpoint of epoch {saved} is in {self.checkpoints.folder}"


def evaluate(model: nnx.Module, source: Source, transform: Transform) -> float:
    """Accuracy of a model on a source."""
    graphdef, state = nnx.split(model)
    return count_hits(jax.jit(_predict(graphdef)), (state,), source, transform)


def count_hits(
    predict: Callable[[tuple, Array], Array],
    states: tuple,
    source: Source,
    transform: Transform,
) -> float:
    """Accuracy of predictions on a source, in batches of one shape."""
    hits = 0
    for batch in pipeline.evaluation(source, transform, batch=min(256, len(source))):
        right = np.asarray(predict(states, batch["image"])) == batch["label"]
        hits += int((right & batch["valid"]).sum())
    return hits / len(source)


def training_step(graphdef: nnx.GraphDef, tx: optax.GradientTransformation) -> Callable:
    """One step on the cross entropy, to be jitted.

    Returns:
      A function of `trainable, opt_state, budgets, frozen, images, labels, key` that
      gives the new `trainable` and `opt_state` and the loss; not a number, too, where
      the update is not finite.
    """

    def step(trainable, opt_state, budgets, frozen, images, labels, key):
        def loss_fn(trainable):
            model: Any = nnx.merge(graphdef, trainable, budgets, frozen)
            key_adapter, key_model = jax.random.split(key)
            snella.seed(model, key_adapter)
            logits = model(images, key_model).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        loss = jnp.where(jnp.isfinite(optax.tree.norm(updates)), loss, jnp.nan)
        return optax.apply_updates(trainable, updates), opt_state, loss

    return step


def _predict(graphdef: nnx.GraphDef) -> Callable[[tuple, Array], Array]:
    def predict(states: tuple, images: Array) -> Array:
        model: Any = nnx.merge(graphdef, *states)
        model.eval()
        return model(images).argmax(-1)

    return predict


def _density(budgets: nnx.State, weights: int) -> float | None:
    if not weights:
        return None
    now = sum(
        int(np.asarray(value[...], np.int64).sum())
        for path, value in nnx.to_flat_state(budgets)
        if path[-1] == "budget"
    )
    return now / weights
