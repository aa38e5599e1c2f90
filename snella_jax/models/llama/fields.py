"""What files say of a LLaMA's config, as fields of ours.

Hugging Face's `config.json`, of old and new versions of transformers, Meta's
`params.json`, and the metadata of GGUF. What changes outputs is obeyed, or refused by
name.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from snella_jax.models.checkpoints.json_fields import count, flag, number, only
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.llama.rotary import Llama3Scaling, inverse_frequencies

NO = (False, None)
# Fields of Hugging Face's configs that have to be so, or absent.
ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": NO,
    "mlp_bias": NO,
    "rope_interleaved": NO,
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
PARAMS = {  # all that Meta's `params.json` may have
    *("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "multiple_of"),
    *("ffn_dim_multiplier", "rope_theta", "vocab_size", "use_scaled_rope"),
    *("rope_scaling_factor", "max_batch_size", "max_seq_len"),
}
# Factors of scaled frequencies by width and depth, for `params.json` has none.
FACTORS = {
    **dict.fromkeys([(2048, 16), (3072, 28)], 32.0),  # LLaMA 3.2
    **dict.fromkeys([(4096, 32), (8192, 80), (16384, 126)], 8.0),  # 3.1 and 3.3
}
# First and last token of a text, by the number of tokens.
ENDS = {32000: (1, (2,)), 128256: (128000, (128001,))}
ORIGINAL_CONTEXTS = [2**power for power in range(10, 18)]


def of_hugging_face(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads `config.json`.

    Raises:
      ValueError, TypeError: it says what no LLaMA here computes, or too little.
    """
    said = checkpoint.config
    if not said:
        raise ValueError(
            "there is no config.json, which says how many heads there are: expected "
            "the whole folder"
        )
    only(said, ONLY)
    heads, width = count(said, "num_attention_heads"), count(said, "hidden_size")
    eos = said.get("eos_token_id")
    return {
        "vocab_size": count(said, "vocab_size"),
        "width": width,
        "depth": count(said, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": count(said, "num_key_value_heads", heads),
        "head_dim": count(said, "head_dim", _divided(width, heads)),
        "mlp_dim": count(said, "intermediate_size"),
        "norm_eps": number(said, "rms_norm_eps", 1e-6),
        **_rope(said),
        "context": count(said, "max_position_embeddings", 2048),
        "tied": flag(said, "tie_word_embeddings"),
        "bos": _token(said.get("bos_token_id"), "bos_token_id"),
        "eos": tuple(
            _token(token, "eos_token_id")
            for token in (eos if isinstance(eos, list) else [eos])
            if token is not None
        ),
    }


def of_meta(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads `params.json`; errors as in `of_hugging_face`."""
    said = {name: value for name, value in checkpoint.config.items() if value != -1}
    if unknown := sorted(said.keys() - PARAMS):
        raise ValueError(f"params.json has {', '.join(unknown)}, not known here")
    width, depth, heads = (count(said, f) for f in ("dim", "n_layers", "n_heads"))
    multiple = count(said, "multiple_of")
    hidden = int(number(said, "ffn_dim_multiplier", 1.0) * int(8 * width / 3))
    theta = number(said, "rope_theta", 10_000.0)
    vocabulary = count(said, "vocab_size", _rows(checkpoint, "tok_embeddings.weight"))
    scaling = None
    if flag(said, "use_scaled_rope"):
        factor = said.get("rope_scaling_factor", FACTORS.get((width, depth)))
        if factor is None:
            raise ValueError(
                "params.json has use_scaled_rope, and no rope_scaling_factor: add it "
                "there, 8 for LLaMA 3.1, 32 for 3.2"
            )
        scaling = Llama3Scaling(number({"factor": factor}, "factor"))
    eps = number(said, "norm_eps")
    old = 2048 if eps < 5e-6 else 4096  # LLaMA 1, LLaMA 2
    bos, eos = ENDS.get(vocabulary, (None, ()))
    return {
        "vocab_size": vocabulary,
        "width": width,
        "depth": depth,
        "heads": heads,
        "kv_heads": count(said, "n_kv_heads", heads),
        "head_dim": _divided(width, heads),
        "mlp_dim": multiple * -(-hidden // multiple),
        "norm_eps": eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "context": 131072 if scaling else 8192 if theta > 1e5 else old,
        "tied": "output.weight" not in checkpoint.tensors,
        "bos": bos,
        "eos": eos,
    }


def of_gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads a GGUF file's metadata; errors as in `of_hugging_face`."""
    kind = checkpoint.config.get("general.architecture")
    if kind != "llama":
        raise ValueError(f"general.architecture={kind!r}: expected 'llama'")
    said = {
        name.removeprefix("llama."): value for name, value in checkpoint.config.items()
    }
    if experts := said.get("expert_count"):
        raise ValueError(f"llama.expert_count={experts}: expected none")
    if (scaling := said.get("rope.scaling.type", "none")) != "none":
        raise ValueError(f"llama.rope.scaling.type={scaling!r}: expected 'none'")
    for name in ("rope.scaling.factor", "rope.scale_linear"):  # without a type: linear
        if (scale := said.get(name, 1)) not in (0, 1):
            raise ValueError(f"llama.{name}={scale!r}: expected 1")
    heads = count(said, "attention.head_count")
    width = count(said, "embedding_length")
    head_dim = count(said, "attention.key_length", _divided(width, heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if (other := count(said, name, head_dim)) != head_dim:
            raise ValueError(f"llama.{name}={other}: expected {head_dim}")
    theta = _decimal(number(said, "rope.freq_base", 10_000.0))
    eos = said.get("tokenizer.ggml.eos_token_id")
    return {
        "vocab_size": _rows(checkpoint, "token_embd.weight"),
        "width": width,
        "depth": count(said, "block_count"),
        "heads": heads,
        "kv_heads": count(said, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "mlp_dim": count(said, "feed_forward_length"),
        "norm_eps": _decimal(number(said, "attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _scaling_of(checkpoint, head_dim, theta),
        "context": count(said, "context_length"),
        "tied": "output.weight" not in checkpoint.tensors,
        "bos": _token(said.get("tokenizer.ggml.bos_token_id"), "bos_token_id"),
        "eos": () if eos is None else (_token(eos, "eos_token_id"),),
    }


def _scaling_of(
    checkpoint: Checkpoint, head_dim: int, theta: float
) -> Llama3Scaling | None:
    """Recognises the scaling that gives the file's factors of frequencies."""
    if (tensor := checkpoint.tensors.get("rope_freqs.weight")) is None:
        return None
    factors = np.asarray(tensor, np.float32)
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all():
        raise ValueError(
            f"rope_freqs.weight has shape {list(factors.shape)}: expected "
            f"{head_dim // 2} finite numbers"
        )
    if (factors == 1).all():
        return None
    plain = inverse_frequencies(head_dim, theta)
    for context in ORIGINAL_CONTEXTS:
        scaling = Llama3Scaling(float(factors.max()), original_context=context)
        if np.allclose(plain / scaling.scaled(plain), factors, rtol=1e-4):
            return scaling
    raise ValueError(
        "rope_freqs.weight holds factors of frequencies that are not those of LLaMA 3"
    )


def _rope(said: Mapping[str, Any]) -> dict[str, Any]:
    """Reads theta and scaling, by the names of old and new versions."""
    old, new = said.get("rope_scaling"), said.get("rope_parameters")
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r}: expected an object")
    found = [_scaling(value) for value in (new, old) if value is not None]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError("rope_scaling and rope_parameters differ")
    given = (new or {}) if "rope_theta" in (new or {}) else said
    return {
        "rope_theta": number(given, "rope_theta", 10_000.0),
        "rope_scaling": found[0] if found else None,
    }


def _scaling(said: Mapping[str, Any]) -> Llama3Scaling | None:
    kind = said.get("rope_type", said.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type={kind!r}: expected 'default' or 'llama3'")
    only(said, ONLY)
    if kind == "default":
        return None
    return Llama3Scaling(
        number(said, "factor"),
        number(said, "low_freq_factor"),
        number(said, "high_freq_factor"),
        count(said, "original_max_position_embeddings"),
    )


def _decimal(value: float) -> float:
    """Returns the shortest decimal number that has this value in float32.

    >>> _decimal(float(np.float32(1e-5)))
    1e-05
    """
    return float(str(np.float32(value)))


def _token(value: Any, name: str) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"{name}={value!r}: expected the number of a token")
    return value


def _divided(width: int, heads: int) -> int | None:
    """Returns the usual width of a head; None if there is none."""
    return None if width % heads else width // heads


def _rows(checkpoint: Checkpoint, name: str) -> int:
    if name not in checkpoint.tensors or not checkpoint.tensors[name].shape:
        raise ValueError(f"there is no matrix {name}")
    return checkpoint.tensors[name].shape[0]
