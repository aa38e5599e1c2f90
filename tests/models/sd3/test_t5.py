"""T5's encoder against the formulas in NumPy."""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snella_jax.models.layers import stack
from snella_jax.models.sd3 import t5
from snella_jax.models.sd3.t5.model import buckets

TINY = t5.T5Config(
    vocab_size=30,
    width=12,
    depth=2,
    heads=3,
    head_dim=5,
    mlp_dim=20,
    buckets=8,
    distance=20,
)
TOKENS = np.random.default_rng(0).integers(0, 30, (2, 27))
# First distances of the buckets beyond the exact ones, 8 exp(j ln(16) / 8) rounded up,
# as in the published models, of 32 buckets and distance 128.
STARTS = [8, 12, 16, 23, 32, 46, 64, 91]


def made(**changes):
    """A model with weights large enough to matter, its norms' too."""
    config = dataclasses.replace(TINY, **changes)
    model = nnx.eval_shape(lambda: t5.T5(config, rngs=nnx.Rngs(0)))
    for path, weight in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        key = zlib.crc32("/".join(map(str, path)).encode())
        noise = np.random.default_rng(key).normal(0, 0.3, weight.shape)
        weight.set_value(jnp.asarray(noise + ("scale" in path), weight.dtype))
    return model


def bucket(distance, count, largest):
    """Bucket of one distance in float64; a little is added before the floor."""
    half, exact, far = count // 2, count // 4, abs(distance)
    start = half if distance > 0 else 0
    if far < exact:
        return start + far
    steps = math.log(far / exact) / math.log(largest / exact) * (half - exact)
    return start + min(half - 1, exact + math.floor(steps + 1e-6))


def oracle(model, text):
    """Encodes one text, head by head, in float64."""
    c = model.config
    rows = [
        {"/".join(map(str, path)): np.float64(value[...]) for path, value in flat}
        for flat in (
            nnx.to_flat_state(nnx.state(stack.row(model.blocks, index)))
            for index in range(c.depth)
        )
    ]
    table = np.float64(model.positions.embedding[...])
    places = range(len(text))
    bias = np.array(
        [[table[bucket(k - q, c.buckets, c.distance)] for k in places] for q in places]
    )

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale

    def attention(x, w):
        q, k, v = (x @ w[f"attn/{name}/kernel"] for name in "qkv")
        heads = []
        for head in range(c.heads):
            own = slice(head * c.head_dim, (head + 1) * c.head_dim)
            scores = q[:, own] @ k[:, own].T + bias[..., head]
            share = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(share / share.sum(-1, keepdims=True) @ v[:, own])
        return np.concatenate(heads, -1) @ w["attn/o/kernel"]

    def mlp(x, w):
        gate, up = (x @ w[f"mlp/{name}/kernel"] for name in ("gate", "up"))
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return (0.5 * gate * (1 + np.tanh(inner)) * up) @ w["mlp/down/kernel"]

    x = np.float64(model.embed.embedding[...])[text]
    for row in rows:
        x = x + attention(norm(x, row["norm1/scale"]), row)
        x = x + mlp(norm(x, row["norm2/scale"]), row)
    return norm(x, np.float64(model.norm.scale[...]))


def close(got, expected, share=1e-5):
    assert got.shape == expected.shape
    assert abs(np.float64(got) - expected).max() <= share * abs(expected).max()


@pytest.mark.parametrize("changes", [{}, {"stacked": False, "remat": "blocks"}])
def test_it_is_the_formulas_in_numpy(changes):
    model = made()
    expected = np.stack([oracle(model, text) for text in TOKENS])
    if changes:
        model = stack.unstack(model)
        model.config = dataclasses.replace(model.config, **changes)
    got = nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS)
    close(got, expected)
    assert got.dtype == jnp.float32


def test_bfloat16_comes_close_and_weights_may_be_float16():
    model = made(param_dtype=jnp.float16)
    expected = oracle(model, TOKENS[0])[None]
    model = made(param_dtype=jnp.float16, dtype=jnp.bfloat16)
    got = nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS[:1])
    close(got, expected, share=0.05)
    assert got.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="float16: expected float32 or bfloat16"):
        made(dtype=jnp.float16)


def test_buckets_of_the_published_models():
    """By hand: one for each distance to 7, then where the eight wider ones begin."""
    distances = np.arange(200)
    sizes = np.where(
        distances < 8, distances, 7 + np.searchsorted(STARTS, distances, "right")
    )
    found = buckets(200, 32, 128)
    np.testing.assert_array_equal(found[:, 0], sizes)  # keys before the query
    np.testing.assert_array_equal(found[0, 1:], 16 + sizes[1:])  # and after it
    np.testing.assert_array_equal(found[60, 40:80], found[20, :40])
    assert [math.ceil(8 * 16 ** (j / 8) - 1e-9) for j in range(8)] == STARTS


@pytest.mark.parametrize(("count", "largest"), [(8, 20), (16, 77), (64, 256), (4, 3)])
def test_buckets_of_other_sizes(count, largest):
    found = buckets(60, count, largest)
    expected = [bucket(j - 30, count, largest) for j in range(60)]
    assert found[30].tolist() == expected and found.min() == 0


def test_size_of_the_xxl():
    model = nnx.eval_shape(lambda: t5.T5(t5.PRESETS["t5_v1_1_xxl"], rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 4_762_310_656


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth=0"),
        ({"head_dim": -1}, "head_dim=-1"),
        ({"buckets": 6}, "buckets=6"),
        ({"distance": 2}, "distance=2: expected more than 2"),
        ({"norm_eps": math.inf}, "norm_eps"),
        ({"remat": "all"}, "remat='all'"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_arguments_that_cannot_be():
    model = made()
    with pytest.raises(TypeError, match="tokens are float32"):
        model(jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="tokens have shape"):
        model(np.zeros(4, int))
