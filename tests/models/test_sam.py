"""SAM's prompts, upscaling, calls and presets, against slow NumPy."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snella_jax import models
from snella_jax.models import sam
from snella_jax.models.sam import formats
from snella_jax.models.sam.decoder import Upscaling
from snella_jax.models.sam.prompts import PromptEncoder

# Images of 64 x 32 pixels: rows and columns are not exchanged unseen.
TINY = sam.SamConfig(
    sam.ViTEncoderConfig(
        8, depth=1, heads=2, global_blocks=(0,), out_channels=8, image_size=(64, 32)
    ),
    decoder_heads=2,
    decoder_mlp_dim=8,
    iou_hidden=8,
    mask_channels=4,
)
POINTS = np.array([[[3, 40.5], [31, 0]], [[0, 63], [8, 9]]], np.float32)
LABELS = np.array([[1, 0], [-1, 1]])
BOXES = np.array([[1, 2, 30, 60], [4, 8, 15, 16]])


@pytest.fixture(scope="module")
def prompts():
    return PromptEncoder(TINY, rngs=nnx.Rngs(0))


def code(matrix, x, y):
    """One place's code, with x and y in [0, 1]."""
    angles = 2 * np.pi * ((2 * np.array([x, y]) - 1) @ np.float64(matrix))
    return np.concatenate([np.sin(angles), np.cos(angles)])


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_points_and_boxes_are_the_formula(prompts):
    matrix = prompts.position_matrix[...]
    table = np.asarray(prompts.points.embedding[...])
    padding = np.asarray(prompts.not_a_point[...])

    def place(x, y, row):
        return code(matrix, (x + 0.5) / 32, (y + 0.5) / 64) + table[row]

    points = [
        [
            padding if label < 0 else place(*point, label)
            for point, label in zip(*own, strict=True)
        ]
        for own in zip(POINTS, LABELS, strict=True)
    ]
    boxes = [[place(*box[:2], 2), place(*box[2:], 3)] for box in BOXES]
    tokens, dense = prompts(points=POINTS, labels=LABELS)
    close(tokens, [[*own, padding] for own in points])
    np.testing.assert_array_equal(
        dense, np.broadcast_to(prompts.no_mask_embed[...], (1, 4, 2, 8))
    )
    close(prompts(boxes=BOXES)[0], boxes)
    both = prompts(points=POINTS, labels=LABELS, boxes=BOXES)[0]
    close(both, np.concatenate([points, boxes], 1))  # no padding point
    assert prompts()[0] is None


def test_places_of_the_grid_are_the_formula(prompts):
    matrix, got = prompts.position_matrix[...], prompts.positions()
    assert got.shape == (4, 2, 8)
    for row, column in np.ndindex(4, 2):
        expected = code(matrix, (column + 0.5) / 2, (row + 0.5) / 4)
        close(got[row, column], expected)


def test_upscaling_is_the_transposed_convolution():
    """Pixel by pixel, and as Flax has it, whose kernels are flipped."""
    layer = Upscaling(3, 2, TINY, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.array([5.0, 7.0])
    kernel = np.asarray(layer.kernel[...])
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 3)).astype(np.float32)
    got, expected = layer(x), np.zeros((2, 6, 8, 2))
    for b, row, column, i, j in np.ndindex(2, 3, 4, 2, 2):
        expected[b, 2 * row + i, 2 * column + j] = (
            x[b, row, column] @ kernel[:, i, j] + layer.bias[...]
        )
    close(got, expected)
    flax = nnx.ConvTranspose(3, 2, (2, 2), (2, 2), padding="VALID", rngs=nnx.Rngs(0))
    flax.kernel[...] = kernel.transpose(1, 2, 0, 3)[::-1, ::-1]
    flax.bias[...] = layer.bias[...]
    close(flax(x), expected)


# The call


@pytest.fixture(scope="module")
def model():
    return sam.Sam(TINY, rngs=nnx.Rngs(0))


