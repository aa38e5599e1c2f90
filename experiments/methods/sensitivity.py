"""The first stage of SPT and GPS: gradients of the base over the training examples.

It takes the gradient of every targeted kernel at once, as full fine-tuning does, and
adds up a number for each weight: `experiments.benchmarks.memory` counts that, too.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.data import pipeline
from experiments.data.buckets import Buckets
from experiments.data.source import Source
from experiments.methods.first_stage import Staged
from experiments.training import sharding
from experiments.training.classification import Classification
from experiments.training.session import Places, Scope, Session
from experiments.training.step import Loss
from snella_jax.core.paths import join
from snella_jax.nnx.targets import select

Rule = Literal["squares", "contrastive"]
Scores = dict[str, np.ndarray]  # [*stack, n, m] by the targeted layer's path
TEMPERATURE = 0.07
DEVIATION = 0.02


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
        """Returns what a pass over the training examples finds; raises as `scores`."""
        recipe, objective = session.recipe, session.objective
        classifies = isinstance(objective, Classification)
        with session.console.status("locating what to train"):
            found = scores(
                session.base,
                session.scope.targets,
                self.rule,
                session.data.train,
                session.data.transform,
                session.mesh,
                recipe.batch // recipe.accumulate,
                session.scope.seed,
                None if classifies else objective.loss,
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
    source: Source,
    transform: pipeline.Preparation | Buckets,
    mesh: Mesh,
    batch: int,
    seed: int,
    loss: Loss | None = None,
) -> Scores:
    """How much each targeted weight matters to a task, from one pass over its examples.

    Args:
      base: a pre-trained classifier, or any model that `loss` takes.
      targets: regex of layers.
      rule: "squares" (SPT): the sum over batches of the squared gradient of the cross
        entropy, behind a head that is drawn for it, as one of 0 passes no gradient on.
        "contrastive" (GPS): the magnitude of the summed gradient of `contrastive`.
      source: the training examples; what does not fill a batch is left out.
      transform: of them.
      mesh: the devices.
      batch: examples in a step.
      seed: of their order and of the head.
      loss: an objective's, whose gradient both rules then take; None for the losses
        above, of images with labels.

    Raises:
      FloatingPointError: a score is not finite.
      RuntimeError: all are 0.
    """
    drawn = rule == "squares" and loss is None
    model = headed(base, jax.random.key(seed)) if drawn else base
    graphdef, kernels, rest = split(model, targets)
    kernels, rest = sharding.place((kernels, rest), mesh)
    summed = jax.tree.map(jnp.zeros_like, kernels)
    step = jax.jit(scoring_step(graphdef, rule, loss), donate_argnums=0)
    stream = pipeline.training(
        source,
        transform,
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


def scoring_step(
    graphdef: nnx.GraphDef, rule: Rule, loss: Loss | None = None
) -> Callable:
    """Adds a batch: of `summed, kernels, rest, batch`, gives `summed`."""

    def loss_fn(kernels, rest, batch):
        model: Any = nnx.merge(graphdef, kernels, rest)
        if loss is not None:
            return loss(model, batch, jax.random.key(0))
        images, labels = batch["image"], batch["label"]
        if rule == "contrastive":
            return contrastive(model.pooled(images), labels)
        logits = model(images).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(summed, kernels, rest, batch):
        gradient = jax.grad(loss_fn)(kernels, rest, batch)
        if rule == "squares":
            gradient = jax.tree.map(jnp.square, gradient)
        return jax.tree.map(jnp.add, summed, gradient)

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
