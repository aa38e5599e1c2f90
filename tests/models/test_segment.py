"""From photographs to masks, against Pillow and slow NumPy."""

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from snella_jax.models import sam
from snella_jax.models.sam.segment import resized, restored, segment

TINY = sam.SamConfig(
    sam.ViTEncoderConfig(
        8, depth=1, heads=2, global_blocks=(0,), out_channels=8, image_size=64
    ),
    decoder_heads=2,
    decoder_mlp_dim=8,
    iou_hidden=8,
)
PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (50, 81, 3), np.uint8)
INSIDE = 40, 64  # height and width in the model's images: 50 * 64 / 81 is 39.506


@pytest.fixture(scope="module")
def model():
    return sam.Sam(TINY, rngs=nnx.Rngs(0))


def pillow(pixels, size):
    return np.asarray(
        Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)
    )


@pytest.mark.parametrize("size", [(20, 33), (70, 113)])
def test_pixels_are_those_of_pillow(size):
    """Within 1 of 255 in few places, where Pillow's weights are rounded."""
    off = np.abs(resized(PHOTOGRAPH, size).astype(int) - pillow(PHOTOGRAPH, size))
    assert off.max() <= 1 and (off > 0).mean() < 0.02


def bilinear(grid, size):
    """Half-pixel centres, borders repeat, nothing smoothed, one pixel at a time."""
    out = np.zeros(size)
    for index in np.ndindex(size):
        corners = []
        for place, old, new in zip(index, grid.shape, size, strict=True):
            at = np.clip((place + 0.5) * old / new - 0.5, 0, old - 1)
            low = int(at)
            corners.append([(low, 1 - at + low), (min(low + 1, old - 1), at - low)])
        out[index] = sum(
            grid[y, x] * a * b for y, a in corners[0] for x, b in corners[1]
        )
    return out


def test_logits_are_cut_and_resized():
    logits = np.random.default_rng(1).normal(size=(2, 16, 16)).astype(np.float32)
    got = restored(logits, INSIDE, (64, 64), (30, 45))
    for one, own in zip(got, logits, strict=True):
        expected = bilinear(bilinear(own, (64, 64))[:40, :64], (30, 45))
        np.testing.assert_allclose(one, expected, atol=1e-5)


def test_a_photograph_is_what_the_model_sees(model):
    """Prepared by hand with Pillow: long side, constants, zeros; scaled prompts."""
    pixels = pillow(PHOTOGRAPH, INSIDE) / 255
    shown = np.zeros((1, 64, 64, 3), np.float32)
    shown[0, :40] = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    scale = np.array([64 / 81, 40 / 50], np.float32)
    points = np.array([[10, 20], [80, 49]], np.float32)
    box = np.array([4, 5, 60, 44], np.float32)
    given = {
        "points": (points * scale)[None],
        "labels": np.array([[1, 0]]),
        "boxes": (box.reshape(2, 2) * scale).reshape(1, 4),
    }
    run = nnx.jit(lambda m, images, given: m(images, multimask=True, **given))
    logits, expected_iou = run(model, shown, given)
    whole = np.array(restored(logits[0], INSIDE, (64, 64), (50, 81)))
    masks, iou = segment(
        model, PHOTOGRAPH, points=points, labels=[1, 0], boxes=box, multimask=True
    )
    assert masks.dtype == bool and masks.shape == (3, 50, 81)
    sure = np.abs(whole) > 0.02 * np.abs(whole).max()
    assert sure.mean() > 0.8
    np.testing.assert_array_equal(masks[sure], whole[sure] > 0)
    np.testing.assert_allclose(iou, expected_iou[0], atol=1e-2)
    same, _ = segment(
        model,
        Image.fromarray(PHOTOGRAPH),
        points=points,
        labels=[1, 0],
        boxes=box,
        multimask=True,
    )
    np.testing.assert_array_equal(same, masks)


@pytest.mark.parametrize(
    ("image", "given", "error", "message"),
    [
        (PHOTOGRAPH[..., 0], {}, ValueError, r"\(50, 81\) \(grey: repeat it\)"),
        (PHOTOGRAPH[..., :1], {}, ValueError, "grey: repeat it"),
        (np.zeros((5, 5, 4), np.uint8), {}, ValueError, "an alpha channel: drop it"),
        (np.zeros((0, 5, 3), np.uint8), {}, ValueError, "expected RGB"),
        (PHOTOGRAPH / 255, {}, TypeError, "float64: expected uint8, 0 to 255"),
        (
            PHOTOGRAPH,
            {"points": [1, 2], "labels": [1]},
            ValueError,
            r"expected \[N, 2\]",
        ),
        (PHOTOGRAPH, {"points": [[1, 2]]}, ValueError, "points without labels"),
        (
            PHOTOGRAPH,
            {"points": [[1, 2]], "labels": [2]},
            ValueError,
            r"labels has \[2\]: expected 1, 0 or -1",
        ),
        (
            PHOTOGRAPH,
            {"points": [[1, 2]], "labels": [1.0]},
            TypeError,
            "labels are float",
        ),
        (PHOTOGRAPH, {"boxes": [[1, 2, 3, 4]]}, ValueError, r"expected \[4\], in pix"),
        (PHOTOGRAPH, {"boxes": [0, 0, np.inf, 9]}, ValueError, "expected finite"),
        (PHOTOGRAPH, {"points": [[np.nan, 2]], "labels": [1]}, ValueError, "finite"),
        (PHOTOGRAPH, {"boxes": [90, 2, 99, 9]}, ValueError, "81 pixels wide and 50 hi"),
        (PHOTOGRAPH, {"boxes": [9, 9, 3, 12]}, ValueError, "with x0 < x1"),
        (
            PHOTOGRAPH,
            {"points": [[1, 2], [3, 51]], "labels": [1, 0]},
            ValueError,
            r"points=\[\[3.0, 51.0\]\]: expected \(x, y\)",
        ),
    ],
)
def test_photographs_that_cannot_be(image, given, error, message, model):
    with pytest.raises(error, match=message):
        segment(model, image, **given)
