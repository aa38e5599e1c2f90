"""Training loop: updates track importance, rounds move budgets."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import snella_jax as snella
from experiments.data import pipeline
from experiments.data.buckets import Buckets
from experiments.data.source import Source
from experiments.files import MismatchError
from experiments.training import blocks, evaluation, sharding
from experiments.training.checkpoints import Checkpoints
from experiments.training.competition import Competition, Moves
from experiments.training.objective import Objective, followed
from experiments.training.recipe import Recipe
from experiments.training.step import training_step
from experiments.training.step_metrics import NotFinite, Readings
from experiments.training.stopping import Stop, Stopped
from snella_jax.core.factors import factor_leaves

NORM = "gradient_norm"


@dataclasses.dataclass(frozen=True)
class Data:
    """Examples that a method trains on, and those that it is followed on.

    Attributes:
      train: training examples.
      follow: examples that are evaluated after rounds; None for nothing.
      augment: makes arrays of the training examples.
      transform: makes arrays of those that are followed.
      mix: changes whole training batches; None for nothing.
    """

    train: Source
    follow: Source | None
    augment: pipeline.Preparation | Buckets
    transform: pipeline.Preparation | Buckets
    mix: pipeline.Mixing | None = None


@dataclasses.dataclass(frozen=True)
class Round:
    """Result of one round.

    Attributes:
      number: number of the round, from 1.
      updates: updates since the start of the run.
      train_loss: mean over the round's steps.
      lr: learning rate of its last step.
      metrics: those of what is followed, after the round; empty where it is not
        evaluated.
      ema_metrics: the same of the running mean of the weights.
      density: fraction of the adapted weights that could move in this round; None where
        the method has no budgets.
      seconds_per_step: median over the round's steps but the first, which may compile.
      gradient_norm: mean over the round's steps; of the factors where there are
        adapters, else of all that trains.
      moves: how often budgets moved in it.
      moved: the last of these reallocations; None where there was none.
    """

    number: int
    updates: int
    train_loss: float
    lr: float
    metrics: dict[str, float]
    ema_metrics: dict[str, float]
    density: float | None
    seconds_per_step: float
    gradient_norm: float
    moves: int
    moved: snella.Reallocation | None


class Trainer:
    """Trains every `nnx.Param` of a model, a round at a time.

    Order, augmentation and noise depend on the seed and the step alone: a run that goes
    on from a checkpoint, on the same devices with the same versions, ends with the same
    numbers as one that was not interrupted (as far as the devices are deterministic).

    Attributes:
      rounds: the run's rounds.
      passed: number of rounds that are over.
    """

    def __init__(
        self,
        model: nnx.Module,
        data: Data,
        objective: Objective,
        recipe: Recipe,
        mesh: Mesh,
        watch: tuple[optax.GradientTransformation, ...] = (),
        competition: Competition | None = None,
        checkpoints: Checkpoints | None = None,
        stop: Stop | None = None,
    ):
        """Goes on where the newest checkpoint was, if there is one.

        Args:
          model: any that the objective takes, adapted or not, whose frozen parts are no
            `nnx.Param`.
          data: to train on and to follow.
          objective: what is learnt and measured.
          recipe: length and rates.
          mesh: the devices.
          watch: transformations in front of the optimizer (`snella.track_importance`).
          competition: when and how budgets move; None where nothing has budgets, or
            they stay.
          checkpoints: where each round's end is saved.
          stop: asked before every step; None for one that no signal sets.

        Raises:
          MismatchError: there is one of another model or of other data.
          ValueError: the recipe does not fit the number of training examples.
        """
        self.data, self.objective = data, objective
        self.recipe, self.mesh = recipe, mesh
        self.competition, self.checkpoints = competition, checkpoints
        self.stop = stop or Stop()
        self.rounds = recipe.rounds(len(data.train))
        self.graphdef, trainable, budgets, frozen = nnx.split(
            model, nnx.Param, snella.Budget, ...
        )
        self.frozen = sharding.place(frozen, mesh)
        self._pinned = self.graphdef
        if sharding.splits_weights(mesh):
            pinned = nnx.merge(self.graphdef, trainable, budgets, frozen)
            blocks.pin(pinned, mesh)
            self._pinned, *_ = nnx.split(pinned, nnx.Param, snella.Budget, ...)
        # Copies: steps donate their state, and the caller keeps its model.
        trainable = jax.tree.map(jnp.copy, trainable)
        norm = optax.snapshot(NORM, _gradient_norm)
        tx = recipe.optimizer(self.rounds, norm, *watch)
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
        self.measure = evaluation.measurer(self.graphdef, objective, mesh)
        self.rate = recipe.rate(self.rounds)
        self.key = jax.random.key(recipe.seed)
        self.stream = iter(self._batches())
        self.passed = 0
        self.begun: dict[str, Any] | None = None  # the round that was interrupted
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
        """Returns the best round on what is followed, and its model; else (0, None)."""
        found = self.checkpoints.best(self.state) if self.checkpoints else None
        if found is None:
            return 0, None
        number, best = found
        states = best["trainable"], best["budgets"], self.frozen
        return number, nnx.merge(self.graphdef, *states)

    def train(self, on_step: Callable[[float], None]) -> Iterator[Round]:
        """Trains; yields after each round that is left, and saves it after that.

        Args:
          on_step: called with the loss of every step.

        Raises:
          FloatingPointError: a loss or update that is not finite; names the step, the
            examples and the last good checkpoint, which stays.
          Stopped: the run was told to stop, and what it has done is saved.
        """
        for index in range(self.passed, self.rounds.count):
            steps = self._train(index, on_step)
            metrics, ema_metrics = self._follow(index + 1)
            _, end = self.rounds.span(index)
            yield Round(
                number=index + 1,
                updates=end,
                lr=float(np.asarray(self.rate(end - 1))),
                metrics=metrics,
                ema_metrics=ema_metrics,
                density=_density(self.state["budgets"], self.weights),
                **steps,
            )
            self.passed = index + 1
            if self.checkpoints is not None:  # now: what was yielded is on record
                value = metrics.get(followed(self.objective).name)
                position = self.stream.get_state()
                self.checkpoints.save(self.passed, self.state, position, value)

    def close(self) -> None:
        """Stops the threads that make batches."""
        self.stream.close()

    def _step(self, tx: optax.GradientTransformation) -> Callable:
        """Returns the jitted step on `trainable`, `opt_state` and perhaps `ema`."""
        moving = {name: self.state[name] for name in self.state if name != "budgets"}
        where = jax.tree.map(lambda leaf: leaf.sharding, moving)  # and stays there
        loss, parts = self.objective.loss, self.recipe.accumulate
        update = training_step(self._pinned, tx, loss, parts, where["trainable"])
        share = 1 - self.recipe.ema

        def step(state, budgets, frozen, batch, key):
            trainable, opt_state, loss = update(
                state["trainable"], state["opt_state"], budgets, frozen, batch, key
            )
            norm = optax.tree.get(opt_state, NORM)
            new = {"trainable": trainable, "opt_state": opt_state}
            if "ema" in state:
                mean = optax.incremental_update(trainable, state["ema"], share)
                new["ema"] = mean
            return new, loss, norm

        return jax.jit(step, donate_argnums=0, out_shardings=(where, None, None))

    def _batches(self) -> Any:
        epoch = len(self.data.train) // self.recipe.batch
        stream = pipeline.training(
            self.data.train,
            self.data.augment,
            batch=self.recipe.batch,
            epochs=-(-self.rounds.updates // epoch),
            seed=self.recipe.seed,
            mix=self.data.mix,
            shard=pipeline.Shard.of_this_process(),
        )
        return pipeline.to_devices(stream, sharding.of_batches(self.mesh))

    def _train(self, index: int, on_step: Callable[[float], None]) -> dict[str, Any]:
        """Takes a round's steps; returns what `Round` has of them."""
        readings, rules = Readings(on_step), self.competition
        moves = rules.begin(index, self.rounds) if rules else None
        start, end = self.rounds.span(index)
        try:
            for step in range(self._take_up(readings, moves), end - start):
                if self.stop.agreed():
                    readings.read()
                    self._leave(start, step, readings, moves)
                self._take(start, step, moves, readings)
            readings.read()
        except NotFinite as error:
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {error.step} of "
                f"{self.recipe.unit} {index + 1}, on the training examples "
                f"{sharding.rows_here(error.examples).tolist()}; {self._last_good()}"
            ) from error
        seconds = readings.seconds
        return {
            "train_loss": float(np.mean(readings.losses)),
            "gradient_norm": float(np.mean(readings.norms)),
            "seconds_per_step": float(np.median(seconds[1:] or seconds)),
            "moves": moves.count if moves else 0,
            "moved": moves.last if moves else None,
        }

    def _take_up(self, readings: Readings, moves: Moves | None) -> int:
        """Returns how many steps of the round are done, and takes up what it had."""
        begun, self.begun = self.begun, None
        if begun is None:
            return 0
        readings.take_up(begun["readings"])
        if moves is not None:
            moves.take_up(begun["moves"])
        return len(readings.losses)

    def _leave(
        self, start: int, step: int, readings: Readings, moves: Moves | None
    ) -> NoReturn:
        """Saves the round that is interrupted before a step, and stops."""
        if self.checkpoints is not None and step:  # else the one before is saved
            begun = {"passed": self.passed, "readings": readings.as_json()}
            begun["moves"] = moves and moves.as_json()
            position = {**self.stream.get_state(), "round": begun}
            self.checkpoints.interrupt(start + step, self.state, position)
        raise Stopped(
            f"Stopped as it was told to, {step} steps into {self.recipe.unit} "
            f"{self.passed + 1}."
        )

    def _seek(self, position: dict[str, Any]) -> None:
        """Goes on in the stream where a checkpoint was."""
        taken, (expected, _) = position.get("next_index"), self.rounds.span(self.passed)
        self.begun = position.pop("round", None)
        if self.begun is not None:
            expected += len(self.begun["readings"]["losses"])
        if taken != expected:
            raise MismatchError(
                f"Checkpoint {self.passed} was made after {taken} updates, expected "
                f"{expected}: there are more or fewer training examples, or other "
                "batches, than it began with."
            )
        self.stream.set_state(position)

    def _take(
        self, start: int, step: int, moves: Moves | None, readings: Readings
    ) -> None:
        """Begins a step of a round; waits for the one before it."""
        batch = next(self.stream)
        noise = jax.random.fold_in(self.key, start + step)
        state = dict(self.state)
        budgets = state.pop("budgets")
        if moves is not None:
            try:
                budgets = moves.before(
                    step, budgets, state["opt_state"], lambda: self.model
                )
            except ValueError as error:  # scores that are not finite
                readings.read()  # which may know the step
                raise FloatingPointError(f"{error} {self._last_good()}") from error
        state, loss, norm = self.step(state, budgets, self.frozen, batch, noise)
        self.state = {**state, "budgets": budgets}
        readings.add(loss, norm, batch["index"])

    def _states(self, which: str = "trainable") -> tuple[Any, Any, Any]:
        return self.state[which], self.state["budgets"], self.frozen

    def _follow(self, passed: int) -> tuple[dict[str, float], dict[str, float]]:
        """Returns the metrics of what is followed, of the weights and of their mean."""
        source = self.data.follow
        if source is None or not self.recipe.evaluates(passed, self.rounds.count):
            return {}, {}

        def measured(which: str) -> dict[str, float]:
            if which not in self.state:
                return {}
            batches = evaluation.batches(source, self.data.transform, self.mesh)
            of = self._states(which), source, batches, self.objective
            return evaluation.measured(self.measure, *of)

        return measured("trainable"), measured("ema")

    def _last_good(self) -> str:
        saved = self.checkpoints and self.checkpoints.last()
        if self.checkpoints is None or not saved:
            return "there is no checkpoint before it"
        where = self.checkpoints.folder
        return f"the checkpoint of {self.recipe.unit} {saved} is in {where}"


def _gradient_norm(tree: Any) -> jax.Array:
    """Returns that of the factors where there are any: the head's would drown it."""
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
