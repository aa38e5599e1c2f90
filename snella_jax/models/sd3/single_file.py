"""Finds a component of Stable Diffusion 3: in its own folder, or in one file of many.

Single files, such as `sd3_medium_incl_clips.safetensors`, hold several components,
whose tensors' names begin differently; folders of diffusers have one folder for each.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.read import Checkpoint, read

Part = Literal["mmdit", "vae", "clip_l", "clip_g", "t5"]
PREFIXES: dict[Part, str] = {  # of names in single files
    "mmdit": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
FOLDERS: dict[Part, str] = {  # in a folder of a diffusers pipeline
    "mmdit": "transformer",
    "vae": "vae",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
}
PIPELINE = "model_index.json"  # file of every folder of a whole pipeline


def component(path: str | Path | Checkpoint, part: Part) -> Checkpoint:
    """Reads the tensors of one component, their names without the single file's prefix.

    Args:
      path: the component's folder, a file of it alone, a single file of several, or
        what `checkpoints.read` made of one.
      part: component that is meant.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      CheckpointError: the file is damaged, it or the folder is one of other components
        or of a whole pipeline, or the folder has a config and no weights.
      ModuleNotFoundError: reading it needs a package; says which.
    """
    checkpoint = path if isinstance(path, Checkpoint) else _read(Path(path), part)
    own = PREFIXES[part]
    if not any(name.startswith(own) for name in checkpoint.tensors):
        if found := parts_in(checkpoint):
            raise CheckpointError(
                checkpoint.path,
                f"it holds {', '.join(found)} and no {part}, whose tensors' names "
                f"would begin with {own}",
            )
        return checkpoint
    tensors = {
        name.removeprefix(own): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(own)
    }
    return dataclasses.replace(checkpoint, tensors=tensors, prefix=own)


def parts_in(checkpoint: Checkpoint) -> list[Part]:
    """Lists the components that a single file holds; none for any other checkpoint."""
    names = checkpoint.tensors
    return [
        part
        for part, prefix in PREFIXES.items()
        if any(name.startswith(prefix) for name in names)
    ]


def _read(path: Path, part: Part) -> Checkpoint:
    if (path / PIPELINE).exists():
        raise CheckpointError(
            path, f"a whole pipeline: expected its folder {FOLDERS[part]}"
        )
    try:
        return read(path)
    except FileNotFoundError as error:
        if not (path / "config.json").exists():
            raise
        raise CheckpointError(
            path,
            "there is a config.json and no weights beside it: its download is not "
            "complete",
        ) from error
