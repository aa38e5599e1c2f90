"""Measures of tuned models besides their own test: what they keep, and withstand."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from experiments.data.source import Joined, Source, labels_of
from experiments.studies import recorded
from experiments.studies.corruptions import KINDS, SEVERITIES, Corrupted
from experiments.studies.tuned import Tuned, added, mesh, right
from experiments.training import evaluation

NEIGHBOURS = 3
Measured = dict[str, Any]  # `right`, as `recorded.packed`, and `tested`, how many


def forgetting(tuned: Tuned, other: Tuned) -> Measured:
    """Returns how well features of a tuned model tell the classes of another task.

    `before` has the same of the model before tuning. Only training images of the other
    task are read: each is classified by its neighbours among the others.
    """
    source, labels = other.task.train, labels_of(other.task.train)
    after = neighbours(_features(tuned.model(), source, tuned), labels)
    texts = {"right": after, "before": _before(other)}
    packed = {name: recorded.packed(own.tolist()) for name, own in texts.items()}
    return packed | {"tested": len(labels)}


@functools.cache
def _before(tuned: Tuned) -> Bool[np.ndarray, " N"]:
    source = tuned.task.train
    return neighbours(_features(tuned.base, source, tuned), labels_of(source))


def _features(model: Any, source: Source, tuned: Tuned) -> np.ndarray:
    return evaluation.features(model, source, tuned.transform, mesh())[0]


def neighbours(
    features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, " N"]
) -> Bool[np.ndarray, " N"]:
    """Returns whether most of the nearest others, by cosine, have an example's label.

    Of labels that tie, the lowest counts as found.

    >>> features = np.array([[1, 0], [1, 0.1], [1, 0.2], [0, 1], [0.1, 1], [0.2, 1.0]])
    >>> neighbours(features, np.array([0, 0, 0, 1, 1, 0])).tolist()
    [True, True, True, False, False, False]
    """
    near = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(features)
    found = near.kneighbors(return_distance=False)  # of each, without itself
    return stats.mode(labels[found], axis=1).mode == labels


def adding(tuned: Tuned, other: Tuned) -> Iterator[tuple[str, Measured]]:
    """Yields how well two tuned models do as one, with its head on each one's test.

    Their changes are added to the base; heads stay apart.
    """
    models = [tuned.model(), other.model()]
    for own, model in zip((tuned, other), models, strict=True):
        both = added(own.base, models, head=model)
        source, labels = own.task.test, labels_of(own.task.test).tolist()
        found = recorded.packed(right(both, source, own.transform, labels))
        yield own.cell.task, {"right": found, "tested": len(labels)}


def robustness(tuned: Tuned) -> Iterator[tuple[str, Measured]]:
    """Yields how well a tuned model does on its test images when they are corrupted."""
    kinds = list(itertools.product(KINDS, SEVERITIES))
    test, labels = tuned.task.test, labels_of(tuned.task.test).tolist()
    sources = [Corrupted(test, tuned.transform, *kind) for kind in kinds]
    whole = functools.reduce(Joined, sources)  # whose evaluation compiles once
    seen = dataclasses.replace(tuned.transform, crop="resize")  # it has been cropped
    found = right(tuned.model(), whole, seen, labels * len(kinds))
    parts = np.reshape(found, (len(kinds), len(labels)))
    for (kind, severity), part in zip(kinds, parts, strict=True):
        text = recorded.packed(part.tolist())
        yield f"{kind} {severity}", {"right": text, "tested": len(labels)}


def sizes(tuned: Tuned) -> Measured:
    """Returns bytes of the delta file, of the adapter's file, and weights that moved.

    The adapter's is None for methods without one.
    """
    folder = tuned.cell.run / "adapters" / tuned.cell.row.method
    adapter = sorted(folder.glob("*.safetensors"))
    return {
        "delta": tuned.delta.stat().st_size,
        "adapter": sum(file.stat().st_size for file in adapter) or None,
        "moved": tuned.cell.result["weights_moved"],
    }
