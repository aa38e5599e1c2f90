"""Images and masks at a model's size, and outputs back at their own."""

import json

import masks
import numpy as np
import pytest
from PIL import Image

from experiments.data import pairs, pipeline
from experiments.data.mask_transforms import MaskTransform

RNG = np.random.default_rng
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def example(size, seed=0):
    image, mask = masks.pair(seed, size)
    return {"image": image, "mask": mask // 255, "name": "x"}


def test_squashed_images_are_pillows_and_masks_the_nearest_pixels():
    given = example((12, 20))
    found = MaskTransform(8, **PLAIN).prepare(given, RNG(0))
    picture = Image.fromarray(given["image"]).resize((8, 8), Image.BILINEAR)
    np.testing.assert_array_equal(found["image"], np.float32(picture) / np.float32(255))
    rows, columns = ((np.arange(8) + 0.5) * side // 8 for side in (12, 20))
    expected = given["mask"][rows.astype(int)][:, columns.astype(int)]
    np.testing.assert_array_equal(found["mask"], expected)
    assert found["inside"].all() and found["inside"].dtype == bool
    assert found["image"].dtype == found["mask"].dtype == np.float32


@pytest.mark.parametrize(
    ("size", "fitted"), [((6, 12), (4, 8)), ((12, 6), (8, 4)), ((5, 16), (3, 8))]
)
def test_padding_is_at_the_bottom_and_on_the_right_after_normalisation(size, fitted):
    """The shorter side is rounded half up: 5 of 16 at 8 is 2.5."""
    given, transform = example(size), MaskTransform(8, "pad")
    found = transform.prepare(given, RNG(0))
    height, width = fitted
    inside = np.zeros((8, 8), bool)
    inside[:height, :width] = True
    np.testing.assert_array_equal(found["inside"], inside)
    assert not found["image"][~inside].any() and not found["mask"][~inside].any()
    picture = Image.fromarray(given["image"]).resize((width, height), Image.BILINEAR)
    seen = transform.unnormalised(found["image"])[:height, :width]
    np.testing.assert_array_equal(seen, np.asarray(picture))
    assert found["mask"].any()
    thin = transform.prepare(example((2, 90)), RNG(0))
    assert thin["inside"].sum() == 8  # a row


@pytest.mark.parametrize(("fit", "size"), [("squash", (8, 8)), ("pad", (4, 8))])
def test_a_flip_moves_image_and_mask_together_and_no_padding(fit, size):
    given = example(size, seed=1)
    given["image"] = np.repeat(given["mask"][..., None], 3, 2) * np.uint8(255)
    kept = MaskTransform(8, fit, **PLAIN).prepare(given, RNG(0))
    flipped, seen = MaskTransform(8, fit, flip=True, **PLAIN), []
    for seed in range(200):
        found = flipped.prepare(given, RNG(seed))
        np.testing.assert_array_equal(found["image"][..., 0] > 0.5, found["mask"] > 0)
        np.testing.assert_array_equal(found["inside"], kept["inside"])
        seen.append((found["mask"] != kept["mask"]).any())
        expected = kept["mask"][:, ::-1] if seen[-1] else kept["mask"]
        np.testing.assert_array_equal(found["mask"], expected)
    assert 70 < sum(seen) < 130


@pytest.mark.parametrize("fit", ["squash", "pad"])
@pytest.mark.parametrize("size", [(9, 15), (24, 16), (32, 64)])
def test_outputs_come_back_to_where_they_were(fit, size):
    """A ramp in x: linear interpolation keeps it, but for the borders.

    Pillow samples the wider filter of what shrinks, which bends it a little.
    """
    transform = MaskTransform(16, fit)
    height, width = transform.fitted(*size)
    output = np.full((16, 16), 99, np.float32)
    output[:height, :width] = (np.arange(width) + 0.5) / width
    found = transform.restored(output, size)
    assert found.shape == size and found.dtype == np.float32
    ramp = np.broadcast_to((np.arange(size[1]) + 0.5) / size[1], size)
    edge = 1 + size[1] // width
    atol = 1e-6 if size[1] >= width else 4e-3
    np.testing.assert_allclose(found[:, edge:-edge], ramp[:, edge:-edge], atol=atol)
    assert found.max() < 1


def test_the_stream_goes_on_bit_for_bit_and_images_of_any_size_make_a_batch(tmp_path):
    source = pairs.read(masks.draw(tmp_path, "abcdef")).whole()

    def stream():
        transform = MaskTransform(16, "pad", flip=True)
        return pipeline.training(source, transform, batch=2, epochs=3, seed=0)

    whole, begun = list(stream()), iter(stream())
    assert len(whole) == 9 and whole[0]["image"].shape == (2, 16, 16, 3)
    for _ in range(4):
        next(begun)
    state = json.loads(json.dumps(begun.get_state()))
    resumed = iter(stream())
    resumed.set_state(state)
    for one, other in zip(list(resumed), whole[4:], strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "crop"}, "fit='crop': expected squash or pad"),
        ({"size": 0}, r"size=\(0, 0\): expected positive"),
        ({"evaluated": 0}, "evaluated=0: expected at least 1"),
        ({"mean": (0.5,)}, "expected 1 or 3 numbers each"),
    ],
)
def test_transforms_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        MaskTransform(**{"size": 8, **options})
