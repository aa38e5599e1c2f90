"""What prompts become for the transformer, part by part."""

import dataclasses

import clip_oracle as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snella_jax.models.sd3 import clip, t5
from snella_jax.models.sd3.text import OneTower, TextEncoders
from snella_jax.models.sd3.tokenizers import Tokenizer

LONG, START, END = 5, 48, 49
PROMPTS = ["ab", "abcdefg"]
CLIP_L = [[START, 1, 2, END, END], [START, 1, 2, 3, END]]  # filled with the end
CLIP_G = [[START, 1, 2, END, 0], [START, 1, 2, 3, END]]  # filled with 0
OF_T5 = [[1, 2, 1, 0], [1, 2, 3, 1]]


def letters(text):
    return [ord(letter) - ord("a") + 1 for letter in text]


CLIP_TOKENS = Tokenizer(50, START, END, END, 77, letters)
T5_TOKENS = Tokenizer(30, None, 1, 0, 256, letters)


@pytest.fixture(scope="module")
def towers():
    config = dataclasses.replace(oracle.TEXT, positions=LONG)
    other = dataclasses.replace(
        config, width=12, projection=None, activation="gelu", dtype=jnp.bfloat16
    )
    sizes = {"width": 24, "depth": 1, "heads": 2, "head_dim": 4, "mlp_dim": 8}
    of_t5 = t5.T5(t5.T5Config(vocab_size=30, **sizes), rngs=nnx.Rngs(3))
    return oracle.text(config, 1), oracle.text(other, 2), oracle.redrawn(of_t5)


def encoders(towers, **fields):
    given = {"t5_tokenizer": T5_TOKENS, "t5_length": 4, "width": 24} | fields
    return TextEncoders(*towers, CLIP_TOKENS, **given)


def same(found, expected):
    """Of one program and of several: XLA need not give the same last bits."""
    assert found.dtype == jnp.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("with_t5", [True, False])
def test_the_three_encoders(with_t5, towers):
    """CLIPs side by side, zeros up to T5's width, then T5's tokens or zeros."""
    given = {} if with_t5 else {"t5_tokenizer": None}
    context, pooled = encoders(
        (*towers[:2], towers[2] if with_t5 else None), **given
    ).encode(PROMPTS)
    (hidden_l, pooled_l), (hidden_g, pooled_g) = (
        nnx.jit(tower)(jnp.array(tokens))
        for tower, tokens in zip(towers[:2], (CLIP_L, CLIP_G), strict=True)
    )
    assert context.shape == (2, LONG + 4, 24) and pooled.shape == (2, 6 + 12)
    same(context[:, :LONG, :8], hidden_l)
    same(context[:, :LONG, 8:20], hidden_g)
    assert not context[:, :LONG, 20:].any()
    of_t5 = nnx.jit(towers[2])(jnp.array(OF_T5)) if with_t5 else np.zeros((2, 4, 24))
    same(context[:, LONG:], of_t5)
    same(pooled[:, :6], pooled_l)
    same(pooled[:, 6:], pooled_g)


def test_one_tower(towers):
    context, pooled = OneTower(towers[0], CLIP_TOKENS).encode(PROMPTS)
    hidden, expected = nnx.jit(towers[0])(jnp.array(CLIP_L))
    same(context, hidden)
    same(pooled, expected)
    with pytest.raises(ValueError, match=r"'a~' has the id 51, .* 50 tokens"):
        tokens = dataclasses.replace(
            CLIP_TOKENS, to_ids=lambda text: [51] * text.count("~")
        )
        OneTower(towers[0], tokens).encode(["", "a~"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_tokenizer": dataclasses.replace(CLIP_TOKENS, size=49)},
         "tokenizer has 49 tokens, and the tower 50"),
        ({"t5": None}, "T5 needs its tokenizer"),
        ({"width": 20}, "T5 is 24 wide: expected width=20"),
        ({"t5": None, "t5_tokenizer": None, "width": 19}, "20 wide: more than 19"),
        ({"t5_length": 0}, "t5_length=0"),
        ({"clip_g": clip.ClipText(oracle.TEXT, rngs=nnx.Rngs(0))},
         r"have \[5, 7\] positions"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(fields, message, towers):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(encoders(towers), **fields)
