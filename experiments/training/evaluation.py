"""Metrics of a model on a source, in batches of one shape, on one device or many."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from experiments.data import pipeline
from experiments.data.buckets import Buckets
from experiments.data.pipeline import Preparation
from experiments.data.source import Source
from experiments.training import sharding
from experiments.training.objective import Batch, Objective, Score

Measure = Callable[[Any, Batch], tuple[dict[str, Array], Any]]


def measurer(graphdef: nnx.GraphDef, objective: Objective, mesh: Mesh) -> Measure:
    """Returns a jitted function of a model's states and a batch: sums and outputs."""

    def measure(states: tuple, batch: Batch) -> tuple[dict[str, Array], Any]:
        model: Any = nnx.merge(graphdef, *states)
        model.eval()
        outputs = objective.outputs(model, batch)
        return objective.sums(outputs, batch), outputs

    return jax.jit(measure, out_shardings=(None, sharding.of_batches(mesh)))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of evaluating a model on a source.

    Attributes:
      metrics: values by name.
      shown: index and output of the first few examples, on the host.
    """

    metrics: dict[str, float]
    shown: list[tuple[int, Any]]


def evaluate(
    model: nnx.Module,
    source: Source,
    transform: Preparation | Buckets,
    mesh: Mesh,
    objective: Objective,
    show: int = 0,
    look: Callable[[int, Any], None] | None = None,
) -> Evaluation:
    """Evaluates a model on a source.

    Args:
      model: any that the objective takes.
      source: every example counts once.
      transform: makes arrays of its examples.
      mesh: the devices.
      objective: what is measured.
      show: number of outputs to keep; of several processes each keeps those of the
        first batch that it has.
      look: called with the index and the output of every example that this process has.
    """
    graphdef, state = nnx.split(model)
    states = (sharding.place(state, mesh),)
    shown: list[tuple[int, Any]] = []

    def keep(batch: Batch, outputs: Any) -> None:
        if not shown:
            shown.extend(_examples(batch, outputs, show))
        if look is not None:
            for index, output in _examples(batch, outputs):
                look(index, output)

    found = measured(
        measurer(graphdef, objective, mesh),
        states,
        source,
        batches(source, transform, mesh),
        objective,
        keep if show or look else None,
    )
    return Evaluation(found, shown)


def measured(
    measure: Measure,
    states: Any,
    source: Source,
    batches: Iterable[Batch],
    objective: Objective,
    look: Callable[[Batch, Any], None] | None = None,
) -> dict[str, float]:
    """Returns the metrics of a source.

    Args:
      measure: `measurer` of the model and the objective.
      states: the model's states, on the devices.
      source: has the examples that the host stage sees.
      batches: those of `batches(source, ...)`.
      objective: what is measured.
      look: called with every batch and its outputs.
    """
    device, host = {}, {}
    for batch in batches:
        sums, outputs = measure(states, batch)
        _add(device, {name: value.item() for name, value in sums.items()})
        if objective.score is not None:
            _score(objective.score, source, batch, outputs, host)
        if look is not None:
            look(batch, outputs)
    _add(device, _over_processes(host))
    return objective.numbers(device)


def features(
    model: Any, source: Source, transform: Preparation | Buckets, mesh: Mesh
) -> tuple[Float[np.ndarray, "N D"], Int[np.ndarray, " N"]]:
    """Returns what a classifier's head sees of every example, float32, and labels."""
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


def batches(
    source: Source, transform: Preparation | Buckets, mesh: Mesh
) -> Iterable[dict[str, Array]]:
    """Returns every example once, as `pipeline.evaluation`; fillers are not `valid`."""
    parts = sharding.rows_of(mesh)
    batch = -(-min(transform.evaluated, len(source)) // parts) * parts
    shard = pipeline.Shard.of_this_process()
    stream = pipeline.evaluation(source, transform, batch=batch, shard=shard)
    return pipeline.to_devices(stream, sharding.of_batches(mesh))


def _score(
    score: Score, source: Source, batch: Batch, outputs: Any, total: dict[str, float]
) -> None:
    """Adds up the host stage over the examples of a batch that this process has."""
    for index, output in _examples(batch, outputs):
        _add(total, score(source[index], output))


def _examples(
    batch: Batch, outputs: Any, most: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Yields index and output of the valid examples of a batch on this process."""
    valid, index = (sharding.rows_here(batch[name]) for name in ("valid", "index"))
    here = jax.tree.map(sharding.rows_here, outputs)
    for row in np.flatnonzero(valid)[:most]:
        yield int(index[row]), jax.tree.map(lambda leaf, row=row: leaf[row], here)


def _add(total: dict[str, float], sums: Any) -> None:
    for name, value in sums.items():
        total[name] = total.get(name, 0) + value


def _over_processes(sums: dict[str, float]) -> dict[str, float]:
    """Adds up the sums of all processes' hosts, whose names may differ."""
    if jax.process_count() == 1:
        return sums
    text = np.frombuffer(json.dumps(sums).encode(), np.uint8)
    gather = multihost_utils.process_allgather
    sizes = np.ravel(gather(np.int32(len(text))))
    padded = np.pad(text, (0, int(sizes.max()) - len(text)))
    total: dict[str, float] = {}
    for row, size in zip(np.asarray(gather(padded)), sizes, strict=True):
        _add(total, json.loads(row[:size].tobytes()))
    return total
