"""Prompts and queries beside an image's tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import CONFIG, TINY, adapted, base

from experiments.methods.registry import METHODS
from snella_jax import models
from snella_jax.models.vit import ViT


def test_prompts_take_no_part_but_in_attention():
    """They are not among the tokens, and enter where their block begins."""
    model = adapted("vpt_deep")
    images = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    assert model.features(images).shape == (2, 5, 8)
    assert [t.shape for t in model.features(images, layers=(0, 1))] == [(2, 5, 8)] * 2
    other = jnp.zeros_like(model.blocks.prompts[...])
    before = model.features(images, layers=(0, 1))
    model.blocks.prompts[...] = model.blocks.prompts[...].at[1].set(other[1])
    after = model.features(images, layers=(0, 1))
    np.testing.assert_array_equal(before[0], after[0])  # block 1's own come after it
    assert not np.allclose(before[1], after[1])


def test_deep_prompts_replace_those_of_the_block_before():
    """By hand: each block on its own tokens, with its own prompts behind them."""
    model, plain = adapted("vpt_deep"), models.unstack(base())
    images = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    tokens = plain._embed(images)
    for index, block in enumerate(plain.blocks):
        own = jnp.broadcast_to(model.blocks.prompts[...][index], (2, 2, 8))
        tokens = block(jnp.concatenate([tokens, own], 1))[:, :-2]
    np.testing.assert_allclose(model.features(images), plain.norm(tokens), atol=1e-5)


def test_queries_read_and_leave_the_tokens_alone():
    """By hand, and the head sees what each block's query found, in order."""
    model, plain = adapted("vqt"), models.unstack(base())
    images = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    tokens, found = plain._embed(images), []
    for index, block in enumerate(plain.blocks):
        x = jnp.broadcast_to(model.blocks.queries[...][index], (2, 1, 8))
        x = x + block.attn(block.norm1(x), block.norm1(tokens))
        found.append(x + block.mlp(block.norm2(x)))
        tokens = block(tokens)
    seen = [plain.norm(own)[:, 0] for own in (tokens, *found)]
    np.testing.assert_allclose(
        model.pooled(images), jnp.concatenate(seen, 1), atol=1e-5
    )
    np.testing.assert_allclose(seen[0], plain.pooled(images), atol=1e-5)


def test_attention_to_itself_is_attention_to_what_is_seen():
    attn = models.unstack(base()).blocks[0].attn
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    np.testing.assert_array_equal(attn(x), attn(x, x))
    np.testing.assert_allclose(attn(x[:, :2], x), attn(x)[:, :2], atol=1e-6)


def test_queries_read_one_block_too():
    one = ViT(dataclasses.replace(TINY, depth=1), rngs=nnx.Rngs(0))
    for model in (one, models.unstack(one)):
        read = METHODS["vqt"].adapt(model, CONFIG.scope())
        assert read.features(jnp.zeros((2, 8, 8, 1))).shape == (2, 6, 8)
        assert read(jnp.zeros((2, 8, 8, 1))).shape == (2, 3)


def test_attention_maps_show_a_blocks_prompts():
    """Behind the image's tokens, which attend to them, too."""
    maps = adapted("vpt_deep").attention_maps(jnp.ones((1, 8, 8, 1)), layers=(0, 1))
    assert [own.shape for own in maps] == [(1, 2, 7, 7)] * 2
    np.testing.assert_allclose(np.sum(maps, -1), 1, rtol=1e-5)
    assert (maps[1][0, :, 0, 5:] > 0).all()


@pytest.mark.parametrize("name", ["vpt_shallow", "vqt"])
def test_attention_maps_are_not_those_of_the_base(name):
    with pytest.raises(NotImplementedError):
        adapted(name).attention_maps(jnp.zeros((1, 8, 8, 1)), layers=(0,))
