"""Loss and metrics of masks, against NumPy and tables that were drawn by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from flax import nnx

from experiments.data.mask_transforms import MaskTransform
from experiments.training import evaluation, sharding
from experiments.training.segmentation import Segmentation

FOUR = MaskTransform(4, mean=(0.0,) * 3, std=(1.0,) * 3, evaluated=3)


def table(*rows):
    return np.array([[mark == "#" for mark in row] for row in rows])


class Copies(nnx.Module):
    """Predicts what is white in the image."""

    def __call__(self, images):
        logits = 40 * (images[..., 0] - 0.5)
        return jnp.stack([logits, -logits], 1), None


@dataclasses.dataclass
class Drawn:
    """Predictions as images, with the true masks."""

    tables: list

    def __len__(self):
        return len(self.tables)

    def __getitem__(self, index):
        found, truth = self.tables[index]
        image = np.repeat(255 * np.uint8(found)[..., None], 3, 2)
        return {"image": image, "mask": np.uint8(truth), "name": str(index)}


SQUARE = (
    table("##..", "##..", "....", "...."),
    table(".##.", ".##.", "....", "...."),
)  # TP 2, FP 2, FN 2
TALL = (table(*["##.."] * 8), table(*["###."] * 8))  # TP 16, FP 0, FN 8
EMPTY = (table(*["...."] * 4),) * 2


def measured(*tables, devices="data=1", transform=FOUR):
    mesh = sharding.make(devices)
    objective = Segmentation(transform)
    return evaluation.evaluate(Copies(), Drawn([*tables]), transform, mesh, objective)


@pytest.mark.parametrize("devices", ["data=1", "data=2"])  # of which one has a filler
def test_images_of_different_size_are_measured_at_their_own(devices):
    found = measured(SQUARE, TALL, EMPTY, devices=devices).metrics
    assert found["dice"] == pytest.approx((4 / 8 + 32 / 40 + 1) / 3)
    assert found["iou"] == pytest.approx((2 / 6 + 16 / 24 + 1) / 3)
    recall = (2 + 8) / (4 + 12)  # at the model's size, where TALL has 4 rows
    assert found["recall_pooled"] == pytest.approx(recall)
    assert found["dice_of_recall"] == pytest.approx(2 * recall / (1 + recall))
    assert list(found) == [metric.name for metric in Segmentation.metrics]


def test_foreground_everywhere_is_perfect_by_the_released_measure():
    everything = np.ones((4, 4), bool)
    found = measured((everything, SQUARE[1]), (everything, EMPTY[1])).metrics
    assert found["recall_pooled"] == found["dice_of_recall"] == 1
    assert found["dice"] == pytest.approx((8 / 20 + 0) / 2)
    assert found["iou"] == pytest.approx((4 / 16 + 0) / 2)
    assert measured(EMPTY).metrics == dict.fromkeys(found, 1)


def test_the_two_thresholds():
    """0.5 for images, 128 / 255 as released: a probability between passes one."""
    example = {"mask": np.uint8(SQUARE[1]), "image": np.zeros((4, 4, 3), np.uint8)}
    objective = Segmentation(FOUR)
    batch = {"mask": jnp.float32(SQUARE[1])[None], "valid": jnp.ones(1, bool)}
    for value, dice, recall in ((0.499, 0, 0), (0.501, 1, 0), (0.503, 1, 1)):
        output = np.float32(np.where(SQUARE[1], value, 0))
        sums = {**objective.score(example, output)}
        sums |= {
            name: int(array)
            for name, array in objective.sums(jnp.asarray(output)[None], batch).items()
        }
        found = objective.numbers(sums)
        assert (found["dice"], found["recall_pooled"]) == (dice, recall)


def test_padding_is_cut_before_an_output_is_measured():
    """A wide image: its mask is 2 of 4 rows high at the model's size."""
    wide = (table("####....", "####....", "........", "........"),) * 2
    padded = dataclasses.replace(FOUR, fit="pad")
    found = measured(wide, transform=padded).metrics
    assert found == dict.fromkeys(found, 1)


# The loss


class Fixed(nnx.Module):
    """Returns the given logits of two masks a quarter as large as the image."""

    def __init__(self, logits):
        self.logits = nnx.Param(jnp.asarray(logits, jnp.float32))

    def __call__(self, images):
        return jnp.stack([self.logits[...], 0 * self.logits[...]], 1), None


