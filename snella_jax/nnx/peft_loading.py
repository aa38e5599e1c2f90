"""Reads PEFT's LoRA, rsLoRA and DoRA into models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from snella_jax.adapters import peft_file
from snella_jax.adapters.fitting import any_of
from snella_jax.adapters.peft_file import Lora, PeftFile
from snella_jax.core.budgets import FIXED
from snella_jax.core.config import Rule
from snella_jax.core.placement import like
from snella_jax.core.weight import AdaptedWeight, Site, Start, indexed
from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.torch_tensor import Row, TorchTensor
from snella_jax.nnx.adapt import attach, merge, remove
from snella_jax.nnx.selection import adapted_variables, has_adapters
from snella_jax.nnx.surgery import freeze
from snella_jax.nnx.targets import Target, targets_of
from snella_jax.nnx.torch_modules import (
    Modules,
    Names,
    by_names,
    matrix_path,
    of_model,
    require,
    require_names,
)
from snella_jax.nnx.variables import variables_of

M = TypeVar("M", bound=nnx.Module)
OF_THE_FILE = {"rank", "kernel", "gate", "split"}  # fields of `Rule` of a LoRA


class Matrix(NamedTuple):
    """What a file has for one matrix of ours.

    Attributes:
      a: `[n, r]`.
      b: `[m, r]`, times the scale.
      magnitude: `[m]`, or None.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None


Rows = dict[str, dict[tuple[int, ...], Matrix]]  # by path and index in the stack


def load_peft(
    base: M, folder: str | Path, *, names: Names | None = None, **rule: Any
) -> M:
    """Loads a LoRA or rsLoRA of PEFT as an adapted model, which can train on.

    `alpha / r` is multiplied into the second factor. What a stack lacks, a LoRA for
    some of its rows or the ranks of others, is 0 in both factors and stays so. Modules
    that were saved whole train, as in PEFT; of a file that `snella.save` wrote only
    what trained.

    Args:
      base: the model without adapters, with as many classes as a head in the file.
      folder: folder with `adapter_config.json` and `adapter_model.safetensors`.
      names: as in `save`, for a model that is none of `snella_jax.models`.
      rule: other fields of `Rule` than rank, kernel, gate and split, such as
        `path="parallel", dropout=0.05`. PEFT's dropout is not taken over.

    Raises:
      FileNotFoundError: there is no adapter.
      CheckpointError: a file is damaged or of another kind (DoRA: `merge_peft` takes
        it), or does not fit the model; lists what differs.
      ValueError: the model has adapters, or needs `names`; a field that the file says.
    """
    if told := sorted(OF_THE_FILE & rule.keys()):
        raise ValueError(
            f"{told[0]}={rule[told[0]]!r}: expected no {told[0]}, which the file says."
        )
    file = peft_file.read(folder)
    if any(lora.magnitude is not None for lora in file.loras.values()):
        raise CheckpointError(
            Path(folder),
            "a DoRA, whose update is not of low rank: snella.merge_peft(base, path) "
            "gives a plain model with it",
        )
    return _loaded(base, Path(folder), file, names, rule)[0]


def merge_peft(base: M, folder: str | Path, *, names: Names | None = None) -> M:
    """Returns a plain model with a LoRA, rsLoRA or DoRA of PEFT in its weights.

    DoRA: `magnitude * V / ||V||`, `V = W0 + scale * B A`, with a norm for each output
    (Liu et al., arXiv 2402.09353), summed in float32.

    Args:
      base, folder, names: as in `load_peft`.

    Raises:
      FileNotFoundError, CheckpointError, ValueError: as `load_peft`.
    """
    file = peft_file.read(folder)
    model, rows = _loaded(base, Path(folder), file, names, {})
    if all(lora.magnitude is None for lora in file.loras.values()):
        return merge(model)
    for path, adapter, variable in list(adapted_variables(model)):
        weight = adapter.on(path, variable[...])
        variable[...] = like(_rescaled(weight, rows[path]), variable[...])
    remove(model)
    return model


def _loaded(
    base: M, folder: Path, file: PeftFile, names: Names | None, rule: Mapping[str, Any]
) -> tuple[M, Rows]:
    """Returns the adapted model, and what the file has for its matrices."""
    require_names(base, names)
    if has_adapters(base):
        raise ValueError("The model has adapters already: merge() it first.")
    model: Any = nnx.clone(base)
    weights = [f"{name}.weight" for name in file.loras]
    modules = (
        of_model(model, [*weights, *file.saved])
        if names is None
        else by_names(model, names)
    )
    require(modules.weights, weights, folder)
    require(modules.whole, file.saved, folder)
    targets = targets_of(model)
    rows = _rows(folder, file, modules, targets)
    sites = {path: _site(path, targets[path], own, rule) for path, own in rows.items()}
    starts = {path: _start(sites[path], own) for path, own in rows.items()}
    attach(model, {path: targets[path] for path in sites}, sites, starts)
    freeze(model, any_of(_put_saved(folder, model, file, modules)))
    return model, rows


