"""The format that a model is exported in: names, rules and what its files say."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from snella_jax.models.checkpoints.mapping import TensorRule
from snella_jax.models.checkpoints.read import Checkpoint

Renamed = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TorchFormat:
    """Names of a model's tensors in transformers or diffusers, and its rows for them.

    Attributes:
      rules: rules for the tensors in files, without a prefix.
      stacked: regex of the modules whose variables have a leading axis, as in `fill`.
      renamed: what names in files have, and those of the modules in memory in its
        place, one after the other; none of the latter is in a name in a file.
      part: path of a part in our model, as `fill` knows it, from that of the rules.
    """

    rules: Sequence[TensorRule]
    stacked: str
    renamed: Renamed = ()
    part: Callable[[str], str] = str

    def in_memory(self, name: str) -> str:
        """Returns a tensor's name in memory, from that in a file."""
        for old, new in self.renamed:
            name = name.replace(old, new)
        return name

    def in_file(self, name: str) -> str:
        """Returns a tensor's name in a file, from that in memory or in a file."""
        for old, new in reversed(self.renamed):
            name = name.replace(new, old)
        return name


@dataclass(frozen=True)
class ExportFormat:
    """A model's numbers, and what the format of a checkpoint says of them.

    Attributes:
      family: `model_type` in transformers.
      kind: beginning of the names of its classes there.
      checkpoint: names as the rules know them, without a prefix.
      rules: rules for its tensors.
      parts: the model's arrays by the rules' paths.
      free: regex of the paths, beside the head's, whose shape may have changed.
      left_out: regex of the tensors without a place that are not written.
      buffers: new values of other tensors, by name.
      config: fields of transformers' `config.json` of this family alone.
      known: fields of our config that the checkpoint says, or its format.
    """

    family: str
    kind: str
    checkpoint: Checkpoint
    rules: Sequence[TensorRule]
    parts: Mapping[str, np.ndarray]
    free: str = "(?!)"
    left_out: str = "(?!)"
    buffers: Mapping[str, np.ndarray] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hugging_face(self) -> bool:
        """True if the names are those of transformers."""
        return is_hugging_face(self.checkpoint)

    @property
    def head(self) -> dict[str, str]:
        """Names of the head's tensors, by path."""
        if "embedding/kernel" in self.checkpoint.tensors:  # the original .npz
            return {path: path for path in ("head/kernel", "head/bias")}
        name = "classifier" if self.hugging_face else "head"
        return {"head/kernel": f"{name}.weight", "head/bias": f"{name}.bias"}


def is_hugging_face(checkpoint: Checkpoint) -> bool:
    """Returns True if the names of a checkpoint are those of transformers."""
    return any(name.startswith("embeddings.") for name in checkpoint.tensors)


def stacked(model: Any, blocks: str) -> str:
    """Returns the regex of a model's stacked blocks; matches nothing if none are."""
    return blocks if model.config.stacked else "(?!)"
