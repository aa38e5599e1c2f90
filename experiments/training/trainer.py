"""The training loop: steps that update importance, epochs that move the budgets."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import snella_jax as snella
from experiments.data import pipeline
from experiments.data.mix import Mix
from experiments.data.source import Source
from experiments.data.transforms import Transform
from experiments.files import MismatchError
from experiments.training import evaluation, sharding
from experiments.training.checkpoints import Checkpoints
from experiments.training.competition import Competition, Round
from experiments.training.recipe import Recipe
from experiments.training.step import training_step
from experiments.training.step_metrics import NotFinite, Readings
from snella_jax.core.factors import factor_leaves

NORM = "gradient_norm"


@dataclasses.dataclass(frozen=True)
class Data:
    """What a method trains on, and what it is followed on.

    Attributes:
      train: the training examples.
      follow: evaluated after epochs; None for nothing.
      augment: of the training images.
      transform: of the images that are followed.
      mix: of whole training batches.
    """

    train: Source
    follow: Source | None
    augment: Transform
    transform: Transform
    mix: Mix | None = None


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What one epoch left behind.

    Attributes:
      epoch: from 1.
      train_loss: mean over the epoch's steps.
      lr: learning rate of its last step.
      accuracy: on what is followed, after the epoch; None where it is not evaluated.
      ema_accuracy: likewise, of the running mean of the weights.
      density: fraction of the adapted weights that could move in this epoch; None where
        the method has no budgets.
      seconds_per_step: median over the epoch's steps but the first, which may compile.
      gradient_norm: mean over the epoch's steps; of the factors where there are
        adapters, else of all that trains.
      moves: how often budgets moved in it.
      moved: what the last of these reallocations did, if there was one.
    """

    epoch: int
    train_loss: float
    lr: float
    accuracy: float | None
    ema_accuracy: float | None
    density: float | None
    seconds_per_step: float
    gradient_norm: float
    moves: int
    moved: snella.Reallocation | None


