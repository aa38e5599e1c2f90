"""The first stage of SPT and GPS: gradients of the base over the training examples.

It takes the gradient of every targeted kernel at once, as full fine-tuning does, and
adds up a number for each weight: `experiments.benchmarks.memory` counts that, too. All
images are looked at, but 1,000 texts at most, as many as VTAB-1k has images.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.data import pipeline
from experiments.data.buckets import Buckets
from experiments.data.source import take
from experiments.methods import kinds
from experiments.methods.first_stage import Staged
from experiments.training import sharding
from experiments.training.objective import Batch, Objective
from experiments.training.session import Places, Scope, Session
from experiments.training.trainer import Data
from snella_jax.core.paths import join
from snella_jax.nnx.targets import select

Rule = Literal["squares", "contrastive"]
Scores = dict[str, np.ndarray]  # [*stack, n, m] by the targeted layer's path
TEMPERATURE = 0.07
DEVIATION = 0.02
TEXTS = 1000
Loss = Callable[[Any, Batch], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Scored(Staged):
    """A method whose first stage scores every targeted weight.

    Attributes:
      rule: how weights are scored, see `scores`.
    """

    rule: ClassVar[Rule]

    @abc.abstractmethod
    def choose(self, scores: Scores) -> Places:
        """Returns what trains, by layer, of the scores."""

    def locate(self, session: Session) -> Places:
        """Returns what a pass over training examples finds; raises as `scores`."""
        recipe = session.recipe
        with session.console.status("locating what to train"):
            found = scores(
                session.base,
                session.scope.targets,
                self.rule,
                session.data,
                session.objective,
                session.mesh,
                recipe.batch // recipe.accumulate,
                session.scope.seed,
            )
        return self.choose(found)

    def typical(self, base: Any, scope: Scope) -> Places:
        """Returns what is chosen of random scores."""
        random = np.random.default_rng(0)
        found = {
            path: random.random(layer.kernel.shape, np.float32)
            for path, layer in select(base, scope.targets).items()
        }
        return self.choose(found)


def scores(
    base: Any,
    targets: str,
    rule: Rule,
    data: Data,
    objective: Objective,
    mesh: Mesh,
    batch: int,
    seed: int,
) -> Scores:
    """Scores how much each targeted weight matters to a task, from one pass over it.

    Args:
      base: a pre-trained classifier, decoder or SAM.
      targets: regex of layers.
      rule: "squares" (SPT): the sum over batches of the squared gradient of the
        objective's loss, of a classifier behind a head that is drawn for it, as one of
        0 passes no gradient on. "contrastive" (GPS): the magnitude of the summed
        gradient of `contrastive`, or of the objective's loss where nothing has classes.
      data: the training examples; what does not fill a batch is left out.
      objective: what is learnt.
      mesh: the devices.
      batch: examples in a step.
      seed: of their order and of the head.

    Returns:
      Scores of at least float32.

    Raises:
      FloatingPointError: a score is not finite.
      RuntimeError: all are 0.
    """
    source, model = data.train, base
    if kinds.is_decoder(base):
        order = np.random.default_rng(seed).permutation(len(source))
        source = take(source, order[: max(batch, TEXTS)])
    elif rule == "squares" and kinds.has_classes(base):
        model = headed(base, jax.random.key(seed))
    graphdef, kernels, rest = split(model, targets)
    kernels, rest = sharding.place((kernels, rest), mesh)
    summed = zeros(kernels)
    step = scoring_step(graphdef, rule, loss_of(model, rule, objective))
    step = jax.jit(step, donate_argnums=0)
    stream = pipeline.training(
        source,
        # Images as they are; buckets change no text, and are of these ones' lengths.
        data.augment if isinstance(data.augment, Buckets) else data.transform,
        batch=batch,
        epochs=1,
        seed=seed,
        shard=pipeline.Shard.of_this_process(),
    )
    for examples in pipeline.to_devices(stream, sharding.of_batches(mesh)):
        summed = step(summed, kernels, rest, examples)
    summed = jax.jit(lambda tree: tree, out_shardings=sharding.whole(mesh))(summed)
    found = {
        join(path[:-1]): np.abs(np.asarray(value[...]))
        for path, value in nnx.to_flat_state(summed)
    }
    if not all(np.isfinite(own).all() for own in found.values()):
        raise FloatingPointError("a gradient of the first stage is not finite")
    if not any(own.any() for own in found.values()):
        raise RuntimeError(
            "no weight has a gradient in the first stage: GPS needs batches with "
            "several images of a class, so larger ones"
        )
    return found


def loss_of(model: Any, rule: Rule, objective: Objective) -> Loss:
    """Returns what the gradient is taken of, see `scores`."""
    if rule == "contrastive" and kinds.has_classes(model):
        return lambda model, batch: contrastive(
            model.pooled(batch["image"]), batch["label"]
        )
    return lambda model, batch: objective.loss(model, batch, None)


def zeros(kernels: nnx.State) -> nnx.State:
    """Returns sums of nothing yet, which 16 bits would be too few for."""

    def of(kernel: Array) -> Array:
        return jnp.zeros_like(kernel, jnp.promote_types(kernel.dtype, jnp.float32))

    return jax.tree.map(of, kernels)


def scoring_step(graphdef: nnx.GraphDef, rule: Rule, loss: Loss) -> Callable:
    """Returns the function that adds a batch, to be jitted.

    Of `summed` (`zeros` at first), `kernels`, `rest` and a batch it gives `summed`.
    """

    def loss_fn(kernels, rest, batch):
        return loss(nnx.merge(graphdef, kernels, rest), batch)

    def added(total, gradient):
        gradient = gradient.astype(total.dtype)
        return total + (jnp.square(gradient) if rule == "squares" else gradient)

    def step(summed, kernels, rest, batch):
        gradient = jax.grad(loss_fn)(kernels, rest, batch)
        return jax.tree.map(added, summed, gradient)

    return step


def split(model: Any, targets: str) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The graph, the targeted kernels, and the rest of a model's state."""
    layers = select(model, targets)

    def targeted(path, _):
        return path[-1] == "kernel" and join(path[:-1]) in layers

    graphdef, kernels, rest = nnx.split(model, targeted, ...)
    return graphdef, kernels, rest


