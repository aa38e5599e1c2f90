"""Published formats of LLaMA weights: where their tensors go.

| format | examples |
|---|---|
| Hugging Face folder | `LlamaForCausalLM`, whole or in shards |
| Meta's folder | `consolidated.00.pth` and so on, with `params.json` |
| `.gguf` of llama.cpp | F32, F16, BF16, and all that the package `gguf` dequantises |

Meta's files and GGUF have the rows of q and k in the order of "interleaved" rotary
embeddings, see `rotary`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from snella_jax.files.arrays import Deferred, Stored
from snella_jax.models.checkpoints.mapping import TensorRule
from snella_jax.models.checkpoints.torch_rules import transposed
from snella_jax.models.llama.config import LlamaConfig

Format = Literal["hugging_face", "meta", "gguf"]
FORMATS: tuple[Format, ...] = ("hugging_face", "meta", "gguf")
_L, _A, _F = "layers.{0}.", "layers.{0}.attention.", "layers.{0}.feed_forward."
# Paths of ours, and names in the formats, without `.weight`.
TABLE = [
    ("embed/embedding", "embed_tokens", "tok_embeddings", "token_embd"),
    ("blocks/{0}/norm1/scale", _L + "input_layernorm", _L + "attention_norm",
     "blk.{0}.attn_norm"),
    ("blocks/{0}/attn/q/kernel", _L + "self_attn.q_proj", _A + "wq", "blk.{0}.attn_q"),
    ("blocks/{0}/attn/k/kernel", _L + "self_attn.k_proj", _A + "wk", "blk.{0}.attn_k"),
    ("blocks/{0}/attn/v/kernel", _L + "self_attn.v_proj", _A + "wv", "blk.{0}.attn_v"),
    ("blocks/{0}/attn/o/kernel", _L + "self_attn.o_proj", _A + "wo",
     "blk.{0}.attn_output"),
    ("blocks/{0}/norm2/scale", _L + "post_attention_layernorm", _L + "ffn_norm",
     "blk.{0}.ffn_norm"),
    ("blocks/{0}/mlp/gate/kernel", _L + "mlp.gate_proj", _F + "w1", "blk.{0}.ffn_gate"),
    ("blocks/{0}/mlp/up/kernel", _L + "mlp.up_proj", _F + "w3", "blk.{0}.ffn_up"),
    ("blocks/{0}/mlp/down/kernel", _L + "mlp.down_proj", _F + "w2", "blk.{0}.ffn_down"),
    ("norm/scale", "norm", "norm", "output_norm"),
    ("head/kernel", "lm_head", "output", "output"),
]  # fmt: skip
# What every format has a tensor of: the embedding.
MARKS = (r"embed_tokens\.weight", r"tok_embeddings\.weight", r"token_embd\.weight")
# Frequencies of rotary embeddings, which follow from the config.
LEFT_OUT = {
    "hugging_face": r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    "meta": r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs",
    "gguf": r"rope_freqs\.weight",
}


def rules(form: Format, config: LlamaConfig) -> list[TensorRule]:
    """Returns the rules for the tensors of a format."""
    made = [TensorRule(LEFT_OUT[form])]
    if config.tied:  # `weights.load` compares it with the embedding
        made.append(TensorRule(rf"{_pattern(TABLE[-1], form)}"))
    heads = {"q": config.heads, "k": config.kv_heads}
    for row in TABLE:
        path, _, kind = row[0].rpartition("/")
        make = transposed if kind == "kernel" else _same
        if form != "hugging_face" and (count := heads.get(path[-1])):
            make = _half_split(count)
        made.append(TensorRule(_pattern(row, form), (row[0],), make))
    return made


def hugging_face_name(path: str) -> str:
    """Returns the name of a parameter in a `LlamaForCausalLM`, by its path.

    >>> hugging_face_name("blocks/3/attn/q/kernel")
    'model.layers.3.self_attn.q_proj.weight'
    """
    for ours, theirs, *_ in TABLE:
        if match := re.fullmatch(_numbered(ours), path):
            name = f"{theirs.format(*match.groups())}.weight"
            return name if theirs == "lm_head" else f"model.{name}"
    raise ValueError(f"{path} is no parameter of a LLaMA.")


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Orders the rows of each head for half-split rotation, from the interleaved order.

    >>> half_split(np.arange(8)[:, None], heads=2).ravel().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]

    Raises:
      ValueError: the rows are no pairs for each head.
    """
    if rows.ndim != 2 or rows.shape[0] % (2 * heads):
        raise ValueError(f"expected pairs of rows for each of {heads} heads")
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _half_split(heads: int) -> Callable[[Stored], Sequence[Stored]]:
    def make(tensor: Stored) -> Sequence[Stored]:
        ordered = Deferred(
            tensor.shape, tensor.dtype, lambda: half_split(np.asarray(tensor), heads)
        )
        return (ordered.T,)

    return make


def _same(tensor: Stored) -> Sequence[Stored]:
    return (tensor,)


def _pattern(row: tuple[str, ...], form: Format) -> str:
    return _numbered(f"{row[1 + FORMATS.index(form)]}.weight")


def _numbered(name: str) -> str:
    return re.escape(name).replace(r"\{0\}", r"(\d+)")
