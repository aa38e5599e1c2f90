"""The stream of batches: order, shards, resume, devices; transforms and mixing."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from experiments.data import pipeline, transforms
from experiments.data.mix import Mix, cut_box
from experiments.data.pipeline import Reading, Shard
from experiments.data.source import Arrays
from experiments.data.transforms import NORMALISATIONS, Transform

RNG = np.random.default_rng


def source(size=30, side=12):
    images = RNG(0).integers(0, 256, (size, side, side, 3), np.uint8)
    return Arrays(images, np.arange(size))


TRANSFORM = Transform((8, 8), "random")


def stream(**options):
    options = {"batch": 4, "epochs": 3, "seed": 0, **options}
    return pipeline.training(source(), TRANSFORM, **options)


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_an_epoch_has_every_example_at_most_once_in_an_order_of_its_own():
    batches = list(stream())
    assert len(batches) == 3 * 7  # 30 // 4
    epochs = [
        np.concatenate([b["label"] for b in batches[i : i + 7]]) for i in (0, 7, 14)
    ]
    for labels in epochs:
        assert len(set(labels.tolist())) == 28
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
    assert (epochs[0] != np.sort(epochs[0])).any()
    for batch in batches:
        assert batch["image"].shape == (4, 8, 8, 3)
        assert (batch["image"].dtype, batch["label"].dtype) == ("float32", "int32")
        np.testing.assert_array_equal(batch["label"], batch["index"])


def test_an_example_is_augmented_anew_in_each_epoch():
    seen = {}
    for batch in stream():
        for image, index in zip(batch["image"], batch["index"], strict=True):
            seen.setdefault(int(index), []).append(image)
    often = [images for images in seen.values() if len(images) == 3]
    assert often
    assert all((images[0] != images[1]).any() for images in often)


@pytest.mark.parametrize("reading", [Reading(1, 1), Reading(8, 4), Reading(2, 2, 2)])
def test_threads_and_workers_change_nothing(reading):
    for one, other in zip(stream(), stream(reading=reading), strict=True):
        same(one, other)


def test_the_seed_decides():
    first, other = next(iter(stream())), next(iter(stream(seed=1)))
    assert (first["label"] != other["label"]).any()
    same(first, next(iter(stream())))


@pytest.mark.parametrize(("step", "workers"), [*((i, 0) for i in range(21)), (8, 2)])
def test_a_resumed_stream_goes_on_bit_for_bit(step, workers):
    mix = Mix(30, mixup=0.8, cutmix=1.0)
    reading = Reading(workers=workers)
    whole = list(stream(mix=mix))
    begun = iter(stream(mix=mix, reading=reading))
    for _ in range(step):
        next(begun)
    state = json.loads(json.dumps(begun.get_state()))  # it goes into a checkpoint
    resumed = iter(stream(mix=mix, reading=reading))
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == len(whole) - step
    for one, other in zip(rest, whole[step:], strict=True):
        same(one, other)


def test_shards_are_disjoint_and_make_up_the_batches_of_one_process():
    """Whatever the number of processes, the same examples are augmented alike."""
    whole = list(stream())
    shards = [list(stream(shard=Shard(i, 2))) for i in range(2)]
    for batch, *parts in zip(whole, *shards, strict=True):
        for part in parts:
            assert part["image"].shape == (2, 8, 8, 3)
        together = np.concatenate([part["index"] for part in parts])
        assert sorted(together) == sorted(batch["index"])
        for part, start in zip(parts, (0, 1), strict=True):
            same(part, {name: batch[name][start::2] for name in batch})


def test_prefetching_to_devices_keeps_the_stream_and_its_state():
    mesh = jax.make_mesh((4,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    whole = list(stream())
    placed = pipeline.to_devices(stream(), sharding)
    begun = iter(placed)
    for _ in range(5):
        last = next(begun)
    assert last["image"].sharding == sharding
    same(jax.tree.map(np.asarray, last), whole[4])
    state = begun.get_state()
    resumed = iter(pipeline.to_devices(stream(), sharding))
    resumed.set_state(state)
    same(jax.tree.map(np.asarray, next(resumed)), whole[5])


@pytest.mark.parametrize(("batch", "count"), [(4, 1), (4, 2), (64, 4), (30, 1)])
def test_evaluation_sees_every_example_once(batch, count):
    plain = dataclasses.replace(TRANSFORM, crop="resize")
    seen, lengths = [], []
    for index in range(count):
        batches = list(
            pipeline.evaluation(source(), plain, batch=batch, shard=Shard(index, count))
        )
        lengths.append(len(batches))
        for one in batches:
            assert one["image"].shape == (batch // count, 8, 8, 3)
            seen += one["label"][one["valid"]].tolist()
    assert sorted(seen) == list(range(30)) and len(set(lengths)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 31}, "batch=31: expected 1 to 30"),
        ({"batch": 0}, "batch=0"),
        ({"batch": 4, "shard": Shard(0, 3)}, "3 processes do not divide it"),
    ],
)
def test_batches_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        stream(**change)
    with pytest.raises(ValueError, match="shard 2 of 2"):
        Shard(2, 2)


# Transforms


def test_resize_is_pillows_and_the_identity_where_nothing_changes():
    image = source()[0]["image"]
    plain = Transform((12, 12), mean=(0.0,) * 3, std=(1.0,) * 3)
    np.testing.assert_array_equal(
        plain(image, RNG(0)), np.float32(image) / np.float32(255)
    )
    for name, resample in (("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR)):
        resized = dataclasses.replace(plain, size=(5, 9), resample=name)
        expected = Image.fromarray(image).resize((9, 5), resample)
        got = resized.unnormalised(resized(image, RNG(0)))
        np.testing.assert_array_equal(got, np.asarray(expected))


@pytest.mark.parametrize(
    ("name", "of_white", "of_black"),
    [
        ("imagenet", (2.2489, 2.4286, 2.64), (-2.1179, -2.0357, -1.8044)),
        ("inception", (1, 1, 1), (-1, -1, -1)),
        ("none", (1, 1, 1), (0, 0, 0)),
    ],
)
def test_normalisations(name, of_white, of_black):
    mean, std = NORMALISATIONS[name]
    for value, expected in ((255, of_white), (0, of_black)):
        image = np.full((4, 4, 3), value, np.uint8)
        got = Transform((4, 4), mean=mean, std=std)(image, RNG(0))[0, 0]
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_grey_images_become_three_channels_and_colours_one():
    grey = source()[0]["image"][..., :1]
    three = Transform((12, 12), mean=(0.0,) * 3, std=(1.0,) * 3)(grey, RNG(0))
    np.testing.assert_array_equal(three, np.tile(np.float32(grey) / 255, 3))
    one = Transform((12, 12), mean=(0.5,), std=(0.5,))(source()[0]["image"], RNG(0))
    assert one.shape == (12, 12, 1)


def test_centre_crop_is_seven_eighths_of_the_shorter_side():
    """A 512 x 256 image at 224: resized to 256 high, 224 of the middle."""
    columns = np.tile(np.arange(512, dtype=np.uint8) // 2, (256, 1))
    image = np.repeat(columns[..., None], 3, 2)
    crop = Transform((224, 224), "centre", (0.0,) * 3, (1.0,) * 3)
    got = crop.unnormalised(crop(image, RNG(0)))
    np.testing.assert_array_equal(got, image[16:240, 144:368])
    small = dataclasses.replace(crop, size=(112, 56))
    assert small(image, RNG(0)).shape == (112, 56, 3)


def test_random_boxes_have_the_area_and_the_ratio_that_they_should():
    rng, areas, ratios = RNG(0), [], []
    for _ in range(3000):
        left, top, right, bottom = transforms.random_box(240, 240, rng)
        assert 0 <= left < right <= 240 and 0 <= top < bottom <= 240
        areas.append((right - left) * (bottom - top) / 240**2)
        ratios.append((right - left) / (bottom - top))
    assert 0.07 < min(areas) < 0.1 and max(areas) > 0.85
    assert 0.74 < min(ratios) < 0.77 and 1.3 < max(ratios) < 1.36
    assert abs(np.median(np.log(ratios))) < 0.03
    # No box of these ratios fits: the largest that does, in the middle.
    left, top, right, bottom = transforms.random_box(4, 1000, RNG(0))
    assert (right - left, bottom - top) == (5, 4) and left in (497, 498)


def test_a_crop_does_not_see_what_lies_beside_it(monkeypatch):
    """torchvision crops first; a filter over the whole image would bleed."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255
    monkeypatch.setattr(transforms, "random_box", lambda *_: (0, 0, 32, 64))
    crop = Transform((16, 16), "random", (0.0,) * 3, (1.0,) * 3)
    assert crop(image, RNG(0)).max() == 0


