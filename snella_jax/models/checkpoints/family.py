"""The entry of a family of models in the registry."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from snella_jax.models.checkpoints.formats import ExportFormat, TorchFormat


@dataclass(frozen=True)
class Family:
    """A family of models, such as the ViTs.

    Attributes:
      config: class of the configs.
      model: class of the models; called with a config and `rngs`.
      presets: configs by name.
      marks: regexes of names of tensors that every checkpoint of the family has, one
        for each format.
      load: makes a model of a checkpoint.
      torch: returns the names that transformers or diffusers have for a model's
        tensors, by its config.
      export_format: returns the format of a checkpoint with a model's numbers; None for
        a family whose models are written by `folder`.
      folder: returns the tensors and the other files of a folder that a model is
        written as, given a checkpoint to take after, or None.
      file: returns the tensors of a `.npz` or `.safetensors` that a model is written
        as, given a checkpoint or None; None for a family of which `folder` writes all.
      stem: beginning of the names of the weights' files in such a folder.
    """

    config: type
    model: type
    presets: Mapping[str, Any]
    marks: tuple[str, ...]
    load: Callable[..., Any]
    torch: Callable[[Any], TorchFormat]
    export_format: Callable[..., ExportFormat] | None = None
    folder: Callable[..., tuple[dict[str, Any], dict[str, bytes]]] | None = None
    file: Callable[..., dict[str, Any]] | None = None
    stem: str = "model"
