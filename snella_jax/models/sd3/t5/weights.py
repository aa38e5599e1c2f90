"""Published weights for T5's encoder: files and folders as models.

| format | examples |
|---|---|
| Hugging Face folder | `T5EncoderModel`, in shards or not; a whole T5's encoder |
| single file, same names | `t5xxl_fp16.safetensors`, `t5xxl_fp8_e4m3fn.safetensors` |
| part of a single file | `sd3_medium_incl_clips_t5xxlfp16.safetensors` |
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import DTypeLike

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.build import agreed, configured, given
from snella_jax.models.checkpoints.formats import stacked
from snella_jax.models.checkpoints.json_fields import count, number, only
from snella_jax.models.checkpoints.mapping import TensorRule, arrange, fill
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.checkpoints.torch_rules import transposed
from snella_jax.models.sd3.single_file import component
from snella_jax.models.sd3.t5.config import T5Config
from snella_jax.models.sd3.t5.model import T5

EMBEDDING, COPY = "shared.weight", "encoder.embed_tokens.weight"  # one matrix
ROWS = 4096  # of both that are compared at once
_BLOCK = r"encoder\.block\.(\d+)\.layer"
_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
FIRST = "encoder.block.0."
KERNELS = {  # ours by theirs, in a block
    **{rf"0\.SelfAttention\.{name}": f"attn/{name}" for name in "qkvo"},
    r"1\.DenseReluDense\.wi_0": "mlp/gate",
    r"1\.DenseReluDense\.wi_1": "mlp/up",
    r"1\.DenseReluDense\.wo": "mlp/down",
}
RULES: Sequence[TensorRule] = (
    TensorRule(re.escape(EMBEDDING), ("embed/embedding",)),
    TensorRule(r"decoder\..*|lm_head\.weight"),
    TensorRule(re.escape(FIRST + _BIAS), ("positions/embedding",)),
    TensorRule(r"encoder\.final_layer_norm\.weight", ("norm/scale",)),
    TensorRule(rf"{_BLOCK}\.0\.layer_norm\.weight", ("blocks/{0}/norm1/scale",)),
    TensorRule(rf"{_BLOCK}\.1\.layer_norm\.weight", ("blocks/{0}/norm2/scale",)),
    *(
        TensorRule(
            rf"{_BLOCK}\.{theirs}\.weight", (f"blocks/{{0}}/{ours}/kernel",), transposed
        )
        for theirs, ours in KERNELS.items()
    ),
)
# Tensors of relatives of T5 1.1, and what they are.
OTHERS = {
    r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wi\.weight": "T5 1.0, whose MLP "
    "has no gate",
    rf"encoder\.block\.[1-9]\d*\.{re.escape(_BIAS)}": "umT5, whose blocks have biases "
    "by distance of their own",
}
# Fields of the config that have to be so, or absent.
ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("t5",),
    "feed_forward_proj": ("gated-gelu",),
    "dense_act_fn": ("gelu_new",),
    "is_gated_act": (True,),
    "quantization_config": (None,),
}


def load(
    path: str | Path | Checkpoint,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    **overrides: Any,
) -> T5:
    """Loads the encoder of a T5 1.1; takes little more memory than its weights.

    Those of T5-XXL take 19 GB in float32, and half as much with
    `param_dtype="bfloat16"`.

    Args:
      path: folder of transformers, with `config.json`; a file of the encoder alone; a
        single file of Stable Diffusion 3 that has it; or what `checkpoints.read` made
        of one.
      dtype: dtype of the computation, float32 or bfloat16; None for float32.
      param_dtype: dtype of the weights; None for float32, whatever the file's is.
      overrides: other fields of `T5Config`, such as `remat` or `stacked`.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      CheckpointError: a file is damaged, holds another architecture, or does not fit;
        lists every tensor without a place and place without a tensor.
      ModuleNotFoundError: reading it needs a package; says which.
      ValueError, TypeError: an option that cannot be.
    """
    checkpoint = _one_embedding(_recognised(component(path, "t5")))
    own = given(T5Config, {"dtype": dtype, "param_dtype": param_dtype, **overrides})
    config = configured(T5Config, checkpoint, lambda: _fields(checkpoint), ())
    config = dataclasses.replace(config, **own)
    parts, problems = arrange(checkpoint, RULES)
    model = nnx.eval_shape(lambda: T5(config, rngs=nnx.Rngs(0)))
    blocks = stacked(model, "blocks")
    fill(checkpoint.path, parts, model, stacked=blocks, problems=problems)
    return model


def _recognised(checkpoint: Checkpoint) -> Checkpoint:
    """Raises a `CheckpointError` if there is no encoder of a T5 1.1."""
    tensors = checkpoint.tensors
    for pattern, what in OTHERS.items():
        if any(re.fullmatch(pattern, name) for name in tensors):
            raise CheckpointError(checkpoint.path, f"{what}: expected T5 1.1")
    if FIRST + _BIAS not in tensors or not {EMBEDDING, COPY} & {*tensors}:
        some = ", ".join(sorted(tensors)[:5])
        raise CheckpointError(
            checkpoint.path,
            f"no encoder of a T5 1.1: expected {EMBEDDING}, {FIRST}{_BIAS} and so on, "
            f"found {some} ({len(tensors)} in all)",
        )
    return checkpoint


def _one_embedding(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the tensors with the embedding once, which files may hold twice.

    Raises:
      CheckpointError: the two differ.
    """
    tensors = dict(checkpoint.tensors)
    if COPY not in tensors:
        return checkpoint
    copy = tensors.pop(COPY)
    first = tensors.setdefault(EMBEDDING, copy)
    same = first.shape == copy.shape and all(
        np.array_equal(first[row : row + ROWS], copy[row : row + ROWS])
        for row in range(0, len(first), ROWS)
    )
    if not same:
        raise CheckpointError(
            checkpoint.path, f"{EMBEDDING} and {COPY} differ: expected one embedding"
        )
    return dataclasses.replace(checkpoint, tensors=tensors)


