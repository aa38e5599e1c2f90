"""What a model makes of a source, in batches of one shape, on one device or many."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from experiments.data import pipeline
from experiments.data.source import Source
from experiments.data.transforms import Transform
from experiments.training import sharding

BATCH = 256
Count = Callable[[Any, dict[str, Array]], Int[Array, ""]]


def counter(graphdef: nnx.GraphDef) -> Count:
    """A jitted function of the model's states and a batch that counts what is right."""

    @jax.jit
    def count(states: tuple, batch: dict[str, Array]) -> Array:
        model: Any = nnx.merge(graphdef, *states)
        model.eval()
        right = model(batch["image"]).argmax(-1) == batch["label"]
        return jnp.sum(right & batch["valid"])

    return count


def accuracy(
    count: Count, states: Any, source: Source, transform: Transform, mesh: Mesh
) -> float:
    """Share of a source that is classified correctly.

    Args:
      count: of the model, from `counter`.
      states: what `count` takes, on `mesh`.
      source: every example counts once.
      transform: of the images.
    """
    every = batches(source, transform, mesh)
    return sum(int(count(states, batch)) for batch in every) / len(source)


def features(
    model: Any, source: Source, transform: Transform, mesh: Mesh
) -> tuple[Float[np.ndarray, "N D"], Int[np.ndarray, " N"]]:
    """What a model's head sees of every example of a source, in float32, and labels."""
    graphdef, state = nnx.split(model)
    state = sharding.place(state, mesh)

    @jax.jit
    def run(state, images):
        return nnx.merge(graphdef, state).pooled(images).astype(jnp.float32)

    found, labels = [], []
    for batch in batches(source, transform, mesh):
        seen = {**batch, "image": run(state, batch["image"])}
        whole = multihost_utils.process_allgather(seen, tiled=True)
        found.append(whole["image"][whole["valid"]])
        labels.append(whole["label"][whole["valid"]])
    return np.concatenate(found), np.concatenate(labels)


def evaluate(
    model: nnx.Module, source: Source, transform: Transform, mesh: Mesh
) -> float:
    """Accuracy of a model on a source."""
    graphdef, state = nnx.split(model)
    states = (sharding.place(state, mesh),)
    return accuracy(counter(graphdef), states, source, transform, mesh)


def batches(
    source: Source, transform: Transform, mesh: Mesh
) -> Iterable[dict[str, Array]]:
    """Every example once, in batches of one shape; what fills them is not `valid`."""
    parts = mesh.shape["data"]
    batch = -(-min(BATCH, len(source)) // parts) * parts
    shard = pipeline.Shard.of_this_process()
    stream = pipeline.evaluation(source, transform, batch=batch, shard=shard)
    return pipeline.to_devices(stream, sharding.of_batches(mesh))
