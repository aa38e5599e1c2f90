"""Rules for the layers of PyTorch's models, of which the tables of formats are made."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.mapping import TensorRule
from snella_jax.models.checkpoints.read import Checkpoint

QKV = ("query", "key", "value")


def transposed(tensor: np.ndarray) -> Sequence[np.ndarray]:
    """Turns PyTorch's `[out, in]` into Flax's `[in, out]`."""
    return (tensor.T,)


def window(tensor: np.ndarray) -> Sequence[np.ndarray]:
    """Turns PyTorch's `[out, in, height, width]` into `[height, width, in, out]`."""
    return (tensor.transpose(2, 3, 1, 0),)


def thirds(tensor: np.ndarray) -> Sequence[np.ndarray]:
    """Splits a fused `[3 * D]` or `[3 * D, D]` into query, key and value."""
    return [part.T for part in np.split(tensor, 3)]


def linear(pattern: str, path: str) -> list[TensorRule]:
    """Returns the rules for a linear layer's weight, and its bias if it has one."""
    return [
        TensorRule(rf"(?:{pattern})\.weight", (f"{path}/kernel",), transposed),
        TensorRule(rf"(?:{pattern})\.bias", (f"{path}/bias",)),
    ]


def affine(pattern: str, path: str) -> list[TensorRule]:
    """Returns the rules for a norm's weight and bias."""
    return [
        TensorRule(rf"(?:{pattern})\.weight", (f"{path}/scale",)),
        TensorRule(rf"(?:{pattern})\.bias", (f"{path}/bias",)),
    ]


def convolution(pattern: str, path: str) -> list[TensorRule]:
    """Returns the rules for a convolution's weight and bias."""
    return [
        TensorRule(rf"(?:{pattern})\.weight", (f"{path}/kernel",), window),
        TensorRule(rf"(?:{pattern})\.bias", (f"{path}/bias",)),
    ]


def fused(pattern: str, path: str) -> list[TensorRule]:
    """Returns the rules for query, key and value in one linear layer."""
    return [
        TensorRule(
            rf"{pattern}\.{theirs}",
            tuple(f"{path}/{name}/{ours}" for name in QKV),
            thirds,
        )
        for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
    ]


def require(checkpoint: Checkpoint, marks: Sequence[str], kind: str) -> None:
    """Raises a `CheckpointError` if no tensor has a name of a kind of model."""
    if not checkpoint.prefixes(*marks):
        names = sorted(checkpoint.tensors)
        raise CheckpointError(
            checkpoint.path,
            f"no {kind} of a known format: expected the names of the original or of "
            f"Hugging Face, found {', '.join(names[:5])} ({len(names)} in all)",
        )


def check_numbers(config: Mapping[str, Any], *names: str) -> None:
    """Raises a `ValueError` if a config file says something else than numbers."""
    for name in names:
        value = config.get(name, 0)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"{name}={value!r}: expected numbers")


def root(count: int) -> int:
    """Returns the root of a square number; raises a `ValueError` for any other."""
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{count} is no square")
    return side