class Trainer:
    """Trains every `nnx.Param` of a model, an epoch at a time.

    Order, augmentation and noise depend on the seed and the step alone: a run that goes
    on from a checkpoint, on the same devices with the same versions, ends with the same
    numbers as one that was not interrupted (as far as the devices are deterministic).

    Attributes:
      passed: epochs that are over.
      steps: in an epoch.
    """

    def __init__(
        self,
        model: nnx.Module,
        data: Data,
        recipe: Recipe,
        mesh: Mesh,
        watch: tuple[optax.GradientTransformation, ...] = (),
        competition: Competition | None = None,
        checkpoints: Checkpoints | None = None,
    ):
        """Goes on where the newest checkpoint was, if there is one.

        Args:
          model: a classifier, adapted or not, whose frozen parts are no `nnx.Param`.
          data: to train on and to follow.
          recipe: length and rates.
          mesh: the devices.
          watch: transformations in front of the optimizer (`snella.track_importance`).
          competition: when and how budgets move; None where nothing has budgets, or
            they stay.
          checkpoints: where each epoch's end is saved.

        Raises:
          MismatchError: there is one of another model or of other data.
        """
        self.data, self.recipe, self.mesh = data, recipe, mesh
        self.competition, self.checkpoints = competition, checkpoints
        self.steps = len(data.train) // recipe.batch
        self.graphdef, trainable, budgets, frozen = nnx.split(
            model, nnx.Param, snella.Budget, ...
        )
        self.frozen = sharding.place(frozen, mesh)
        # Copies: steps donate their state, and the caller keeps its model.
        trainable = jax.tree.map(jnp.copy, trainable)
        norm = optax.snapshot(NORM, _gradient_norm)
        tx = recipe.optimizer(self.steps, norm, *watch)
        self.state: dict[str, Any] = sharding.place(
            {
                "trainable": trainable,
                "opt_state": tx.init(trainable),
                "budgets": budgets,
            },
            mesh,
        )
        if recipe.ema:
            self.state["ema"] = jax.tree.map(jnp.copy, self.state["trainable"])
        self.weights = snella.adapted_weights(model) if budgets else 0
        self.step = self._step(tx)
        self.count = evaluation.counter(self.graphdef)
        self.rate = recipe.rate(self.steps)
        self.key = jax.random.key(recipe.seed)
        self.stream = iter(self._batches())
        self.passed = 0
        if checkpoints and (found := checkpoints.newest(self.state)):
            self.passed, self.state, position = found
            self._seek(position)

    @property
    def model(self) -> Any:
        """The model as it is now; the next step takes its arrays."""
        return nnx.merge(self.graphdef, *self._states())

    @property
    def ema_model(self) -> Any:
        """The model with the running mean of its weights; None where there is none."""
        if "ema" not in self.state:
            return None
        return nnx.merge(self.graphdef, *self._states("ema"))

    def best_model(self) -> tuple[int, Any]:
        """The best epoch on what is followed, and its model; (0, None) without one."""
        found = self.checkpoints.best(self.state) if self.checkpoints else None
        if found is None:
            return 0, None
        epoch, best = found
        states = best["trainable"], best["budgets"], self.frozen
        return epoch, nnx.merge(self.graphdef, *states)

    def epochs(self, on_step: Callable[[float], None]) -> Iterator[Epoch]:
        """Trains; yields after each epoch that is left, and saves it after that.

        Args:
          on_step: called with the loss of every step.

        Raises:
          FloatingPointError: a loss or update that is not finite; names the step, the
            images and the last good checkpoint, which stays.
        """
        for epoch in range(self.passed, self.recipe.total_epochs):
            steps = self._train(epoch, on_step)
            accuracy = ema_accuracy = None
            follow = self.data.follow if self.recipe.evaluates(epoch + 1) else None
            if follow is not None:
                accuracy = self._accuracy("trainable", follow)
                if "ema" in self.state:
                    ema_accuracy = self._accuracy("ema", follow)
            yield Epoch(
                epoch=epoch + 1,
                lr=float(np.asarray(self.rate((epoch + 1) * self.steps - 1))),
                accuracy=accuracy,
                ema_accuracy=ema_accuracy,
                density=_density(self.state["budgets"], self.weights),
                **steps,
            )
            self.passed = epoch + 1
            if self.checkpoints is not None:  # now: what was yielded is on record
                position = self.stream.get_state()
                self.checkpoints.save(self.passed, self.state, position, accuracy)

    def close(self) -> None:
        """Stops the threads that make batches."""
        self.stream.close()

    def _step(self, tx: optax.GradientTransformation) -> Callable:
        """The jitted step on `trainable`, `opt_state` and perhaps `ema`."""
        moving = {name: self.state[name] for name in self.state if name != "budgets"}
        where = jax.tree.map(lambda leaf: leaf.sharding, moving)  # and stays there
        update = training_step(
            self.graphdef, tx, self.recipe.accumulate, where["trainable"]
        )
        share = 1 - self.recipe.ema

        def step(state, budgets, frozen, batch, key):
            arguments = budgets, frozen, batch["image"], batch["label"], key
            trainable, opt_state, loss = update(
                state["trainable"], state["opt_state"], *arguments
            )
            norm = optax.tree.get(opt_state, NORM)
            new = {"trainable": trainable, "opt_state": opt_state}
            if "ema" in state:
                mean = optax.incremental_update(trainable, state["ema"], share)
                new["ema"] = mean
            return new, loss, norm

        return jax.jit(step, donate_argnums=0, out_shardings=(where, None, None))

    def _batches(self) -> Any:
        stream = pipeline.training(
            self.data.train,
            self.data.augment,
            batch=self.recipe.batch,
            epochs=self.recipe.total_epochs,
            seed=self.recipe.seed,
            mix=self.data.mix,
            shard=pipeline.Shard.of_this_process(),
        )
        return pipeline.to_devices(stream, sharding.of_batches(self.mesh))

    def _train(self, epoch: int, on_step: Callable[[float], None]) -> dict[str, Any]:
        """Takes an epoch's steps; gives what `Epoch` has of them."""
        readings, rules = Readings(on_step), self.competition
        total = self.recipe.total_epochs
        turn = rules.begin(epoch, total, self.steps) if rules else None
        try:
            for index in range(self.steps):
                self._take(epoch, index, turn, readings)
            readings.read()
        except NotFinite as error:
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {error.step} of "
                f"epoch {epoch + 1}, on the training images {_here(error.images)}; "
                f"{self._last_good()}"
            ) from error
        seconds = readings.seconds
        return {
            "train_loss": float(np.mean(readings.losses)),
            "gradient_norm": float(np.mean(readings.norms)),
            "seconds_per_step": float(np.median(seconds[1:] or seconds)),
            "moves": turn.moves if turn else 0,
            "moved": turn.moved if turn else None,
        }

    def _seek(self, position: dict[str, Any]) -> None:
        """Goes on in the stream where a checkpoint was."""
        taken, expected = position.get("next_index"), self.passed * self.steps
        if taken != expected:
            raise MismatchError(
                f"The checkpoint of epoch {self.passed} was made after {taken} steps; "
                f"of {self.steps} an epoch there would have been {expected}. There are "
                "more or fewer training images, or other batches, than it began with."
            )
        self.stream.set_state(position)

    def _take(
        self, epoch: int, index: int, turn: Round | None, readings: Readings
    ) -> None:
        """Begins a step; waits for the one before it."""
        batch = next(self.stream)
        noise = jax.random.fold_in(self.key, epoch * self.steps + index)
        state = dict(self.state)
        budgets = state.pop("budgets")
        if turn is not None:
            try:
                budgets = turn.before(
                    index, budgets, state["opt_state"], lambda: self.model
                )
            except ValueError as error:  # scores that are not finite
                readings.read()  # which may know the step
                raise FloatingPointError(f"{error} {self._last_good()}") from error
        state, loss, norm = self.step(state, budgets, self.frozen, batch, noise)
        self.state = {**state, "budgets": budgets}
        readings.add(loss, norm, batch["index"])

    def _states(self, which: str = "trainable") -> tuple[Any, Any, Any]:
        return self.state[which], self.state["budgets"], self.frozen

    def _accuracy(self, which: str, source: Source) -> float:
        states, transform = self._states(which), self.data.transform
        return evaluation.accuracy(self.count, states, source, transform, self.mesh)

    def _last_good(self) -> str:
        saved = self.checkpoints and self.checkpoints.last()
        if self.checkpoints is None or not saved:
            return "there is no checkpoint before it"
        return f"the checkpoint of epoch {saved} is in {self.checkpoints.folder}"


def _here(indices: jax.Array) -> list[int]:
    """What of an array over all devices lies on those of this process."""
    shards = {str(shard.index): shard.data for shard in indices.addressable_shards}
    return np.concatenate([np.asarray(data) for data in shards.values()]).tolist()


def _gradient_norm(tree: Any) -> jax.Array:
    """Of the factors where there are any: those of the head would drown them."""
    return optax.tree.norm(factor_leaves(tree) or tree)


def _density(budgets: nnx.State, weights: int) -> float | None:
    if not weights:
        return None
    now = sum(
        int(np.asarray(value[...], np.int64).sum())
        for path, value in nnx.to_flat_state(budgets)
        if path[-1] == "budget"
    )
    return now / weights