@pytest.mark.parametrize(
    ("height", "width", "share", "resized", "corner"),
    [
        (375, 500, 0.875, (256, 341), (16, 58)),
        (500, 333, 0.875, (384, 256), (80, 16)),
        (301, 301, 0.875, (256, 256), (16, 16)),
        (257, 400, 0.875, (256, 398), (16, 87)),
        (375, 500, 1.0, (224, 298), (0, 37)),
        (500, 333, 1.0, (336, 224), (56, 0)),
        (64, 64, 1.0, (224, 224), (0, 0)),
    ],
)
def test_centre_crops_are_torchvisions(height, width, share, resized, corner):
    """`Resize`, the longer side cut to an integer, and `CenterCrop(224)`.

    FGVC and DINOv2 resize to 256, CLIP to 224.
    """
    image = RNG(0).integers(0, 256, (height, width, 3), np.uint8)
    crop = Transform((224, 224), "centre", (0.0,) * 3, (1.0,) * 3, share=share)
    got = crop.unnormalised(crop(image, RNG(0)))
    whole = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.BICUBIC))
    top, left = corner
    np.testing.assert_array_equal(got, whole[top : top + 224, left : left + 224])


def test_random_crops_flip_half_of_the_images():
    ramp = np.repeat(np.tile(np.arange(0, 256, 4, np.uint8), (64, 1))[..., None], 3, 2)
    crop = Transform((16, 16), "random", (0.0,) * 3, (1.0,) * 3)
    rng = RNG(0)
    falls = [np.diff(crop(ramp, rng)[8, :, 0]).mean() < 0 for _ in range(400)]
    assert 0.4 < np.mean(falls) < 0.6


