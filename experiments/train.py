"""The training loop: steps that update importance, epochs that move the budgets."""

import dataclasses
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
from experiments.data.task import InMemory, Split

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


def fit(
    model: nnx.Module,
    task: InMemory,
    recipe: Recipe,
    watch: tuple[optax.GradientTransformation, ...] = (),
    schedule: Schedule | None = None,
    on_step: Callable[[int, int, float], None] = lambda *_: None,
) -> Iterator[tuple[Epoch, nnx.Module]]:
    """Trains every `nnx.Param` of `model`; yields after each epoch.

    Args:
      model: a classifier, adapted or not, whose frozen parts are no `nnx.Param`.
      task: trains on its training split and follows the validation split.
      recipe: length and rates.
      watch: transformations in front of the optimizer (`snella.track_importance`).
      schedule: the total budget of each epoch, from 0; None where nothing has budgets.
      on_step: called with epoch, step and the loss of the step before.

    Yields:
      What the epoch left behind, and the model as it is then.
    """
    steps = len(task.train) // recipe.batch
    graphdef, trainable, budgets, frozen = nnx.split(
        model, nnx.Param, snella.Budget, ...
    )
    tx = recipe.optimizer(steps, *watch)
    opt_state = tx.init(trainable)
    step, accuracy = jax.jit(training_step(graphdef, tx)), _accuracy(graphdef)
    images, labels = jnp.asarray(task.train.images), jnp.asarray(task.train.labels)
    key = jax.random.key(recipe.seed)
    order = np.random.default_rng(recipe.seed)
    moved = None

    for epoch in range(recipe.epochs):
        if schedule is not None and epoch:
            budgets, moved = snella.reallocate(budgets, opt_state, schedule(epoch))
        losses, seconds = [], []
        shuffled = order.permutation(len(task.train))[: steps * recipe.batch]
        for index, batch in enumerate(shuffled.reshape(steps, -1)):
            start = time.perf_counter()
            noise = jax.random.fold_in(key, epoch * steps + index)
            trainable, opt_state, loss = step(
                trainable,
                opt_state,
                budgets,
                frozen,
                images[batch],
                labels[batch],
                noise,
            )
            losses.append(float(loss))
            seconds.append(time.perf_counter() - start)
            on_step(epoch, index, losses[-1])
        val = accuracy(trainable, budgets, frozen, task.validation)
        yield (
            Epoch(
                epoch=epoch + 1,
                train_loss=float(np.mean(losses)),
                val_accuracy=val,
                density=_density(model, budgets),
                seconds_per_step=float(np.median(seconds[1:] or seconds)),
                moved=moved,
            ),
            nnx.merge(graphdef, trainable, budgets, frozen),
        )


def evaluate(model: nnx.Module, split: Split, batch: int = 256) -> float:
    """Accuracy of a model on a split."""
    graphdef, state = nnx.split(model)
    return _count_hits(jax.jit(_predict(graphdef)), (state,), split, batch)


def training_step(graphdef: nnx.GraphDef, tx: optax.GradientTransformation) -> Callable:
    """One step on the cross entropy, to be jitted.

    Returns:
      A function of `trainable, opt_state, budgets, frozen, images, labels, key` that
      gives the new `trainable` and `opt_state` and the loss.
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
        return optax.apply_updates(trainable, updates), opt_state, loss

    return step


def _accuracy(graphdef: nnx.GraphDef) -> Callable[..., float]:
    predict = jax.jit(_predict(graphdef))

    def accuracy(trainable, budgets, frozen, split: Split) -> float:
        return _count_hits(predict, (trainable, budgets, frozen), split, 256)

    return accuracy


def _predict(graphdef: nnx.GraphDef) -> Callable[[tuple, Array], Array]:
    def predict(states: tuple, images: Array) -> Array:
        model: Any = nnx.merge(graphdef, *states)
        model.eval()
        return model(images).argmax(-1)

    return predict


def _count_hits(predict: Callable, states: tuple, split: Split, batch: int) -> float:
    hits = 0
    for i in range(0, len(split), batch):
        predicted = predict(states, split.images[i : i + batch])
        hits += int((predicted == split.labels[i : i + batch]).sum())
    return hits / len(split)


def _density(model: nnx.Module, budgets: nnx.State) -> float | None:
    if not budgets:
        return None
    now = sum(
        int(np.asarray(value[...], np.int64).sum())
        for path, value in nnx.to_flat_state(budgets)
        if path[-1] == "budget"
    )
    return now / snella.adapted_weights(model)