def _fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the fields of our config, by shapes and `config.json`.

    Raises:
      ValueError, TypeError, KeyError: a tensor is missing, or the config says what no
        T5 here computes, or other than the weights.
    """
    said = _by_config(checkpoint.config) if checkpoint.config else {}
    return agreed(_by_shapes(checkpoint.tensors), said)


def _by_shapes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    rows, heads = _matrix(tensors, FIRST + _BIAS)
    vocabulary, width = _matrix(tensors, EMBEDDING)
    inner, _ = _matrix(tensors, f"{FIRST}layer.0.SelfAttention.q.weight")
    hidden, _ = _matrix(tensors, f"{FIRST}layer.1.DenseReluDense.wi_0.weight")
    if inner % heads:
        raise ValueError(f"{inner} rows of queries for {heads} heads")
    matches = (re.match(_BLOCK, name) for name in tensors)
    return {
        "vocab_size": vocabulary,
        "width": width,
        "depth": len({match[1] for match in matches if match}),
        "heads": heads,
        "head_dim": inner // heads,
        "mlp_dim": hidden,
        "buckets": rows,
    }


def _matrix(tensors: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Returns the shape of a matrix; raises a `ValueError` if it is none."""
    shape = tuple(tensors[name].shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name} has shape {list(shape)}: expected a matrix")
    return shape


def _by_config(said: Mapping[str, Any]) -> dict[str, Any]:
    only(said, ONLY)
    return {
        "vocab_size": count(said, "vocab_size"),
        "width": count(said, "d_model"),
        "depth": count(said, "num_layers"),
        "heads": count(said, "num_heads"),
        "head_dim": count(said, "d_kv"),
        "mlp_dim": count(said, "d_ff"),
        "buckets": count(said, "relative_attention_num_buckets", 32),
        "distance": count(said, "relative_attention_max_distance", 128),
        "norm_eps": number(said, "layer_norm_epsilon", 1e-6),
    }
