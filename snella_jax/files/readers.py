"""Readers of `.safetensors` and JSON whose errors name the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from snella_jax.files.errors import CheckpointError


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the tensors and the metadata of a `.safetensors` file.

    Raises:
      CheckpointError: it is damaged.
    """
    try:
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except Exception as error:
        raise CheckpointError.damaged(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
      CheckpointError: it is damaged, or holds something else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError.damaged(path, error) from error
    if not isinstance(value, dict):
        raise CheckpointError(path, "expected a JSON object")
    return value
