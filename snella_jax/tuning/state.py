"""The state of a training: a step, an epoch's end, a plain model.

>>> import jax.numpy as jnp
>>> import snella_jax as snella
>>> class Net(nnx.Module):
...     def __init__(self, rngs):
...         self.fc1 = nnx.Linear(6, 8, rngs=rngs)
...         self.head = nnx.Linear(8, 2, rngs=rngs)
...     def __call__(self, x):
...         return self.head(nnx.relu(self.fc1(x)))
>>> def loss_fn(model, batch):
...     x, y = batch
...     return jnp.square(model(x) - y).mean()
>>> config = SnellaConfig(rank=4, targets="fc1", trainable="head")
>>> state = Tuning.create(
...     Net(nnx.Rngs(0)), config, optax.adamw(1e-2, mask=snella.decay_mask),
...     epochs=2, steps_per_epoch=3, rngs=nnx.Rngs(1),
... )
>>> x, y = jnp.ones((4, 6)), jnp.zeros((4, 2))
>>> for epoch in range(2):
...     for _ in range(3):
...         state, loss = state.step(loss_fn, (x, y))
...     state = state.end_of_epoch()
>>> f"{state.density:.2f}", type(state.merge()).__name__
('0.29', 'Net')
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from snella_jax import linen, pytree
from snella_jax.core.config import SnellaConfig
from snella_jax.core.importance import importance
from snella_jax.core.layout import Layout
from snella_jax.core.placement import like
from snella_jax.core.reallocation import reallocate
from snella_jax.core.weight import AdaptedWeight
from snella_jax.nnx.adapt import adapt
from snella_jax.tuning import metrics
from snella_jax.tuning.accumulation import check_parts
from snella_jax.tuning.linen_model import LinenModel, streams_of
from snella_jax.tuning.nnx_model import NnxModel
from snella_jax.tuning.optimizer import with_importance
from snella_jax.tuning.parts import Binding, Dtype, Parts
from snella_jax.tuning.plan import Plan, plan
from snella_jax.tuning.start import copied, on_the_devices_of
from snella_jax.tuning.tree_model import TreeModel
from snella_jax.tuning.update import Loss, update

OWN_KEY = np.uint32(2**32 - 1)  # folded into the caller's, which no step donates


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*Parts._fields, "opt_state", "key", "steps", "passed"],
    meta_fields=["binding", "tx", "plan"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class Tuning:
    """Training state of an adapted model: a pytree, to be jitted, saved, sharded.

    `create` for an NNX model, `create_linen` for a Linen module and `create_tree` for
    nested dicts of arrays make one; `step` trains, `end_of_epoch` lets the matrices
    compete, and `merge` gives the plain model. Every method returns something new and
    leaves its state as it is. What `adapt`, `partition`, `reallocate` and `merge` do is
    done by these functions; a loop of your own around them ends with the same numbers.

    `jax.jit(lambda state, batch: state.step(loss_fn, batch), donate_argnums=0)` updates
    in place: then the base, whose frozen arrays the state shares, is used up as well.

    Attributes:
      trainable: factors, and what `config.trainable` named.
      budgets: int32, weights of each matrix that may move.
      changing: random streams and batch statistics, as the last step left them.
      frozen: the rest of the model.
      opt_state: state of `tx`.
      key: of what adapters drop or sketch, and of Linen's random streams.
      steps: int32 scalar, steps taken.
      passed: int32 scalar, epochs that have ended with reallocations.
      binding: the model without its arrays; static, as are those below.
      tx: the optimizer, with `track_importance` in it.
      plan: length, and budgets of the epochs.
    """

    trainable: Any
    budgets: Any
    changing: Any
    frozen: Any
    opt_state: Any
    key: PRNGKeyArray
    steps: Int[Array, ""]
    passed: Int[Array, ""]
    binding: Binding
    tx: optax.GradientTransformationExtraArgs
    plan: Plan

    @classmethod
    def create(
        cls,
        model: nnx.Module,
        config: SnellaConfig,
        tx: optax.GradientTransformation | optax.MultiSteps,
        *,
        epochs: int,
        steps_per_epoch: int,
        rngs: nnx.Rngs,
        layouts: Mapping[str, Layout] | None = None,
        schedule: Mapping[str, Any] | None = None,
    ) -> Self:
        """Adapts an NNX model, and returns its state before the first step.

        Args:
          model: any NNX module, without adapters; it does not change, and its arrays
            are shared where they do not train. Layers that `model.eval()` switched off
            stay so in the steps, which is logged: call `model.train()` first.
          config: targets, rules and densities.
          tx: the optimizer. `track_importance()` is put in front of it where budgets
            move, unless it has one.
          epochs: number of epochs: the last one trains with `config.target_density`.
          steps_per_epoch: steps of each.
          rngs: its `params` stream draws the factors, then the key of the steps.
          layouts: axes of weights of layers of your own, as in `adapt`.
          schedule: options of `budget_schedule`, such as `{"warmup": 1}`.

        Raises:
          ValueError: as `adapt` and `budget_schedule`; `epochs=1` where budgets have to
            move, say.
          TypeError: as `adapt`, or `tx` is no optax transformation.
        """
        adapted = adapt(model, config, rngs=rngs, layouts=layouts)
        binding, parts = NnxModel.split(adapted)
        key, length = rngs.params(), (epochs, steps_per_epoch)
        return cls._of(binding, parts, config, tx, key, length, schedule)

    @classmethod
    def create_linen(
        cls,
        module: nn.Module,
        variables: Mapping[str, Any],
        config: SnellaConfig,
        tx: optax.GradientTransformation | optax.MultiSteps,
        *inputs: Any,
        epochs: int,
        steps_per_epoch: int,
        key: PRNGKeyArray,
        layouts: Mapping[str, Layout] | None = None,
        schedule: Mapping[str, Any] | None = None,
        streams: Sequence[str] = ("dropout",),
        **kwargs: Any,
    ) -> Self:
        """Adapts a Linen module, and returns its state before the first step.

        The model that the loss gets is a function of the module's inputs; it updates
        all collections but `params`.

        >>> net = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
        >>> x, key = jax.numpy.ones((4, 6)), jax.random.key(0)
        >>> config = SnellaConfig(rank=4, targets="layers_0", trainable="layers_2")
        >>> state = Tuning.create_linen(
        ...     net, net.init(key, x), config, optax.adam(1e-2), x,
        ...     epochs=2, steps_per_epoch=1, key=key,
        ... )
        >>> def loss_fn(model, x):
        ...     return model(x).mean()
        >>> for _ in range(2):
        ...     state, loss = state.step(loss_fn, x)
        ...     state = state.end_of_epoch()
        >>> net.apply(state.merge(), x).shape
        (4, 2)

        Args:
          module: an unbound module.
          variables: `params`, and other collections to carry (`batch_stats`).
          config, tx, epochs, steps_per_epoch, schedule: as in `create`.
          inputs, kwargs: inputs of the module, to find its layers by.
          key: draws the factors; the steps' keys are folded from it.
          layouts: as in `linen.adapt`.
          streams: random streams that the module draws from in training, besides
            "dropout" where adapters drop.

        Raises:
          ValueError, TypeError: as `linen.adapt` and `create`.
        """
        adapters, params = linen.adapt(
            module, variables, config, *inputs, key=key, layouts=layouts, **kwargs
        )
        binding = LinenModel(adapters, streams_of(streams, adapters))
        key, length = jax.random.fold_in(key, OWN_KEY), (epochs, steps_per_epoch)
        parts = binding.split(params, variables)
        return cls._of(binding, parts, config, tx, key, length, schedule)

    @classmethod
    def create_tree(
        cls,
        params: dict[str, Any],
        config: SnellaConfig,
        tx: optax.GradientTransformation | optax.MultiSteps,
        *,
        epochs: int,
        steps_per_epoch: int,
        key: PRNGKeyArray,
        layouts: Mapping[str, Layout] | None = None,
        schedule: Mapping[str, Any] | None = None,
    ) -> Self:
        """Adapts nested dicts of arrays, and returns their state before the first step.

        The model that the loss gets is the parameters with `w0 + delta` as weights.

        >>> params = {"fc": jax.numpy.ones((6, 8)), "head": jax.numpy.ones((8, 2))}
        >>> config = SnellaConfig(rank=4, targets="fc", trainable="head")
        >>> state = Tuning.create_tree(
        ...     params, config, optax.adam(1e-2), epochs=2, steps_per_epoch=1,
        ...     key=jax.random.key(0),
        ... )
        >>> def loss_fn(params, x):
        ...     return (jax.numpy.tanh(x @ params["fc"]) @ params["head"]).mean()
        >>> for _ in range(2):
        ...     state, loss = state.step(loss_fn, jax.numpy.ones((4, 6)))
        ...     state = state.end_of_epoch()
        >>> plain = state.merge()
        >>> plain["fc"].shape, sorted(plain)
        ((6, 8), ['fc', 'head'])

        Args:
          params: nested dicts of arrays; `pytree.flattened` makes them of other trees.
          config, tx, epochs, steps_per_epoch, schedule: as in `create`.
          key: draws the factors.
          layouts: axes of weights that are not `[n, m]`, as in `pytree.adapt`.

        Raises:
          ValueError, TypeError: as `pytree.adapt` and `create`.
        """
        adapters, adapted = pytree.adapt(params, config, key=key, layouts=layouts)
        binding, length = TreeModel(adapters), (epochs, steps_per_epoch)
        parts, key = binding.split(adapted), jax.random.fold_in(key, OWN_KEY)
        return cls._of(binding, parts, config, tx, key, length, schedule)

    @classmethod
    def _of(
        cls,
        binding: Binding,
        parts: Parts,
        config: SnellaConfig,
        tx: Any,
        key: PRNGKeyArray,
        length: tuple[int, int],
        schedule: Mapping[str, Any] | None,
    ) -> Self:
        count = sum(weight.w0.size for weight in binding.weights(parts))
        course = plan(config, count, *length, schedule)
        parts = copied(parts)
        tx = with_importance(tx, parts.trainable, competes=course.totals is not None)
        zeros = {name: jnp.zeros((), jnp.int32) for name in ("steps", "passed")}
        # Copied: some optimizers keep the very arrays, which would be donated twice.
        opt_state = jax.tree.map(jnp.copy, tx.init(parts.trainable))
        began = {"opt_state": opt_state, "key": key, **zeros}
        moving = {"trainable": parts.trainable, "changing": parts.changing, **began}
        arrays = parts._asdict() | on_the_devices_of(moving, parts)
        return cls(**arrays, binding=binding, tx=tx, plan=course)

    def step(
        self, loss_fn: Loss, batch: Any, *, accumulate: int = 1
    ) -> tuple[Self, Float[Array, ""]]:
        """Takes a training step; returns the new state, and the loss before it.

        Args:
          loss_fn: function of the model and the batch that returns a scalar. Static:
            define it once, as a new function (a `lambda` in the loop) compiles the step
            again.
          batch: any pytree of arrays.
          accumulate: parts along the batch's first axis that are computed one after the
            other, in less memory; the optimizer and the importance see their mean
            gradient.

        Raises:
          TypeError: `accumulate` is no integer.
          ValueError: it does not divide the batch.
        """
        check_parts(batch, accumulate)
        arrays = self._parts, self.opt_state, self.steps, self.key, batch
        how: Any = {"binding": self.binding, "tx": self.tx, "accumulate": accumulate}
        new, loss = update(*arrays, loss_fn=loss_fn, **how)
        return dataclasses.replace(self, **new), loss

    def end_of_epoch(
        self,
        *,
        scores: Mapping[str, Array | np.ndarray] | None = None,
        floor: float = 0.0,
    ) -> Self:
        """Ends an epoch, on the host: the matrices compete for the budget of the next.

        After the last epoch, and where `allocation="fixed"`, no budget changes. Nothing
        compiles again.

        Args:
          scores, floor: as in `reallocate`.

        Raises:
          ValueError: the epoch is not over, has more steps than `steps_per_epoch`, or
            was ended already; or as `reallocate`.
          TypeError: inside `jax.jit`.
        """
        passed, steps = self._counts("end_of_epoch")
        total = self.plan.total(passed, steps)
        if total is None:
            return self
        budgets = self.budgets
        if self.plan.totals is not None:
            budgets, _ = reallocate(
                budgets, self.opt_state, total, scores=scores, floor=floor
            )
        after = like(jnp.asarray(passed + 1, jnp.int32), self.passed)
        return dataclasses.replace(self, budgets=budgets, passed=after)

    def merge(self, *, unmoved_budgets: bool = False, dtype: Dtype = None) -> Any:
        """Returns the plain model, `w0 + delta` as weights; on the host.

        An NNX model, a Linen module's variables or nested dicts, as it was created of.

        Args:
          unmoved_budgets: merge the model as it is, whatever budgets did.
          dtype: that of all floating-point parameters, as in `snella.merge`.

        Raises:
          BudgetsNeverMoved: the end of an epoch was left out, or none has ended yet.
          ValueError: no such dtype.
          TypeError: inside `jax.jit`.
        """
        passed, steps = self._counts("merge")
        if not unmoved_budgets:
            self.plan.check_ended(passed, steps)
        return self.binding.merged(self._parts, unmoved_budgets, dtype)

    @property
    def model(self) -> Any:
        """Adapted model, as `loss_fn` gets it, to evaluate or save.

        An NNX model (call `model.eval()`); a function of a Linen module's inputs; or
        parameters with `w0 + delta`.
        """
        return self.binding.model(self._parts)

    def weights(self) -> list[AdaptedWeight]:
        """Lists every adapted weight, for `snella.sparsity` and `snella.describe`."""
        return self.binding.weights(self._parts)

    def save(self, folder: str | Path, *, base: str | None = None) -> None:
        """Writes the adapters and what else trained, as `snella.save` does.

        Not the optimizer: to go on with a training, save the state itself by Orbax.

        Args:
          folder: folder to write.
          base: name of the base model.

        Raises:
          ValueError, FileExistsError: as `snella.save`.
        """
        self.binding.save(self._parts, folder, base)

    @property
    def density(self) -> float:
        """Fraction of all adapted weights that may move now; on the host."""
        return metrics.density(self.weights())

    def metrics(self) -> dict[str, float]:
        """Returns numbers to log, on the host.

        `density`; for every matrix `density/NAME`, the fraction of its weights that may
        move, and (where budgets compete) `importance/NAME`, its score.
        """
        found = metrics.densities(self.weights())
        if self.plan.totals is not None:
            found |= metrics.importances(importance(self.opt_state))
        return found

    @property
    def _parts(self) -> Parts:
        return Parts(self.trainable, self.budgets, self.changing, self.frozen)

    def _counts(self, what: str) -> tuple[int, int]:
        """Returns the epochs and steps so far."""
        if isinstance(self.steps, Tracer):
            raise TypeError(
                f"{what} runs on the host: call it outside jax.jit, after the steps."
            )
        return int(self.passed), int(self.steps)
