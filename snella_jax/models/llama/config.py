"""Shape and arithmetic of a LLaMA, and the presets."""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax.numpy as jnp

from snella_jax.models.layers.activations import Silu, check_activation
from snella_jax.models.layers.attention import Implementation
from snella_jax.models.layers.memory import check_remat, kept_names
from snella_jax.models.llama.rotary import Llama3Scaling

COUNTS = ("vocab_size", "width", "depth", "heads", "kv_heads", "head_dim", "mlp_dim")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and arithmetic of a `Llama`.

    Attributes:
      vocab_size: number of tokens there are.
      width: `D`, the width of a token.
      depth: number of blocks.
      heads: number of heads of queries.
      kv_heads: `K`, heads of keys and values; divides `heads`. Each serves the
        `heads / kv_heads` heads of queries that follow each other.
      head_dim: `d`, width of a head; even.
      mlp_dim: hidden width of the MLP.
      norm_eps: epsilon of the norms.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how these are scaled; None for not at all.
      context: longest text in tokens that the weights were trained for; `generate`
        writes no longer ones, the call takes them.
      tied: True if the head's weights are those of the embedding.
      bos: token that texts begin with; None if not known.
      eos: tokens that end a text.
      stacked: True to stack and scan the blocks; else they are a list.
      remat: "none", or "blocks" to keep only what goes from block to block for the
        backward pass and to compute each block again there.
      memory: what is kept for the backward pass: "usual", "lean" for what took a matmul
        alone, see `snella_jax.models.layers.memory`.
      activation: "silu", or "silu2" for the same output with a derivative by steps, see
        `snella_jax.models.layers.activations`. Gate and up are kept with either.
      attention: "xla", "cudnn" (NVIDIA GPUs, 16 bits), or "auto" for the one that suits
        the first device, see `snella_jax.models.layers.attention`.
      dtype: dtype of the computation; logits are float32 whatever it is.
      param_dtype: dtype in which the weights are kept.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    context: int = 4096
    tied: bool = False
    bos: int | None = None
    eos: tuple[int, ...] = ()
    stacked: bool = True
    remat: Literal["none", "blocks"] = "none"
    memory: str = "usual"
    activation: Silu = "silu"
    attention: Implementation = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        for name in (*COUNTS, "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: expected an even number.")
        for name in ("norm_eps", "rope_theta"):
            number = getattr(self, name)
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"{name}={number}: expected a positive number.")
        check_remat(self.remat)
        kept_names(self.memory)
        check_activation(self.activation, Silu)
        if self.attention not in get_args(Implementation):
            known = ", ".join(get_args(Implementation))
            raise ValueError(f"attention={self.attention!r}: expected {known}.")


_LLAMA2 = {"vocab_size": 32000, "head_dim": 128, "bos": 1, "eos": (2,)}
_LLAMA3 = {
    "vocab_size": 128256,
    "kv_heads": 8,
    "rope_theta": 500_000.0,
    "bos": 128000,
    "eos": (128001,),
}
_LLAMA32 = {
    **_LLAMA3,
    "rope_scaling": Llama3Scaling(32.0),
    "context": 131072,
    "tied": True,
}
PRESETS = {
    "llama2_7b": LlamaConfig(
        width=4096, depth=32, heads=32, kv_heads=32, mlp_dim=11008, **_LLAMA2
    ),
    "llama2_13b": LlamaConfig(
        width=5120, depth=40, heads=40, kv_heads=40, mlp_dim=13824, **_LLAMA2
    ),
    "llama3_8b": LlamaConfig(
        width=4096,
        depth=32,
        heads=32,
        head_dim=128,
        mlp_dim=14336,
        context=8192,
        **_LLAMA3,
    ),
    "llama32_1b": LlamaConfig(
        width=2048, depth=16, heads=32, head_dim=64, mlp_dim=8192, **_LLAMA32
    ),
    "llama32_3b": LlamaConfig(
        width=3072, depth=28, heads=24, head_dim=128, mlp_dim=8192, **_LLAMA32
    ),
    "smollm2_135m": LlamaConfig(  # the instruct version's tokens
        vocab_size=49152,
        width=576,
        depth=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp_dim=1536,
        rope_theta=100_000.0,
        context=8192,
        tied=True,
        bos=1,
        eos=(2,),
    ),
}