def _rows(
    folder: Path, file: PeftFile, modules: Modules, targets: Mapping[str, Target]
) -> Rows:
    """Collects what a file has for each matrix, by path of the weight and row.

    Raises:
      CheckpointError: lists the modules that do not fit their weights.
    """
    found: Rows = {}
    problems = []
    for name, lora in file.loras.items():
        try:
            for row, own in _matrices(modules.weights[f"{name}.weight"], lora):
                path = matrix_path(row, targets)
                layout = targets[path].site(path, Rule(), must_move=False).layout
                sizes = [len(own.a), len(own.b)]
                if sizes != [layout.n, layout.m]:
                    raise ValueError(
                        f"{sizes} in the file, {indexed(path, row.at)} is "
                        f"{[layout.n, layout.m]} in the model"
                    )
                found.setdefault(path, {})[row.at] = own
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        lines = ["the adapter does not fit the model:", *problems]
        raise CheckpointError(folder, "\n  ".join(lines))
    return found


def _matrices(tensor: TorchTensor, lora: Lora) -> list[tuple[Row, Matrix]]:
    """Takes a module's LoRA apart into those of our matrices.

    Where each column belongs to one part of a fused weight, as `snella.save` writes
    them, a part gets its own alone.
    """
    if not tensor.rows:
        raise ValueError(
            "the model has no weight of its own for it, such as a tied head"
        )
    places = tensor.axes((len(lora.up), *lora.down.shape[1:]))
    down = lora.down.reshape(lora.rank, -1).astype(np.float32)
    up = lora.up.astype(np.float32) * np.float32(lora.scale)
    touched = np.stack([up[own.outputs].any(0) for own in places])
    if lora.magnitude is not None or (touched.sum(0) != 1).any():
        touched[...] = True
    return [
        (
            row,
            Matrix(
                down[columns][:, own.inputs].T,
                up[own.outputs][:, columns],
                None if lora.magnitude is None else lora.magnitude[own.outputs],
            ),
        )
        for row, own, columns in zip(tensor.rows, places, touched, strict=True)
        if columns.any()
    ]


def _site(
    path: str,
    target: Target,
    own: Mapping[tuple[int, ...], Matrix],
    rule: Mapping[str, Any],
) -> Site:
    rank = max(matrix.a.shape[1] for matrix in own.values())
    low_rank = Rule(rank=rank, kernel="linear", gate="none", **rule)
    return target.site(path, low_rank, must_move=False)


def _start(site: Site, own: Mapping[tuple[int, ...], Matrix]) -> Start:
    """Returns the factors of a weight, 0 where the file has none, and full budgets."""
    rank, layout = site.rule.rank, site.layout
    a, b = (
        np.zeros((*site.stack, 1, n, rank), np.float32) for n in (layout.n, layout.m)
    )
    for index, matrix in own.items():
        a[index][0, :, : matrix.a.shape[1]] = matrix.a
        b[index][0, :, : matrix.b.shape[1]] = matrix.b
    budget = np.full(site.stack, site.capacity, np.int32)
    factors = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    return factors, budget, np.full(site.stack, FIXED, np.int32)


def _put_saved(
    folder: Path, model: nnx.Module, file: PeftFile, modules: Modules
) -> list[str]:
    """Gives variables their values from a file, and returns the paths of those."""
    variables = dict(variables_of(model, nnx.Param))
    problems = []
    found: dict[str, None] = {}
    for name in file.trained:
        tensor, value = modules.whole[name], file.saved[name]
        try:
            made = tensor.rule.make(value) if tensor.rows else ()
            for row, part in zip(tensor.rows, made, strict=True):
                variable = variables[row.path]
                shape = tuple(variable.shape[len(row.at) :])
                if part.shape != shape:
                    raise ValueError(
                        f"{list(part.shape)} in the file, {row.path} is {list(shape)} "
                        "in the model"
                    )
                value = jnp.asarray(part, variable.dtype)
                if row.at:
                    value = variable[...].at[row.at].set(value)
                variable.set_value(like(value, variable[...]))
                found[row.path] = None
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        lines = ["what trained whole does not fit the model:", *problems]
        raise CheckpointError(folder, "\n  ".join(lines))
    return list(found)


def _rescaled(
    weight: AdaptedWeight, rows: Mapping[tuple[int, ...], Matrix]
) -> jnp.ndarray:
    """Returns DoRA's weight, in the dtype of the base's."""
    site, layout = weight.site, weight.site.layout
    moved = (
        weight.matrices().astype(np.float32).reshape(*site.stack, layout.n, layout.m)
    )
    made = []
    for index in np.ndindex(site.stack):
        matrix = moved[index]
        if index in rows:
            own = rows[index]
            matrix = matrix + own.a @ own.b.T
            if own.magnitude is not None:
                matrix = matrix * (own.magnitude / np.linalg.norm(matrix, axis=0))
        made.append(
            layout.place(jnp.asarray(matrix).reshape(layout.inputs + layout.outputs))
        )
    whole = jnp.stack(made).reshape(*site.stack, *layout.shape)
    return jnp.moveaxis(whole, site.front, site.axes).astype(weight.w0.dtype)
