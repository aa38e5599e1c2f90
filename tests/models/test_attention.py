"""Attention against the formula, what "auto" chooses, and cuDNN on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpus import device

from snella_jax.models.layers.attention import attend, best


def draw(dtype, tokens=5, head_dim=8):
    shape = (3, 2, tokens, 4, head_dim)
    return jax.random.normal(jax.random.key(0), shape).astype(dtype)


def test_is_the_formula():
    q, k, v = draw(jnp.float32)
    scores = np.einsum("bthd,bshd->bhts", *np.float64((q, k))) / np.sqrt(8)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, v)
    np.testing.assert_allclose(attend(q, k, v), expected, rtol=1e-5, atol=1e-6)


def test_the_scale_is_a_factor_of_the_queries():
    q, k, v = draw(jnp.float32)
    expected = attend(q * 0.7 * np.sqrt(8), k, v)
    np.testing.assert_allclose(attend(q, k, v, scale=0.7), expected, atol=1e-6)


@pytest.mark.parametrize("length", [1, 3, 5])
def test_only_the_first_tokens_are_seen(length):
    """The others do not matter, not even in the gradient."""
    q, k, v = draw(jnp.float32)

    def seen(q, k, v):
        return attend(q, k, v, length=jnp.int32(length))

    def cut(q, k, v):
        return attend(q, k[:, :length], v[:, :length])

    for one, other in zip(jax.vjp(seen, q, k, v)[1](q), jax.vjp(cut, q, k, v)[1](q),
                          strict=True):  # fmt: skip
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen(q, k, v), cut(q, k, v), rtol=1e-5, atol=1e-6)


def test_keeps_no_attention_weights():
    """Nothing as large as `[B, H, T, T]` is kept for the backward pass."""
    arrays = draw(jnp.float32, tokens=65)
    kept = jax.eval_shape(lambda: jax.vjp(attend, *arrays)[1])
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) == arrays[0].size
    plain = jax.eval_shape(lambda: jax.vjp(jax.nn.dot_product_attention, *arrays)[1])
    assert max(leaf.size for leaf in jax.tree.leaves(plain)) == 2 * 4 * 65 * 65


@pytest.mark.parametrize(
    ("where", "dtype", "head_dim", "expected"),
    [
        (device(), "bfloat16", 64, "cudnn"),
        (device(capability="8.0"), "float16", 128, "cudnn"),
        (device(capability="12.0"), "bfloat16", 80, "cudnn"),
        (device(), "float32", 64, "xla"),
        (device(), "bfloat16", 60, "xla"),
        (device(), "bfloat16", 256, "cudnn"),
        (device(), "bfloat16", 264, "xla"),
        (device(capability="8.9"), "bfloat16", 136, "xla"),
        (device(capability="10.0"), "bfloat16", 136, "xla"),
        (device(capability="7.5"), "bfloat16", 64, "xla"),  # T4
        (device(version="rocm 6", capability="gfx90a"), "bfloat16", 64, "xla"),
        (device("tpu", "tpu"), "bfloat16", 64, "xla"),
        (device("cpu", "<unknown>"), "bfloat16", 64, "xla"),
    ],
)
def test_auto(where, dtype, head_dim, expected, monkeypatch):
    """`attend` asks JAX for the implementation that `best` returns."""
    assert best(where, dtype, head_dim) == expected
    asked = []
    monkeypatch.setattr(jax, "local_devices", lambda: [where])
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda q, *_, implementation, **__: asked.append(implementation) or q,
    )
    attend(*draw(dtype, head_dim=head_dim))
    assert ("cudnn" in asked) == (expected == "cudnn")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="flash"):
        attend(*draw(jnp.float32), "flash")


def grouped(q, k, v, mask=None):
    """Causal attention of 4 heads to 2, head by head, in float64."""
    q, k, v = map(np.float64, (q, k, v))
    found = np.zeros(q.shape)
    for b, h in np.ndindex(len(q), q.shape[2]):
        own = h // (q.shape[2] // k.shape[2])
        scores = q[b, :, h] @ k[b, :, own].T / np.sqrt(q.shape[-1])
        scores[np.triu_indices(len(scores), 1)] = -np.inf
        if mask is not None:
            scores = np.where(mask[b, 0], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        found[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, own]
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_causal_attention_of_grouped_heads(masked):
    q, k, v = draw(jnp.float32)
    k, v = k[:, :, :2], v[:, :, :2]
    mask = (np.arange(5) > 1) | np.eye(5, dtype=bool) if masked else None
    mask = np.stack([mask, np.ones((5, 5), bool)])[:, None] if masked else None
    got = attend(q, k, v, mask=mask, causal=True)
    np.testing.assert_allclose(got, grouped(q, k, v, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"length": 3}, {"causal": True}, {"mask": True}])
@pytest.mark.parametrize("tokens", [(5, 5), (6, 6), (5, 6), (6, 5)])
def test_cudnn_is_given_even_numbers_of_tokens(monkeypatch, tokens, how):
    """Values and gradients stay: what is appended is not seen, and is cut off again."""
    q, k, v = draw(jnp.float32, 6)
    q, k, v = q[:, : tokens[0]], k[:, : tokens[1], :2], v[:, : tokens[1], :2]
    if "mask" in how:
        how = {"mask": jnp.tril(jnp.ones((1, 1, *tokens), bool))}
    asked = []

    def as_cudnn(*arrays, implementation, **given):
        asked.append((implementation, *(x.shape[1] for x in arrays)))
        return attention(*arrays, implementation="xla", **given)

    def outputs(implementation):
        def loss(q, k, v):
            y = attend(q, k, v, implementation, **how)
            return jnp.sin(y).sum(), y

        (_, y), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return y, *gradients

    expected = outputs("xla")
    attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", as_cudnn)
    for got, wanted in zip(outputs("cudnn"), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert {*asked} == {("cudnn", 6, 6, 6)}


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_is_causal_and_masks(masked, batch):
    """Grouped heads, left padding; values and gradients within bfloat16's rounding."""
    q, k, v = draw(jnp.bfloat16, 65, 64)[:, :batch]
    k, v = k[:, :, :2], v[:, :, :2]
    seen = (jnp.arange(65) > 9) | jnp.eye(65, dtype=bool)
    mask = jnp.broadcast_to(seen, (batch, 1, 65, 65)) if masked else None

    def both(implementation):
        def loss(q, k, v):
            y = attend(q, k, v, implementation, mask=mask, causal=True)
            return jnp.sin(y.astype(jnp.float32)).sum(), y

        how = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        (_, y), gradients = jax.jit(how)(q, k, v)
        return y, *gradients

    for got, expected in zip(both("cudnn"), both("xla"), strict=True):
        atol = 2e-2 * float(abs(expected).max())
        np.testing.assert_allclose(
            np.float32(got), np.float32(expected), rtol=0, atol=atol
        )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "length"), [(196, None), (197, None), (206, 199), (207, 199)]
)
def test_cudnn_computes_what_xla_does(tokens, length):
    """ViT-B/16's token counts, values and gradients within bfloat16's rounding."""
    arrays = draw(jnp.bfloat16, tokens, 64)

    def both(implementation):
        def loss(q, k, v):
            y = attend(q, k, v, implementation, length).astype(jnp.float32)
            return jnp.sin(y).sum(), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
            *arrays
        )
        return y, *gradients

    for got, expected in zip(both("cudnn"), both("xla"), strict=True):
        atol = 2e-2 * float(abs(expected).max())
        np.testing.assert_allclose(
            np.float32(got), np.float32(expected), rtol=0, atol=atol
        )
