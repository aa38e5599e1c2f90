"""Embeddings that are computed once train a decoder as images do."""

import dataclasses
import functools

import jax
import masks
import numpy as np
import pytest
import tiny_sams
from rich.console import Console

from experiments.data import pipeline, segmentation_task
from experiments.data.mask_transforms import MaskTransform
from experiments.training import evaluation, sharding
from experiments.training.embeddings import (
    EmbeddedTransform,
    OfEmbeddings,
    embedded,
)
from experiments.training.segmentation import Segmentation
from experiments.training.true_boxes import TrueBoxes, around

MESH = sharding.make("data=1")
QUIET = Console(quiet=True)
FLIPS = MaskTransform(tiny_sams.SIDE, "pad", flip=True, evaluated=4)
PLAIN = dataclasses.replace(FLIPS, flip=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = masks.draw(tmp_path_factory.mktemp("pairs"), "abcdef")
    return segmentation_task.test_only(folder).test


@functools.cache
def model():
    return tiny_sams.load("tiny_vit")


def batches(source, transform):
    stream = pipeline.training(source, transform, batch=2, epochs=2, seed=3)
    return list(stream)


def test_batches_of_embeddings_are_those_of_images(source, tmp_path):
    """The same pairs, mirrored alike, with the same loss."""
    path = tmp_path / "train.npy"
    own = embedded(path, model(), source, FLIPS, MESH, QUIET)
    assert own.embeddings.shape == (6, 2, 2, 2, 16)
    written = path.stat().st_mtime_ns
    again = embedded(path, model(), source, FLIPS, MESH, QUIET)
    assert path.stat().st_mtime_ns == written
    encode = jax.jit(model().encode)
    of_images, of_embeddings = Segmentation(PLAIN), OfEmbeddings(PLAIN)
    losses = [
        jax.jit(lambda batch, o=o: o.loss(model(), batch, None))
        for o in (of_images, of_embeddings)
    ]
    seen = []
    for images, short in zip(
        batches(source, FLIPS),
        batches(again, EmbeddedTransform(FLIPS)),
        strict=True,
    ):
        for name in ("index", "mask", "inside"):
            np.testing.assert_array_equal(images[name], short[name])
        assert short.keys() == images.keys() - {"image"} | {"embedding"}
        expected = np.asarray(encode(images["image"]))
        np.testing.assert_allclose(short["embedding"], expected, atol=1e-5)
        pair = [float(f(b)) for f, b in zip(losses, (images, short), strict=True)]
        assert pair[0] == pytest.approx(pair[1], rel=1e-5)
        for index, mask in zip(images["index"], images["mask"], strict=True):
            still = PLAIN.masks(source[int(index)], False)["mask"]
            seen.append(np.array_equal(mask, still))
    assert 0 < sum(seen) < len(seen)  # some were mirrored


def test_what_is_followed_has_the_metrics_of_images(source, tmp_path):
    own = embedded(tmp_path / "val.npy", model(), source, PLAIN, MESH, QUIET)
    assert own.embeddings.shape[1] == 1
    found, expected = (
        evaluation.evaluate(model(), of, transform, MESH, objective).metrics
        for of, transform, objective in (
            (own, EmbeddedTransform(PLAIN), OfEmbeddings(PLAIN)),
            (source, PLAIN, Segmentation(PLAIN)),
        )
    )
    assert found == pytest.approx(expected, abs=1e-3)


def test_the_true_box_is_that_of_the_mask(source):
    """And a whole image where there is no foreground."""
    pair = PLAIN.masks(source[0], False)["mask"]
    rows, columns = np.nonzero(pair)
    expected = [columns.min(), rows.min(), columns.max(), rows.max()]
    boxes = np.asarray(around(np.stack([pair, np.zeros_like(pair)])))
    np.testing.assert_array_equal(boxes, [expected, [0, 0, 31, 31]])
    assert TrueBoxes(PLAIN).metrics == Segmentation(PLAIN).metrics