def top(scores: Scores, share: float) -> dict[str, np.ndarray]:
    """Masks, bool, of the largest of all scores, by layer.

    >>> found = top({"a": np.array([[1, 9]]), "b": np.array([[8, 2]])}, 0.5)
    >>> {path: mask.tolist() for path, mask in found.items()}
    {'a': [[False, True]], 'b': [[True, False]]}
    """
    every = np.concatenate([own.ravel() for own in scores.values()])
    count = max(1, round(share * every.size))
    largest = np.zeros(every.size, bool)
    largest[np.argpartition(every, -count)[-count:]] = True
    ends = np.cumsum([own.size for own in scores.values()])[:-1]
    parts = np.split(largest, ends)
    return {p: m.reshape(scores[p].shape) for p, m in zip(scores, parts, strict=True)}


def headed(base: Any, key: PRNGKeyArray) -> Any:
    """A copy of a classifier with a random head (deviation 0.02, as timm's)."""
    model = nnx.clone(base)
    kernel = model.head.kernel
    kernel[...] = DEVIATION * jax.random.normal(key, kernel.shape, kernel.dtype)
    return model


def contrastive(
    features: Float[Array, "B D"], labels: Int[Array, " B"]
) -> Float[Array, ""]:
    """The supervised contrastive loss (Khosla et al., arXiv 2004.11362, Eq. 2).

    At a temperature of 0.07. The mean over images that share their label with another.
    """
    features = features.astype(jnp.float32)
    unit = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    others = ~jnp.eye(len(labels), dtype=bool)
    similar = jnp.where(others, unit @ unit.T / TEMPERATURE, -jnp.inf)
    log_shares = jax.nn.log_softmax(similar)
    same = others & (labels[:, None] == labels[None])
    each = jnp.where(same, log_shares, 0).sum(1) / jnp.maximum(same.sum(1), 1)
    return -each.sum() / jnp.maximum(same.any(1).sum(), 1)
