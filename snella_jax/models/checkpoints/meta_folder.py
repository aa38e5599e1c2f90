"""Meta's folders of LLaMA weights: `consolidated.00.pth` and so on, and `params.json`.

Several files hold the parts of a model that ran on as many devices (fairscale's
`ColumnParallelLinear`, `RowParallelLinear` and `ParallelEmbedding`).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snella_jax.files import torch_file
from snella_jax.files.arrays import Deferred, Stored
from snella_jax.files.errors import CheckpointError
from snella_jax.files.readers import read_json
from snella_jax.models.checkpoints import state_dicts

FILES, PARAMS = "consolidated.*.pth", "params.json"
# Axis along which the parts of a tensor lie; others are in every file.
AXES = {
    r"layers\.\d+\.attention\.w[qkv]\.weight": 0,
    r"layers\.\d+\.attention\.wo\.weight": 1,
    r"layers\.\d+\.feed_forward\.w[13]\.weight": 0,
    r"layers\.\d+\.feed_forward\.w2\.weight": 1,
    r"output\.weight": 0,
}
EMBEDDING = "tok_embeddings.weight"  # 1 in LLaMA 1 and 2, 0 in LLaMA 3


def read(folder: Path) -> tuple[dict[str, Stored], dict[str, Any]] | None:
    """Reads tensors by name, joined, and `params.json`; None for another folder.

    Raises:
      CheckpointError: a file is damaged or missing, or they do not fit each other.
    """
    files = sorted(folder.glob(FILES))
    if not files:
        return None
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(files))]
    if [file.name for file in files] != expected:
        raise CheckpointError(
            folder,
            f"it has {', '.join(file.name for file in files)}: expected "
            f"{', '.join(expected)}",
        )
    if not (folder / PARAMS).exists():
        raise CheckpointError(folder, f"there is no {PARAMS} beside {files[0].name}")
    params = read_json(folder / PARAMS)
    parts = [state_dicts.chosen(file, torch_file.read(file), None) for file in files]
    for file, part in zip(files, parts, strict=True):
        if other := sorted(part.keys() ^ parts[0].keys()):
            raise CheckpointError(
                file, f"other tensors than in {files[0].name}: {', '.join(other[:5])}"
            )
    if len(parts) == 1:
        return dict(parts[0]), params
    return {name: _joined(folder, name, parts, params) for name in parts[0]}, params


def _joined(
    folder: Path,
    name: str,
    parts: Sequence[Mapping[str, np.ndarray]],
    params: Mapping[str, Any],
) -> Stored:
    own = [part[name] for part in parts]
    axis = next((axis for mark, axis in AXES.items() if re.fullmatch(mark, name)), None)
    if name == EMBEDDING:
        axis = 0 if own[0].shape[-1:] == (params.get("dim"),) else 1
    if axis is None:
        return own[0]
    if {part.ndim for part in own} != {2} or len({part.dtype for part in own}) > 1:
        raise CheckpointError(folder, f"the parts of {name} do not fit each other")
    if len({part.shape[1 - axis] for part in own}) > 1:
        shapes = ", ".join(str(list(part.shape)) for part in own)
        raise CheckpointError(folder, f"the parts of {name} have shapes {shapes}")
    shape = list(own[0].shape)
    shape[axis] = sum(part.shape[axis] for part in own)
    return Deferred(tuple(shape), own[0].dtype, lambda: np.concatenate(own, axis))
