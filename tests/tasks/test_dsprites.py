"""dSprites rendered again: its factors, what they do to the image, its tasks."""

import hashlib

import numpy as np
import pytest

from experiments.tasks import catalogue, dsprites

NAMES = ("shape", "scale", "orientation", "x_position", "y_position")


def test_it_has_every_combination_once():
    order = np.sort(dsprites._order())
    np.testing.assert_array_equal(order, np.arange(737280))
    assert dsprites.FACTORS == (3, 6, 40, 32, 32)
    features = dsprites.Dsprites()[12345]
    schema = {"image", *(f"label_{name}" for name in NAMES)}
    schema |= {f"value_{name}" for name in NAMES}
    assert features.keys() == schema
    image = features["image"]
    assert image.shape == (64, 64, 1) and set(np.unique(image)) == {0, 1}
    indices = [features[f"label_{name}"] for name in NAMES]
    np.testing.assert_array_equal(image[..., 0], dsprites.render(*indices))


def test_a_shape_moves_a_pixel_a_step_and_stays_inside():
    """x to the right, y down; the mean pixel is about that of the original."""
    rng, means = np.random.default_rng(0), []
    for shape in range(3):
        for orientation in range(40):
            for corner in ((0, 0), (31, 31)):
                image = dsprites.render(shape, 5, orientation, *corner)
                borders = (image[0], image[-1], image[:, 0], image[:, -1])
                assert not np.any(borders)
        centres = []
        for position in range(32):
            image = dsprites.render(shape, 3, 7, position, 31 - position)
            rows, columns = np.nonzero(image)
            centres.append((columns.mean(), rows.mean()))
        steps = np.diff(centres, axis=0)
        np.testing.assert_allclose(steps, [[32 / 31, -32 / 31]] * 31, atol=0.3)
    for _ in range(1500):
        factors = [rng.integers(count) for count in dsprites.FACTORS]
        means.append(dsprites.render(*factors).mean())
    assert np.mean(means) == pytest.approx(0.043, abs=0.0015)


def test_a_shape_turns_and_grows():
    assert dsprites.SCALES[0] == 0.5 and dsprites.SCALES[-1] == 1
    assert dsprites.ORIENTATIONS[-1] == 2 * np.pi
    for shape in range(3):
        first = dsprites.render(shape, 5, 0, 16, 16)
        np.testing.assert_array_equal(first, dsprites.render(shape, 5, 39, 16, 16))
        small = dsprites.render(shape, 0, 0, 16, 16).sum()
        assert small / first.sum() == pytest.approx(0.25, abs=0.04)
    heart = [dsprites.render(2, 5, i, 16, 16) for i in range(39)]
    assert len({image.tobytes() for image in heart}) == 39


def test_its_images_and_their_order_are_pinned():
    """Tables compare runs on the same images in the same order."""
    order = dsprites._order()
    assert order[:4].tolist() == [292479, 258584, 212140, 174468]
    digest = hashlib.sha256()
    for index in range(0, 737280, 4001):
        digest.update(dsprites.Dsprites()[index]["image"].tobytes())
    assert digest.hexdigest() == (
        "19901d9e325dd4347a6d13781b5ddd3cf7d3ec82c8a7875ad319d217e37af7bd"
    )


@pytest.mark.parametrize("name", ["dsprites_loc", "dsprites_ori"])
def test_its_tasks_run_the_protocol(name):
    task = catalogue.load(f"{name}_rerendered")
    assert task.name == f"{name} (re-rendered)"
    assert [len(s) for s in (task.train, task.validation, task.test)] == [
        800,
        200,
        73728,
    ]
    labels = [task.train[i]["label"] for i in range(800)]
    assert set(labels) == set(range(16))
    assert set(np.unique(task.train[0]["image"])) == {0, 255}
