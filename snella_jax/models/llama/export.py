"""A LLaMA as a Hugging Face folder, which `LlamaForCausalLM.from_pretrained` loads."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from snella_jax.files.arrays import Deferred, Stored
from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.formats import stacked
from snella_jax.models.checkpoints.json_fields import only
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.checkpoints.rewrite import parts_of
from snella_jax.models.llama.config import LlamaConfig
from snella_jax.models.llama.fields import ONLY
from snella_jax.models.llama.formats import hugging_face_name
from snella_jax.models.llama.model import Llama

SCALING = {  # fields of `Llama3Scaling` by their names there
    "factor": "factor",
    "low_freq_factor": "low_factor",
    "high_freq_factor": "high_factor",
    "original_max_position_embeddings": "original_context",
}
SIZES = {  # of weights, by their names in `config.json`
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_dim",
}


def folder(
    model: Llama, like: Checkpoint | None
) -> tuple[dict[str, Stored], dict[str, bytes]]:
    """Returns a model's tensors by Hugging Face's names, and the folder's other files.

    Args:
      model: plain.
      like: a folder of Hugging Face's whose other fields of `config.json`, tokenizer
        and further files are kept; None for none.

    Raises:
      CheckpointError: `like` is no such folder, or of a model of other sizes.
    """
    parts = parts_of(model, stacked(model, "blocks"))
    tensors: dict[str, Stored] = {}
    for path, part in parts.items():
        kernel = path.endswith("/kernel")
        tensors[hugging_face_name(path)] = _transposed(part) if kernel else part
    said: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    if like is not None:
        said |= _fitting(like)
        _check_sizes(like, model.config)
        files |= {
            file.name: file.read_bytes()
            for file in sorted(like.path.iterdir())
            if file.name.startswith(("tokenizer", "special_tokens", "chat_template"))
            or file.name in ("generation_config.json", "added_tokens.json")
        }
    said |= config_json(model.config, str(parts["embed/embedding"].dtype))
    text = json.dumps(said, indent=2) + "\n"
    return tensors, files | {"config.json": text.encode()}


def _fitting(like: Checkpoint) -> dict[str, Any]:
    """Returns the fields of a config, without how its own weights are quantised.

    Raises:
      CheckpointError: it has a field that no model here computes.
    """
    said = {k: v for k, v in like.config.items() if k != "quantization_config"}
    try:
        only(said, ONLY)
    except ValueError as error:
        raise CheckpointError(like.path, str(error)) from error
    return said


def config_json(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """Returns a config as old and new versions of transformers read it."""
    scaling = config.rope_scaling
    rope = {"rope_type": "default"}
    if scaling is not None:
        fields = {theirs: getattr(scaling, ours) for theirs, ours in SCALING.items()}
        rope = {"rope_type": "llama3", **fields}
    eos = list(config.eos) if len(config.eos) > 1 else (*config.eos, None)[0]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "bos_token_id": config.bos,
        "eos_token_id": eos,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _transposed(part: np.ndarray) -> Stored:
    """Returns `[out, in]` of `[in, out]`, made when its shard is written."""
    return Deferred(part.shape, part.dtype, lambda: part).T


def _check_sizes(like: Checkpoint, config: LlamaConfig) -> None:
    """Raises a `CheckpointError` if `like` is no folder of a model of these sizes."""
    said: Mapping[str, Any] = like.config
    if not like.path.is_dir() or said.get("model_type") != "llama":
        raise CheckpointError(
            like.path, "expected a Hugging Face folder of a LLaMA; leave like= out"
        )
    for theirs, ours in SIZES.items():
        own = getattr(config, ours)
        if said.get(theirs, own) != own:
            raise CheckpointError(
                like.path, f"it has {theirs}={said[theirs]!r}, and the model {own}"
            )
