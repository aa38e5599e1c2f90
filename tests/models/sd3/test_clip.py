"""CLIP's towers against float64 NumPy, and their sizes."""

import dataclasses
import math

import clip_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snella_jax.models.layers.stack import unstack
from snella_jax.models.sd3 import clip

# The first end token is at 3, at 1, and at 6; 49 has the largest id.
TOKENS = np.array([[48, 5, 7, 49, 0, 0, 0], [48, 49, 49, 49, 49, 49, 49],
                   [48, 1, 2, 3, 4, 5, 49]])  # fmt: skip
ENDS = [3, 1, 6]
PIXELS = np.random.default_rng(0).random((2, 4, 6, 3), np.float32)


def near(found, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_text():
    """States before the last block without a norm; pooled at the first end token."""
    model = oracle.text()
    hidden, pooled = model(jnp.asarray(TOKENS))
    kernel = oracle.parameters(model)["projection/kernel"]
    for row, (tokens, end) in enumerate(zip(TOKENS, ENDS, strict=True)):
        before, last = oracle.text_states(model, tokens)
        near(hidden[row], before)
        near(pooled[row], last[end] @ kernel)


@pytest.mark.parametrize(
    ("fields", "ends"),
    [({"eos": 3}, [0, 0, 3]), ({"eos": 49}, ENDS)],
)
def test_the_end_token_that_a_config_names(fields, ends):
    """The first of it, whatever the ids behind it; the first token without one."""
    config = dataclasses.replace(oracle.TEXT, **fields, projection=None, depth=1)
    model = oracle.text(config)
    hidden, pooled = model(jnp.asarray(TOKENS))
    for row, (tokens, end) in enumerate(zip(TOKENS, ends, strict=True)):
        before, last = oracle.text_states(model, tokens)
        near(hidden[row], before)  # the embeddings: there is one block
        near(pooled[row], last[end])


def test_exact_gelu_blocks_in_a_list_and_recomputation():
    config = dataclasses.replace(oracle.TEXT, activation="gelu", remat="blocks")
    model = oracle.text(config)
    before, last = oracle.text_states(model, TOKENS[0])
    kernel = oracle.parameters(model)["projection/kernel"]
    for own in (model, unstack(model)):
        hidden, pooled = own(jnp.asarray(TOKENS[:1]))
        near(hidden[0], before)
        near(pooled[0], last[3] @ kernel)


def test_an_image():
    model = oracle.image()
    images = model.normalise(jnp.asarray(PIXELS))
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    found = model(images)
    for row, pixels in enumerate(PIXELS):
        near(found[row], oracle.image_embedding(model, (pixels - mean) / std))


def test_sizes_of_published_models():
    """By shapes alone; OpenAI's have a temperature besides."""

    def count(kind, config):
        model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
        return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model)))

    texts = {name: count(clip.ClipText, c) for name, c in clip.PRESETS.items()}
    assert texts["clip_l"] == 123_650_304 and texts["clip_g"] == 694_659_840
    images = {n: count(clip.ClipImage, c) for n, c in clip.IMAGE_PRESETS.items()}
    assert texts["vit_b32"] + images["vit_b32"] + 1 == 151_277_313
    assert texts["vit_l14"] + images["vit_l14"] + 1 == 427_616_513


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (np.zeros((1, 8), int), ValueError, r"shape \(1, 8\): .* T from 1 to 7"),
        (np.zeros(3, int), ValueError, r"shape \(3,\): expected \[B, T\]"),
        (np.zeros((1, 3)), TypeError, "tokens are float32: expected integers"),
    ],
)
def test_tokens_that_cannot_be(tokens, error, message):
    with pytest.raises(error, match=message):
        oracle.text()(jnp.asarray(tokens))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (oracle.TEXT, {"heads": 3}, "heads=3 does not divide width=8"),
        (oracle.TEXT, {"depth": 0}, "depth=0: expected at least 1"),
        (oracle.TEXT, {"positions": 0}, "positions=0: expected at least 1"),
        (oracle.TEXT, {"projection": 0}, "projection=0: expected at least 1"),
        (oracle.TEXT, {"activation": "relu"}, "'relu': expected quick_gelu, gelu"),
        (oracle.TEXT, {"norm_eps": 0.0}, "norm_eps=0.0: expected a positive"),
        (oracle.TEXT, {"eos": 50}, "eos=50: expected one of the 50 tokens"),
        (oracle.TEXT, {"remat": "all"}, "remat='all'"),
        (oracle.IMAGE, {"remat": "all"}, "remat='all'"),
        (oracle.IMAGE, {"attention": "flash"}, "attention='flash'"),
        (oracle.IMAGE, {"patch_size": 3}, "not a multiple of"),
    ],
)
def test_fields_that_cannot_be(config, fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **fields)


def test_the_towers_under_strict_settings():
    """Neither a rank nor a dtype is promoted tacitly."""
    text, image = oracle.text(), oracle.image()
    tokens = jnp.asarray(TOKENS)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        made = jax.eval_shape(lambda: (*text(tokens), image(jnp.asarray(PIXELS))))
    assert [x.shape for x in made] == [(3, 7, 8), (3, 6), (2, 6)]
    assert all(x.dtype == jnp.float32 for x in made)
