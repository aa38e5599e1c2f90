"""LoRA in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

Keys are `base_model.model.MODULE.lora_A.weight` `[r, in]` and `lora_B.weight`
`[out, r]`, and `base_model.model.TENSOR` for modules that were trained whole
(`modules_to_save`). A module's weight `[out, in]` gets `alpha / r * B A`, with rsLoRA
`alpha / sqrt(r) * B A`. DoRA has a vector of magnitudes `[out]` besides.

Source: `LoraConfig` and `get_peft_model_state_dict` of PEFT 0.21.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snella_jax.adapters.file_format import (
    CONFIG,
    PREFIX,
    TENSORS,
    check_free,
    check_there,
)
from snella_jax.files.atomic import whole_folder
from snella_jax.files.errors import CheckpointError
from snella_jax.files.hosts import once
from snella_jax.files.readers import read_json, read_safetensors
from snella_jax.files.tensors import write_tensors

DIFFUSERS = "pytorch_lora_weights.safetensors"
TRANSFORMER = "transformer"  # the part of a pipeline that it is for
TRAINED = "snella_trained"  # key of the metadata: tensors that trained, of those saved
# Fields of a config that change what a module computes, and what they are.
REFUSED = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "layer_replication": "layers that are repeated",
    "lora_bias": "biases of LoRA's own",
    "target_parameters": "LoRA of parameters that are no module's weight",
    "trainable_token_indices": "single tokens that train",
}
# Ways to begin that leave the base's weights as they are; the others change them.
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Lora:
    """Low-rank update of a module's weight: `scale * up @ down`.

    Attributes:
      down: `[r, in]`, or `[r, in, height, width]` of a convolution: PEFT's `lora_A`.
      up: `[out, r]`: PEFT's `lora_B`.
      scale: factor of the product.
      magnitude: `[out]`, norms of the rows of the whole weight, in DoRA; else None.
    """

    down: np.ndarray
    up: np.ndarray
    scale: float = 1.0
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return self.up.shape[1]


@dataclass(frozen=True)
class PeftFile:
    """The contents of a folder.

    Attributes:
      loras: updates by name of their module.
      saved: tensors of modules that were trained whole, by name.
      modules: names of these modules.
      trained: names of those of `saved` that trained; the others are the base's, and
        only there because PEFT saves modules whole.
      base: name of the base model, or None.
    """

    loras: Mapping[str, Lora]
    saved: Mapping[str, np.ndarray]
    modules: Sequence[str]
    trained: Sequence[str]
    base: str | None = None


def write(folder: Path, file: PeftFile, *, dropout: float, diffusers: bool) -> None:
    """Writes a folder, whole or not at all; an adapter that is there is replaced.

    Args:
      folder: folder to write.
      file: contents, with scales of 1 and without magnitudes.
      dropout: rate on the input, for whoever trains on.
      diffusers: True to write `pytorch_lora_weights.safetensors`, too.

    Raises:
      FileExistsError: `folder` holds something else than an adapter.
    """
    once(lambda: check_free(folder, DIFFUSERS))
    config = _config(file, dropout)
    tensors = {
        f"{name}.lora_{letter}.weight": factor
        for name, lora in file.loras.items()
        for letter, factor in (("A", lora.down), ("B", _as_module(lora)))
    }
    whole = {PREFIX + name: x for name, x in (tensors | dict(file.saved)).items()}
    metadata = {"format": "pt", TRAINED: json.dumps(list(file.trained))}

    def save() -> None:
        check_free(folder, DIFFUSERS)  # still
        with whole_folder(folder) as new:
            text = json.dumps(config, indent=2) + "\n"
            (new / CONFIG).write_text(text, "utf-8")
            write_tensors(whole, new / TENSORS, metadata)
            if diffusers:
                said = {f"{TRANSFORMER}.{name}": x for name, x in config.items()}
                write_tensors(
                    {f"{TRANSFORMER}.{name}": x for name, x in tensors.items()},
                    new / DIFFUSERS,
                    {"format": "pt", "lora_adapter_metadata": json.dumps(said)},
                )

    once(save)


def _as_module(lora: Lora) -> np.ndarray:
    """Returns `lora_B`, which has the axes of `lora_A`."""
    ones = (1,) * (lora.down.ndim - 2)
    return np.ascontiguousarray(lora.up.reshape(*lora.up.shape, *ones))


def _config(file: PeftFile, dropout: float) -> dict[str, Any]:
    """Returns what PEFT's `LoraConfig` reads: alpha is the rank, so the scale is 1."""
    ranks = {name: lora.rank for name, lora in file.loras.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern: dict[str, int] = {}
    if len(set(ranks.values())) > 1:
        # PEFT takes the first that ends a module's name: whole names before their ends.
        pattern = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True)}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": file.base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": dropout,
        "target_modules": list(ranks),
        "modules_to_save": list(file.modules) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def read(folder: str | Path) -> PeftFile:
    """Reads a LoRA, rsLoRA or DoRA.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: a file is damaged, or the adapter is of another kind; says which.
    """
    folder = Path(folder)
    check_there(folder)
    config = read_json(folder / CONFIG)
    _check_kind(folder / CONFIG, config)
    tensors, metadata = read_safetensors(folder / TENSORS)
    try:
        return _parsed(folder, config, tensors, metadata)
    except CheckpointError:
        raise
    except re.error as error:
        raise CheckpointError(
            folder / CONFIG, f"a pattern is no regex ({error})"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError.damaged(folder / CONFIG, error) from error


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    """Raises a `CheckpointError` for what is no LoRA, or one of a kind unknown here."""
    kind = config.get("peft_type")
    if kind == "SNELLA":
        raise CheckpointError(path, "it is of this library: load it with snella.load")
    if kind != "LORA":
        raise CheckpointError(path, f"peft_type is {kind!r}: expected 'LORA'")
    for field, what in REFUSED.items():
        if config.get(field):
            raise CheckpointError(path, f"{field}={config[field]!r}: {what}")
    if (begun := config.get("init_lora_weights")) not in BEGINNINGS:
        raise CheckpointError(
            path,
            f"init_lora_weights={begun!r} changed the base's weights: expected a plain "
            "LoRA, which PEFT's save_pretrained(path_initial_model_for_weight_"
            "conversion=...) makes of it",
        )


def _parsed(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> PeftFile:
    downs, ups, magnitudes, saved = {}, {}, {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name):
            (downs if match[2] == "A" else ups)[match[1]] = tensor
        elif match := re.fullmatch(r"(.+)\.lora_magnitude_vector(?:\..*)?", name):
            magnitudes[match[1]] = tensor.reshape(-1)
        elif ".lora_" in name:
            raise CheckpointError(
                folder / TENSORS, f"{key}: expected lora_A and lora_B of modules alone"
            )
        else:
            saved[re.sub(r"\.(base_layer|modules_to_save\.default)\.", ".", name)] = (
                tensor
            )
    if odd := sorted(downs.keys() ^ ups.keys() | magnitudes.keys() - ups.keys()):
        raise CheckpointError(
            folder / TENSORS, f"lora_A or lora_B is missing of {', '.join(odd)}"
        )
    if not downs:
        raise CheckpointError(folder / TENSORS, "it has no lora_A")
    if bool(config.get("use_dora")) != bool(magnitudes):
        raise CheckpointError(
            folder / CONFIG,
            f"use_dora={config.get('use_dora')!r}, and {TENSORS} has "
            f"{len(magnitudes)} vectors of magnitudes",
        )
    loras = {
        name: _lora(folder, name, down, ups[name], magnitudes.get(name), config)
        for name, down in downs.items()
    }
    trained = json.loads(metadata.get(TRAINED, "null"))
    if trained is not None and (lost := sorted(set(trained) - saved.keys())):
        raise CheckpointError(
            folder / TENSORS, f"it has no tensor {', '.join(lost)}, which trained"
        )
    return PeftFile(
        loras,
        saved,
        config.get("modules_to_save") or (),
        list(saved) if trained is None else trained,
        config.get("base_model_name_or_path"),
    )


def _lora(
    folder: Path,
    name: str,
    down: np.ndarray,
    up: np.ndarray,
    magnitude: np.ndarray | None,
    config: Mapping[str, Any],
) -> Lora:
    rank = _by_pattern(config.get("rank_pattern"), name, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    columns = up.shape[1] if up.ndim > 1 else 0
    if (
        down.ndim < 2
        or not 0 < len(down) == columns == rank
        or up.size != len(up) * rank
    ):
        raise CheckpointError(
            folder / TENSORS,
            f"{name} has lora_A {list(down.shape)} and lora_B {list(up.shape)}, and "
            f"{CONFIG} says rank {rank}",
        )
    if magnitude is not None and len(magnitude) != len(up):
        raise CheckpointError(
            folder / TENSORS,
            f"{name} has {len(magnitude)} magnitudes for {len(up)} outputs",
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Lora(down, up.reshape(len(up), rank), scale, magnitude)


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, usual: Any) -> Any:
    """Returns the value of the first regex that ends a module's name, as in PEFT."""
    for ends, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({ends})$", name):
            return value
    return usual
