"""What prompts become for the transformer, part by part."""

import dataclasses

import clip_oracle as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snella_jax.models.sd3.text import OneTower
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
    return (oracle.text(config, 1),)


def same(found, expected):
    """Of one program and of several: XLA need not give the same last bits."""
    assert found.dtype == jnp.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-6)


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