IMAGES = np.zeros((2, 64, 32, 3), np.float32)
WRONG = [
    ({"points": POINTS}, "points without labels"),
    ({"labels": LABELS}, "labels without points"),
    ({"points": POINTS[0], "labels": LABELS}, "points: expected [B, N, 2], here [2, N"),
    (
        {"points": POINTS, "labels": LABELS[:, :1]},
        "labels: expected [B, N], here [2, 2]",
    ),
    (
        {"points": POINTS[:1], "labels": LABELS[:1]},
        "points: expected [B, N, 2], here [2",
    ),
    ({"boxes": BOXES[:1]}, "boxes: expected [B, 4], here [2, 4], found [1, 4]"),
    ({"boxes": BOXES[:, :3]}, "boxes: expected [B, 4], here [2, 4], found [2, 3]"),
    ({"mask": np.zeros((2, 8, 16))}, "mask: expected [B, H/4, W/4], here [2, 16, 8]"),
    (
        {"points": POINTS, "labels": LABELS + 2},
        "labels has [2, 3]: expected 1, 0 or -1",
    ),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_prompts_that_cannot_be(given, message, model):
    with pytest.raises(ValueError, match=re.escape(message)):
        model(IMAGES, **given)


def test_other_arguments_that_cannot_be(model):
    with pytest.raises(TypeError, match="labels are float32: expected integers"):
        model(IMAGES, points=POINTS, labels=LABELS.astype(np.float32))
    with pytest.raises(ValueError, match=r"this model takes \[B, 64, 32, 3\]"):
        model(IMAGES[:, :32])
    with pytest.raises(ValueError, match=r"this model takes \[B, 4, 2, 8\]"):
        model.decode(jnp.zeros((2, 2, 4, 8)))
    with pytest.raises(TypeError, match="divide by 255"):
        model.normalise(IMAGES.astype(np.uint8))


def test_shapes_and_dtypes(model):
    """Of every kind of call; mask 0, or the other three."""
    run = nnx.eval_shape
    for given, multimask, count in (
        ({}, False, 1),
        ({"boxes": BOXES}, True, 3),
        ({"points": POINTS.astype(int), "labels": LABELS}, False, 1),
    ):
        masks, iou = run(
            lambda m, g=given, t=multimask: m(IMAGES, multimask=t, **g), model
        )
        assert masks.shape == (2, count, 16, 8) and iou.shape == (2, count)
        assert masks.dtype == iou.dtype == jnp.float32
    assert run(lambda m: m.encode(IMAGES), model).shape == (2, 4, 2, 8)


# Presets


def test_the_presets_are_the_published_models():
    """ViT-B's 314 tensors and 93,735,728 numbers; 72 matrices are adapted."""
    shapes = nnx.eval_shape(lambda: models.create("sam_vit_b", rngs=nnx.Rngs(0)))
    sizes = {
        part: sum(
            leaf.size for leaf in jax.tree.leaves(nnx.state(getattr(shapes, part)))
        )
        for part in ("encoder", "prompts", "decoder")
    }
    assert sizes == {"encoder": 89_670_912, "prompts": 6_476, "decoder": 4_058_340}
    kernels = {
        "/".join(map(str, path)): leaf
        for path, leaf in nnx.to_flat_state(nnx.state(shapes))
        if path[-1] == "kernel"
    }
    adapted = [
        kernel.shape
        for path, kernel in kernels.items()
        if re.fullmatch(sam.Sam.default_targets, path.removesuffix("/kernel"))
    ]
    assert sum(shape[0] for shape in adapted) == 72
    assert sum(map(np.prod, adapted)) == 84_934_656
    rows = [*formats.ENCODER, *formats.REST]
    repeated = {"encoder/blocks": 12, "decoder/layers": 2}
    repeated |= {"decoder/hyper": 4, "prompts/points": 4}
    counts = [repeated.get(row.places[0].split("/{0}")[0], 1) for row in rows]
    assert sum(counts) == 314


def test_fields_of_both_configs_are_overridden():
    sizes = {"image_size": 64, "decoder_depth": 1}
    model = nnx.eval_shape(lambda: sam.create("sam_tinyvit", **sizes, rngs=nnx.Rngs(0)))
    config = model.config
    assert (config.image_hw, config.grid, config.decoder_depth) == ((64, 64), (4, 4), 1)
    with pytest.raises(ValueError, match="No SAM is called 'sam_vit_x'"):
        sam.create("sam_vit_x", rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="num_classes"):
        models.create("sam_vit_b", num_classes=2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": 1}, "masks=1: expected at least 2"),
        ({"decoder_depth": 0}, "decoder_depth=0: expected at least 1"),
        ({"decoder_heads": 3}, "decoder_heads=3 divides"),
        ({"mask_channels": 6}, "mask_channels=6: expected a multiple of 4"),
        ({"decoder_norm_eps": 0.0}, "decoder_norm_eps=0.0: expected a positive"),
        ({"pixel_std": (1.0, 2.0)}, r"pixel_std=\(1.0, 2.0\): expected 3 numbers"),
    ],
)
def test_a_config_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