def test_jitter_changes_brightness_contrast_and_saturation():
    """Factors of 0.6 to 1.4, as far as the mean of a flat grey can show."""
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    rng = RNG(0)
    means = [np.asarray(transforms.jitter(grey, rng)).mean() for _ in range(500)]
    assert 59 <= min(means) < 64 and 136 < max(means) <= 141
    red = Image.new("RGB", (8, 8), (120, 60, 60))
    spread = [np.ptp(np.asarray(transforms.jitter(red, rng))[0, 0]) for _ in range(200)]
    assert min(spread) < 40 < 80 < max(spread)


def test_jitter_takes_any_order(monkeypatch):
    seen = set()
    for seed in range(60):
        order = []
        for name in ("Brightness", "Contrast", "Color"):

            class Noted:
                def __init__(self, picture, name=name, order=order):
                    self.picture, self.name, self.order = picture, name, order

                def enhance(self, factor):
                    self.order.append(self.name)
                    return self.picture

            monkeypatch.setattr(transforms.ImageEnhance, name, Noted)
        transforms.jitter(Image.new("RGB", (2, 2)), RNG(seed))
        seen.add(tuple(order))
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (0, 8)}, r"size=\(0, 8\)"),
        ({"crop": "middle"}, "crop='middle'"),
        ({"mean": (0.5,)}, "expected 1 or 3 numbers each"),
    ],
)
def test_transforms_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Transform(**{"size": (8, 8), **options})
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 1 or 3\]"):
        Transform((8, 8))(np.ones((4, 4, 3), np.float32), RNG(0))