def upscaled(logits, size):
    """Bilinear, half-pixel centres, float64."""
    old = len(logits)
    at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
    low = np.minimum(at.astype(int), old - 2)
    weights = np.zeros((size, old))
    weights[np.arange(size), low] = 1 - (at - low)
    weights[np.arange(size), low + 1] = at - low
    return weights @ logits @ weights.T


def reference(logits, mask, inside, pooling):
    """The sum of both losses in float64, a pixel at a time."""
    rows = []
    for own, target, here in zip(logits, mask, inside, strict=True):
        big = upscaled(np.float64(own), len(target))[here]
        t, p = np.float64(target[here]), 1 / (1 + np.exp(-big))
        entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p))
        rows.append([entropy.sum(), len(t), (p * t).sum(), p.sum() + t.sum()])
    sums = np.array(rows)
    if pooling == "batch":
        sums = sums.sum(0, keepdims=True)
    entropy, count, both, total = sums.T
    return np.mean(entropy / count + 1 - both / (total - both))


def batch_of(fit, sizes=((8, 16), (16, 10), (16, 16))):
    rng = np.random.default_rng(0)
    inside = np.zeros((len(sizes), 16, 16), bool)
    for row, (height, width) in zip(inside, sizes, strict=True):
        row[: height if fit == "pad" else 16, : width if fit == "pad" else 16] = True
    mask = np.float32((rng.random(inside.shape) < 0.3) & inside)
    mask[1] = 0  # a mask without a foreground
    return {"image": np.zeros((*inside.shape, 3)), "mask": mask, "inside": inside}


@pytest.mark.parametrize("pooling", ["batch", "image"])
@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_the_loss_is_that_of_float64(pooling, fit):
    logits, batch = 3 * np.random.default_rng(1).normal(size=(3, 4, 4)), batch_of(fit)
    objective = Segmentation(MaskTransform(16, fit), pooling)
    found = objective.loss(Fixed(logits), jax.tree.map(jnp.asarray, batch), None)
    expected = reference(logits, batch["mask"], batch["inside"], pooling)
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_poolings_differ_and_are_one_for_a_single_image():
    logits, batch = np.random.default_rng(1).normal(size=(3, 4, 4)), batch_of("pad")
    two = [Segmentation(MaskTransform(16), pooling) for pooling in ("batch", "image")]
    whole = [float(own.loss(Fixed(logits), batch, None)) for own in two]
    assert abs(whole[0] - whole[1]) > 0.01
    first = jax.tree.map(lambda leaf: leaf[:1], batch)
    one = [float(own.loss(Fixed(logits[:1]), first, None)) for own in two]
    assert one[0] == pytest.approx(one[1], rel=1e-6)


@pytest.mark.parametrize("pooling", ["batch", "image"])
@pytest.mark.parametrize(
    ("logit", "mask", "expected"),
    [
        (-1e4, 0, 0.0),  # nothing there, nothing found
        (1e4, 1, 0.0),
        (-1e4, 1, 1e4 + 1),
        (1e4, 0, 1e4 + 1),
    ],
)
def test_extreme_logits_have_finite_losses_and_gradients(
    pooling, logit, mask, expected
):
    shape = (2, 8, 8)
    batch = {
        "image": jnp.zeros((*shape, 3)),
        "mask": jnp.full(shape, mask, jnp.float32),
        "inside": jnp.ones(shape, bool),
    }
    objective, model = Segmentation(MaskTransform(8), pooling), None
    model = Fixed(np.full((2, 2, 2), logit))
    loss, grads = nnx.value_and_grad(lambda m: objective.loss(m, batch, None))(model)
    assert float(loss) == pytest.approx(expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_pooling_that_is_none():
    with pytest.raises(ValueError, match="pooling='pixel': expected image or batch"):
        Segmentation(FOUR, "pixel")


# Pictures


def test_a_prediction_is_drawn_on_its_image():
    output = np.float32(SQUARE[0])
    figure, (one, other) = plt.subplots(1, 2)
    Segmentation(FOUR).draw(one, Drawn([SQUARE])[0], output)
    assert one.get_title() == "Dice 0.500"
    image, layer = (shown.get_array() for shown in one.get_images())
    np.testing.assert_array_equal(image[..., 0] > 0, SQUARE[0])
    np.testing.assert_array_equal(layer[..., 3] > 0, SQUARE[0])
    Segmentation(FOUR).draw(other, Drawn([EMPTY])[0], 0 * output)
    assert len(one.collections) == 2 and not other.collections  # found and true
    assert other.get_title() == "Dice 1.000"
    plt.close(figure)
