"""Published weights for the LLaMA: files and folders as models."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.build import configured
from snella_jax.models.checkpoints.family import Family
from snella_jax.models.checkpoints.formats import TorchFormat, stacked
from snella_jax.models.checkpoints.mapping import arrange, fill
from snella_jax.models.checkpoints.read import Checkpoint, read
from snella_jax.models.llama import fields, formats
from snella_jax.models.llama.config import PRESETS, LlamaConfig
from snella_jax.models.llama.export import folder
from snella_jax.models.llama.formats import FORMATS, MARKS, Format
from snella_jax.models.llama.model import Llama

FIELDS = {
    "hugging_face": fields.of_hugging_face,
    "meta": fields.of_meta,
    "gguf": fields.of_gguf,
}
ROWS = 4096  # of two matrices that are compared at once


def load(
    path: str | Path | Checkpoint,
    *,
    weights: str | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    **overrides: Any,
) -> Llama:
    """Loads a LLaMA with published weights; the format is recognised.

    Reads Hugging Face folders, Meta's (`consolidated.00.pth` and so on with
    `params.json`) and GGUF files, and takes little more memory than the weights in
    `param_dtype`.

    Args:
      path: folder or GGUF file, or what `checkpoints.read` made of one.
      weights: set of weights, if a file holds several, as in `vit.load`.
      dtype: dtype of the computation; None for the file's.
      param_dtype: dtype of the weights; None for the file's, that of its embedding
        (float32 where that is quantised).
      overrides: other fields of `LlamaConfig`, such as `remat` or `stacked`.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      CheckpointError: a file is damaged, holds another architecture, or does not fit;
        lists every tensor without a place and place without a tensor.
      ModuleNotFoundError: reading it needs a package; says which.
      ValueError, TypeError: an option that cannot be.
    """
    checkpoint, form = recognised(read(path, weights))
    config = configured(LlamaConfig, checkpoint, lambda: FIELDS[form](checkpoint), ())
    known = {field.name for field in dataclasses.fields(LlamaConfig)}
    if unknown := sorted(overrides.keys() - known):
        raise ValueError(
            f"{checkpoint.path} is a LLaMA, which has no {', '.join(unknown)}."
        )
    of_file = _dtype(checkpoint, form)
    given = {"dtype": dtype, "param_dtype": param_dtype}
    given = {name: of_file if d is None else jnp.dtype(d) for name, d in given.items()}
    config = dataclasses.replace(config, **overrides | given)
    _check_depth(checkpoint, form, config.depth)
    if config.tied:
        _check_tied(checkpoint, form)
    parts, problems = arrange(checkpoint, formats.rules(form, config))
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    blocks = stacked(model, "blocks")
    fill(checkpoint.path, parts, model, stacked=blocks, problems=problems)
    return model


def recognised(checkpoint: Checkpoint) -> tuple[Checkpoint, Format]:
    """Returns the tensors without a prefix, and their format.

    Raises:
      CheckpointError: no known format.
    """
    checkpoint = checkpoint.unwrapped(*MARKS)
    for form, mark in zip(FORMATS, MARKS, strict=True):
        if any(re.fullmatch(mark, name) for name in checkpoint.tensors):
            return checkpoint, form
    some = ", ".join(sorted(checkpoint.tensors)[:5])
    raise CheckpointError(
        checkpoint.path,
        "no LLaMA of a known format: expected the names of Hugging Face, Meta or GGUF, "
        f"found {some} ({len(checkpoint.tensors)} in all)",
    )


def _dtype(checkpoint: Checkpoint, form: Format) -> np.dtype:
    """Returns the dtype of the embedding."""
    mark = MARKS[FORMATS.index(form)]
    tensor = next(t for n, t in checkpoint.tensors.items() if re.fullmatch(mark, n))
    dtype = np.dtype(tensor.dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise CheckpointError(
            checkpoint.path, f"its embedding is {dtype}: expected 16 or 32 bits"
        )
    return np.dtype(np.float32) if dtype.itemsize > 4 else dtype


def _check_depth(checkpoint: Checkpoint, form: Format, depth: int) -> None:
    """Raises a `CheckpointError` if there are others than `depth` blocks."""
    name = r"blk\.(\d{1,9})\..*" if form == "gguf" else r"layers\.(\d{1,9})\..*"
    matches = (re.fullmatch(name, tensor) for tensor in checkpoint.tensors)
    found = {int(match[1]) for match in matches if match}
    if len(found) != depth or max(found) != depth - 1:
        raise CheckpointError(
            checkpoint.path,
            f"its config says {depth} layers, and its tensors are of {len(found)}, up "
            f"to number {max(found, default=-1)}",
        )


def _check_tied(checkpoint: Checkpoint, form: Format) -> None:
    """Raises a `CheckpointError` if a tied head is there and not the embedding."""
    column = 1 + FORMATS.index(form)
    names = [f"{formats.TABLE[row][column]}.weight" for row in (0, -1)]
    if names[1] not in checkpoint.tensors:
        return
    first, last = (np.asarray(checkpoint.tensors[name]) for name in names)
    same = first.shape == last.shape and all(
        np.array_equal(first[row : row + ROWS], last[row : row + ROWS])
        for row in range(0, len(first), ROWS)
    )
    if not same:
        raise CheckpointError(
            checkpoint.path,
            "its config says tie_word_embeddings, and its head is not its embedding",
        )


def torch_format(config: LlamaConfig) -> TorchFormat:
    """Returns the names of a `LlamaForCausalLM`'s tensors, and where they go."""
    rules = formats.rules("hugging_face", config)
    return TorchFormat(rules, "blocks" if config.stacked else "(?!)")


FAMILY = Family(LlamaConfig, Llama, PRESETS, MARKS, load, torch_format, folder=folder)
