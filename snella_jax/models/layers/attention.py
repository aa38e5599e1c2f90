"""Dot-product attention in the implementation that suits the device.

No choice keeps the `[B, H, T, T]` attention weights for the backward pass. `B` images,
`T` tokens, `H` heads of `d` numbers.

    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8))
    >>> attend(q, k, v).shape
    (2, 5, 4, 8)
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

Implementation = Literal["auto", "xla", "cudnn"]


def attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S H d"],
    v: Float[Array, "B S H d"],
    implementation: Implementation = "auto",
    length: Int[Array, ""] | None = None,
    *,
    bias: Float[Array, "#B #H T S"] | None = None,
    mask: Bool[Array, "#B #H T S"] | None = None,
) -> Float[Array, "B T H d"]:
    """Computes `softmax(q k^T / sqrt(d) + bias) v` for each head.

    Args:
      implementation: "xla", "cudnn" (flash attention on NVIDIA GPUs, 16-bit numbers,
        no `T x S` array at all), or "auto" for what `best` says of the first device.
      length: number of the `S` tokens that are seen, the first ones; None for all.
      bias: added to what the softmax is taken of, in XLA's implementation alone.
      mask: tokens that are seen, in XLA's implementation alone; None for all.

    Raises:
      RuntimeError, NotImplementedError: "cudnn" where cuDNN cannot do it.
      ValueError: an implementation of another name, or one without bias and mask.
    """
    if implementation == "auto":
        implementation = best(jax.local_devices()[0], q.dtype, q.shape[-1])
    seen = None if length is None else jnp.full(len(q), length, jnp.int32)
    if implementation == "xla":
        return _recomputed(q, k, v, seen, bias, mask)
    if bias is not None or mask is not None:
        raise ValueError(f'{implementation}: bias and mask need "xla".')
    if length is not None:  # cuDNN does not say what the others' gradient is
        mask = (jnp.arange(k.shape[1]) < length)[:, None, None]
        k, v = jnp.where(mask, k, 0), jnp.where(mask, v, 0)
    with jax.named_scope("attention"):  # as profilers show it
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=seen, implementation=implementation
        )


def attention_weights(
    q: Float[Array, "B T H d"], k: Float[Array, "B S H d"]
) -> Float[Array, "B H T S"]:
    """Computes `softmax(q k^T / sqrt(d))` in float32: what each token attends to."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores / math.sqrt(q.shape[-1]))


def best(device: Any, dtype: DTypeLike, head_dim: int) -> Literal["xla", "cudnn"]:
    """Returns what suits a device: cuDNN's flash attention, else XLA's implementation.

    cuDNN wants an NVIDIA GPU of compute capability 8.0 or later (A100, L4, H100; not T4
    or V100), float16 or bfloat16, and a `head_dim` of at most 128 that 8 divides.
    """
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return "xla"
    recent = float(device.compute_capability) >= 8
    half = jnp.dtype(dtype) in (jnp.dtype("float16"), jnp.dtype("bfloat16"))
    fits = head_dim <= 128 and head_dim % 8 == 0
    return "cudnn" if recent and half and fits else "xla"


# XLA keeps the attention weights unless they are made again: with GELU's three arrays
# over a third of a ViT's step. Flash attention does so by itself.
@jax.checkpoint
@jax.named_scope("attention")
def _recomputed(
    q: Array,
    k: Array,
    v: Array,
    seen: Array | None,
    bias: Array | None,
    mask: Array | None,
) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, bias, mask, key_value_seq_lengths=seen, implementation="xla"
    )
