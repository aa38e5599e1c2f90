"""The LLaMA against the formulas in NumPy, its masks, presets and memory."""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import called
from flax import nnx

from snella_jax import models
from snella_jax.models import llama
from snella_jax.models.layers import stack
from snella_jax.models.llama import rotary

TINY = llama.LlamaConfig(
    vocab_size=30, width=12, depth=2, heads=4, kv_heads=2, head_dim=6, mlp_dim=20
)
TOKENS = np.random.default_rng(0).integers(0, 30, (2, 7))


def made(**changes):
    """A model with weights large enough to matter, its norms' too."""
    model = llama.Llama(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0))
    for path, weight in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        noise = jax.random.normal(
            jax.random.key(zlib.crc32(str(path).encode())), weight.shape
        )
        scale = "scale" in path
        weight[...] = scale + (0.3 * noise).astype(weight.dtype)
    return model


def weights(model):
    flat = nnx.to_flat_state(nnx.state(stack.unstack(model), nnx.Param))
    return {"/".join(map(str, p)): np.float64(v[...]) for p, v in flat}


def oracle(model, text, positions):
    """Logits of one text, token by token and head by head, in float64."""
    c, w = model.config, weights(model)

    def norm(x, name):
        root = np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
        return x / root * w[f"{name}/scale"]

    def turned(x):  # [T, d]
        half = c.head_dim // 2
        angles = np.outer(positions, c.rope_theta ** (-np.arange(half) / half))
        pairs = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], -1)

    def attention(x, name):
        q, k, v = (x @ w[f"{name}/{f}/kernel"] for f in "qkv")
        heads = []
        for head in range(c.heads):
            own = slice(head * c.head_dim, (head + 1) * c.head_dim)
            shared = head // (c.heads // c.kv_heads)
            other = slice(shared * c.head_dim, (shared + 1) * c.head_dim)
            scores = turned(q[:, own]) @ turned(k[:, other]).T / math.sqrt(c.head_dim)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            share = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(share / share.sum(-1, keepdims=True) @ v[:, other])
        return np.concatenate(heads, -1) @ w[f"{name}/o/kernel"]

    x = w["embed/embedding"][text]
    for i in range(c.depth):
        x = x + attention(norm(x, f"blocks/{i}/norm1"), f"blocks/{i}/attn")
        y = norm(x, f"blocks/{i}/norm2")
        gate = y @ w[f"blocks/{i}/mlp/gate/kernel"]
        up = y @ w[f"blocks/{i}/mlp/up/kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"blocks/{i}/mlp/down/kernel"]
    head = w["embed/embedding"].T if c.tied else w["head/kernel"]
    return norm(x, "norm") @ head


def close(got, expected):
    assert abs(got - expected).max() <= 1e-5 * abs(expected).max()


@pytest.mark.parametrize(
    "changes", [{}, {"tied": True, "kv_heads": 4}, {"kv_heads": 1, "head_dim": 10}]
)
def test_is_the_formulas(changes):
    model = made(**changes)
    expected = [oracle(model, text, np.arange(7)) for text in TOKENS]
    got = called(model, TOKENS)
    assert got.dtype == jnp.float32
    close(got, np.stack(expected))
    close(called(stack.unstack(model), TOKENS), np.stack(expected))
    positions = TOKENS * 3
    expected = [oracle(model, *own) for own in zip(TOKENS, positions, strict=True)]
    close(called(model, TOKENS, positions), np.stack(expected))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    """Each text has the logits that it has alone, on whichever side it is padded."""
    model, lengths = made(), (3, 7)
    real = np.arange(7) < np.array(lengths)[:, None]
    mask = real[:, ::-1] if side == "left" else real
    logits = model(TOKENS, mask=mask)
    assert np.isfinite(logits).all()
    for text, own, row in zip(TOKENS, mask, logits, strict=True):
        close(row[own], oracle(model, text[own], np.arange(own.sum())))


def test_nothing_real_is_finite_and_so_is_its_gradient():
    model = made(dtype=jnp.bfloat16)

    def loss(model):
        logits = model(TOKENS, mask=jnp.zeros(TOKENS.shape, bool))
        assert logits.dtype == jnp.float32
        return jax.nn.logsumexp(logits, -1).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_recomputed_blocks_have_the_same_gradient():
    def gradient(model):
        return nnx.grad(lambda m: jnp.sin(m(TOKENS)).sum())(model)

    plain, model = gradient(made()), made(remat="blocks")
    listed = gradient(stack.unstack(model))
    rows = [listed["blocks"][i] for i in range(TINY.depth)]
    listed["blocks"] = jax.tree.map(lambda *row: jnp.stack(row), *rows)
    for other in (gradient(model), listed):
        leaves = zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True)
        for one, same in leaves:
            np.testing.assert_allclose(one, same, rtol=1e-4, atol=1e-4)


def test_chosen_positions_have_the_logits_of_all():
    model = made()
    hidden = model.hidden(TOKENS)
    np.testing.assert_allclose(
        model.logits(hidden[:, -1]), model(TOKENS)[:, -1], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((TOKENS * 1.0,), TypeError, "tokens are float.*: expected integers"),
        ((TOKENS[0],), ValueError, r"tokens have shape \(7,\)"),
        ((TOKENS, None, np.ones((2, 7))), TypeError, "mask is float"),
        ((TOKENS, np.arange(7)), ValueError, r"positions has shape \(7,\): expected"),
    ],
)
def test_arguments_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        made()(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"head_dim": 5}, "head_dim=5: expected an even"),
        ({"depth": 0}, "depth=0: expected at least 1"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"attention": "flash"}, "attention='flash'"),
        ({"remat": "some"}, "remat='some'"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_frequencies_are_those_of_the_formula():
    """Written as Meta writes it, to the bit, and two roundings from exact.

    A power that is off by half a unit in the last place leaves 2.7e-4 rad at position
    9000, one processor's 3.7e-4; theta ** (-2i / d) would be 5e-4 from Meta's.
    """
    got = rotary.inverse_frequencies(64, 500_000.0)
    exponents = np.arange(0, 64, 2, np.float32) / np.float32(64)
    np.testing.assert_array_equal(got, 1 / np.float32(5e5) ** exponents)
    assert got.dtype == np.float32
    exact = 5e5 ** -(np.arange(0, 64, 2) / 64)
    assert (9000 * abs(got - exact)).max() < 4.5e-4


def test_frequencies_of_llama_3():
    """Each band by its own formula, factor 32 as in LLaMA 3.2."""
    plain = np.float64(rotary.inverse_frequencies(64, 500_000.0))
    got = rotary.Llama3Scaling(32.0).scaled(np.float32(plain))
    for frequency, scaled in zip(plain, got, strict=True):
        wave = 2 * math.pi / frequency
        if wave < 8192 / 4:
            expected = frequency
        elif wave > 8192 / 1:
            expected = frequency / 32
        else:
            share = (8192 / wave - 1) / (4 - 1)
            expected = (1 - share) * frequency / 32 + share * frequency
        assert math.isclose(scaled, expected, rel_tol=1e-5)
    assert len({*got}) == 32


WEIGHTS = {  # of all parameters, as published
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "smollm2_135m": 134_515_008,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_presets_have_the_published_numbers_of_weights(name):
    shapes = nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(shapes, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == WEIGHTS[name]


def test_an_unknown_preset_has_near_ones():
    with pytest.raises(ValueError, match="Did you mean llama2_7b"):
        llama.create("llama2-7b", rngs=nnx.Rngs(0))