# Mixing


def batch_of(size=6):
    images = RNG(0).normal(size=(size, 10, 14, 3)).astype(np.float32)
    return {"image": images, "label": np.arange(size) % 5}


def test_mixup_is_the_formula():
    batch, mix = batch_of(), Mix(5, mixup=0.8)
    mixed = mix(batch, RNG(3))
    rng = RNG(3)
    rng.integers(1)
    weight = rng.beta(0.8, 0.8)
    expected = weight * batch["image"] + (1 - weight) * batch["image"][::-1]
    np.testing.assert_allclose(mixed["image"], expected, rtol=1e-5, atol=1e-6)
    hot = np.eye(5)[batch["label"]]
    expected = weight * hot + (1 - weight) * hot[::-1]
    np.testing.assert_allclose(mixed["label"], expected, rtol=1e-5, atol=1e-7)


def test_cutmix_labels_are_the_shares_of_the_area():
    batch, mix, shares = batch_of(), Mix(5, cutmix=1.0), []
    for seed in range(50):
        mixed = mix(batch, RNG(seed))
        kept = (mixed["image"] == batch["image"]).all(-1)
        other = (mixed["image"] == batch["image"][::-1]).all(-1)
        assert (kept | other).all()
        share = kept[0].mean()
        hot = np.eye(5)[batch["label"]]
        expected = share * hot + (1 - share) * hot[::-1]
        np.testing.assert_allclose(mixed["label"], expected, atol=1e-6)
        shares.append(share)
    assert min(shares) < 0.35 and max(shares) > 0.9
    np.testing.assert_array_equal(batch["image"], batch_of()["image"])  # a copy was cut


def test_a_box_has_its_area_unless_a_border_cuts_it():
    rng = RNG(0)
    for _ in range(200):
        weight = rng.random()
        rows, columns = cut_box((100, 60), weight, rng)
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        assert area <= (1 - weight) * 6000 + 1e-6
        inside = rows.start > 0 and rows.stop < 100 and columns.start > 0
        if inside and columns.stop < 60:
            # Sides are cut to even integers: at most 2 pixels are missing of each.
            side = np.sqrt(1 - weight)
            assert area >= max(100 * side - 2, 0) * max(60 * side - 2, 0) - 1e-6
        assert 0 <= rows.start <= rows.stop <= 100
        assert 0 <= columns.start <= columns.stop <= 60


def test_smoothing_alone():
    batch = batch_of()
    mixed = Mix(5, smoothing=0.1)(batch, RNG(0))
    np.testing.assert_array_equal(mixed["image"], batch["image"])
    np.testing.assert_allclose(mixed["label"].sum(1), 1, rtol=1e-6)
    assert mixed["label"][0, 0] == pytest.approx(0.92)
    assert mixed["label"].dtype == np.float32


def test_both_are_drawn_where_both_are_on():
    batch, kinds = batch_of(), set()
    for seed in range(20):
        images = Mix(5, mixup=1.0, cutmix=1.0)(batch, RNG(seed))["image"]
        exact = (images == batch["image"]) | (images == batch["image"][::-1])
        kinds.add(bool(exact.all()))
    assert kinds == {True, False}


@pytest.mark.parametrize(
    "options",
    [{"mixup": -1}, {"cutmix": -0.1}, {"smoothing": 1.0}, {"smoothing": -0.1}],
)
def test_mixes_that_cannot_be(options):
    with pytest.raises(ValueError, match="expected at least 0"):
        Mix(5, **options)


def test_ratio_of_boxes_is_that_of_torchvision():
    assert math.isclose(transforms.RATIO[0] * transforms.RATIO[1], 1)
    assert transforms.SCALE == (0.08, 1.0)
