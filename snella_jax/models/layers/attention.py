"""Dot-product attention in the implementation that suits the device.

No choice keeps the `[B, H, T, T]` attention weights for the backward pass. `B` images
or texts, `T` tokens, `H` heads of `d` numbers, and `K` heads of keys and values, each
for `H / K` heads of queries that follow each other.

    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8))
    >>> attend(q, k, v).shape
    (2, 5, 4, 8)
"""

import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

Implementation = Literal["auto", "xla", "cudnn"]


def attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K d"],
    implementation: Implementation = "auto",
    length: Int[Array, ""] | None = None,
    *,
    bias: Float[Array, "#B #H T S"] | None = None,
    mask: Bool[Array, "#B #H T S"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "B T H d"]:
    """Computes `softmax(scale * q k^T + bias) v` for each head.

    Args:
      implementation: "xla", "cudnn" (flash attention on NVIDIA GPUs, 16-bit numbers,
        no `T x S` array at all; an odd number of tokens gets one more, which the others
        do not see), or "auto" for what `best` says of the first device.
      length: number of the `S` tokens that are seen, the first ones; None for all.
      bias: added to what the softmax is taken of, in XLA's implementation alone.
      mask: tokens that are seen; None for all.
      causal: True if token `t` sees none of those after `t`.
      scale: factor of `q k^T`; None for `1 / sqrt(d)`.

    Raises:
      RuntimeError, NotImplementedError: "cudnn" where cuDNN cannot do it.
      ValueError: an implementation of another name, or one without the bias.
    """
    if implementation == "auto":
        implementation = best(jax.local_devices()[0], q.dtype, q.shape[-1])
    seen = None if length is None else jnp.full(len(q), length, jnp.int32)
    if implementation == "xla":
        return _recomputed(q, k, v, seen, bias, mask, causal, scale)
    if bias is not None:
        raise ValueError(f'{implementation}: a bias needs "xla".')
    if length is not None:  # cuDNN does not say what the others' gradient is
        known = (jnp.arange(k.shape[1]) < length)[:, None, None]
        k, v = jnp.where(known, k, 0), jnp.where(known, v, 0)
    tokens = q.shape[1]
    # With cuDNN, JAX has no gradient for an odd number of tokens.
    if tokens % 2 or k.shape[1] % 2:
        seen = jnp.full(len(q), k.shape[1], jnp.int32) if seen is None else seen
        if mask is not None:
            mask = _even(_even(mask, 2), 3)
        q, k, v = (_even(x, 1) for x in (q, k, v))
    with jax.named_scope("attention"):  # as profilers show it
        y = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            scale=scale,
            is_causal=causal,
            key_value_seq_lengths=seen,
            implementation=implementation,
        )
    return y[:, :tokens]


def _even(x: Array, axis: int) -> Array:
    """Appends zeros until there is an even number along an axis."""
    after = [(0, x.shape[i] % 2 if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, after)


def check_implementation(name: str) -> None:
    """Raises a `ValueError` for a name that is no implementation of `attend`."""
    if name not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"attention={name!r}: expected {known}.")


def attention_weights(
    q: Float[Array, "B T H d"], k: Float[Array, "B S H d"]
) -> Float[Array, "B H T S"]:
    """Computes `softmax(q k^T / sqrt(d))` in float32: what each token attends to."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores / math.sqrt(q.shape[-1]))


def best(device: Any, dtype: DTypeLike, head_dim: int) -> Literal["xla", "cudnn"]:
    """Returns what suits a device: cuDNN's flash attention, else XLA's implementation.

    cuDNN wants an NVIDIA GPU of compute capability 8.0 or later (A100, L4, H100; not T4
    or V100), float16 or bfloat16, and a `head_dim` that 8 divides, of at most 128, or
    256 on Hopper (9.0).
    """
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return "xla"
    capability = float(device.compute_capability)
    half = jnp.dtype(dtype) in (jnp.dtype("float16"), jnp.dtype("bfloat16"))
    fits = head_dim <= (256 if capability == 9 else 128) and head_dim % 8 == 0
    return "cudnn" if capability >= 8 and half and fits else "xla"


# XLA keeps the attention weights unless they are made again: with GELU's three arrays
# over a third of a ViT's step. Flash attention does so by itself.
@functools.partial(jax.checkpoint, static_argnums=(6, 7))
@jax.named_scope("attention")
def _recomputed(
    q: Array,
    k: Array,
    v: Array,
    seen: Array | None,
    bias: Array | None,
    mask: Array | None,
    causal: bool,
    scale: float | None,
) -> Array:
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias,
        mask,
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=seen,
        implementation="xla",
    )
