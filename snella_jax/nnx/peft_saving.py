"""Writes LoRA as PEFT's files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from snella_jax.adapters import peft_file
from snella_jax.adapters.peft_file import Lora, PeftFile
from snella_jax.core.weight import AdaptedWeight
from snella_jax.files.hosts import to_host
from snella_jax.models import torch_names
from snella_jax.models.checkpoints.rewrite import unmade
from snella_jax.models.checkpoints.torch_tensor import Row, TorchTensor
from snella_jax.models.llama import Llama
from snella_jax.models.sd3.mmdit import MMDiT
from snella_jax.nnx.torch_modules import (
    Modules,
    Names,
    by_names,
    require_names,
    row_of,
)
from snella_jax.nnx.variables import variables_of

Pair = tuple[np.ndarray, np.ndarray]  # a [n, r], b [m, r]


def write(
    folder: str | Path,
    plain: nnx.Module,
    weights: Iterable[AdaptedWeight],
    trained: Mapping[str, Any],
    *,
    like: str | Path | None,
    names: Names | None,
    base: str | None,
) -> None:
    """Writes the folder of a LoRA; see `snella.save`.

    Args:
      folder: folder to write.
      plain: model without its adapters.
      weights: adapted weights.
      trained: other variables that trained, by path.
      like: folder of the base, for a model of `snella_jax.models`.
      names: names of modules by regex of their paths, for another.
      base: name of the base; None for `like`.

    Raises:
      ValueError, CheckpointError, FileNotFoundError, FileExistsError: as `snella.save`.
    """
    weights = list(weights)
    _check_low_rank(weights)
    require_names(plain, names)
    _check_untied(plain, trained)
    modules, whole = _modules(plain, like, names, trained)
    paths = [path for path, _ in variables_of(plain, nnx.Param)]
    pairs: dict[Row, Pair] = {}
    for weight in weights:
        for index, pair in _pairs(weight).items():
            pairs[row_of(weight.path, index, paths)] = pair
    _check_all(modules, pairs, trained, names)
    loras = _loras(modules, pairs)
    moved = [
        name
        for name, tensor in modules.whole.items()
        if any(row.path in trained for row in tensor.rows)
    ]
    saved_modules = _saved_modules(moved, modules)
    _check_apart(saved_modules, loras)
    saved = {
        name: np.ascontiguousarray(tensor)
        for name, tensor in whole.items()
        if any(name.startswith(f"{module}.") for module in saved_modules)
    }
    if base is None and like is not None:
        base = str(like)
    rates = {weight.site.rule.dropout for weight in weights}
    peft_file.write(
        Path(folder),
        PeftFile(loras, saved, saved_modules, moved, base),
        dropout=rates.pop() if len(rates) == 1 else 0.0,
        diffusers=isinstance(plain, MMDiT),
    )


def _check_low_rank(weights: Iterable[AdaptedWeight]) -> None:
    """Raises a `ValueError` for updates that are no product of two factors."""
    for weight in weights:
        rule = weight.site.rule
        if not rule.low_rank:
            raise ValueError(
                f"{weight.path} has kernel={rule.kernel}, gate={rule.gate!r}: PEFT has "
                "LoRA alone, kernel='linear' with gate='none', and another update is "
                "not of low rank. snella.export writes the merged model for "
                "transformers or diffusers, snella.save_delta a file of the weights "
                "that moved."
            )


def _check_untied(plain: nnx.Module, trained: Iterable[str]) -> None:
    """Raises a `ValueError` for an embedding that trains and is the head, too."""
    tied = isinstance(plain, Llama) and plain.config.tied
    if tied and any(path.startswith("embed/") for path in trained):
        raise ValueError(
            "embed/embedding trains and is the head, too, of which PEFT would train a "
            "copy apart: leave it out of `trainable`, or write the whole model with "
            "snella.export."
        )


def _modules(
    plain: Any,
    like: str | Path | None,
    names: Names | None,
    trained: Mapping[str, Any],
) -> tuple[Modules, Mapping[str, Any]]:
    """Returns PyTorch's modules, and the tensors of what trained."""
    if names is not None:
        found = by_names(plain, names)
        values = {path: to_host(value) for path, value in trained.items()}
        whole = {
            name: unmade(tensor.rule, [values[tensor.rows[0].path]], found.shapes[name])
            for name, tensor in found.whole.items()
            if tensor.rows[0].path in values
        }
        return found, whole
    whole: Mapping[str, Any] = {}
    if like is None or trained:
        whole = torch_names.tensors(plain, like)
        shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    else:
        shapes = torch_names.shapes(plain, like)
    found = torch_names.located(plain, shapes)
    return Modules(found, found, shapes, complete=True), whole


def _pairs(weight: AdaptedWeight) -> dict[tuple[int, ...], Pair]:
    """Returns the factors of each row of a stack; a fused weight's side by side."""
    site = weight.site
    if site.layout.slices and site.rule.split == 1:
        raise ValueError(
            f"{weight.path} has matrices for a batch, which no nn.Linear has."
        )
    a, b = (
        to_host(weight.factors[name]).reshape(*site.stack, -1, size, site.rule.rank)
        for name, size in (("a", site.layout.n), ("b", site.layout.m))
    )
    return {
        index: _side_by_side(a[index], b[index]) for index in np.ndindex(site.stack)
    }


def _side_by_side(a: np.ndarray, b: np.ndarray) -> Pair:
    """Joins factors `[parts, n, r]` and `[parts, m, r]` of outputs that follow on."""
    parts, m, rank = b.shape
    joined = np.zeros((parts, m, parts, rank), b.dtype)
    for part in range(parts):
        joined[part, :, part] = b[part]
    columns = a.transpose(1, 0, 2).reshape(a.shape[1], parts * rank)
    return columns, joined.reshape(parts * m, parts * rank)


def _loras(modules: Modules, pairs: Mapping[Row, Pair]) -> dict[str, Lora]:
    """Returns the LoRA of every module in whose weight a row is."""
    found = {}
    for name, tensor in modules.weights.items():
        if any(row in pairs for row in tensor.rows):
            lora = _lora(tensor, modules.shapes[name], pairs)
            if lora.rank:
                found[name.removesuffix(".weight")] = lora
    if not found:
        raise ValueError("All factors are 0: there is no LoRA to write.")
    return found


def _lora(
    tensor: TorchTensor, shape: tuple[int, ...], pairs: Mapping[Row, Pair]
) -> Lora:
    """Returns the LoRA of a module: those of its parts, of as many outputs, in turn.

    Without the columns that are 0 in both factors, which neither do nor learn anything.
    """
    downs, ups = [], []
    for row, axes in zip(tensor.rows, tensor.axes(shape), strict=True):
        if row not in pairs:
            continue
        a, b = pairs[row]
        down, up = np.zeros((a.shape[1], a.shape[0])), np.zeros((shape[0], b.shape[1]))
        down, up = down.astype(a.dtype), up.astype(b.dtype)
        down[:, axes.inputs] = a.T
        up[axes.outputs] = b
        downs.append(down)
        ups.append(up)
    down, up = np.concatenate(downs), np.concatenate(ups, 1)
    used = down.any(1) | up.any(0)
    down = down[used].reshape(-1, *shape[1:])
    return Lora(np.ascontiguousarray(down), np.ascontiguousarray(up[:, used]))


def _check_all(
    modules: Modules,
    pairs: Iterable[Row],
    trained: Iterable[str],
    names: Names | None,
) -> None:
    """Raises a `ValueError` for what no tensor of PyTorch's has."""
    matrices = {row for tensor in modules.weights.values() for row in tensor.rows}
    whole = {row.path for tensor in modules.whole.values() for row in tensor.rows}
    left = [f"{row.path} {list(row.at)}" for row in pairs if row not in matrices]
    left += [path for path in trained if path not in whole]
    if left:
        source = "`like` has" if names is None else "names= says"
        expected = (
            "expected a folder of transformers or diffusers, or timm's names"
            if names is None
            else "expected a name for each"
        )
        raise ValueError(
            f"{source} no tensor for {', '.join(sorted(left))}: {expected}."
        )


def _saved_modules(moved: Iterable[str], modules: Modules) -> list[str]:
    """Returns the outermost modules all of whose tensors trained, or the innermost."""
    moved, found = set(moved), dict[str, None]()
    for name in sorted(moved):
        module = name.rpartition(".")[0]
        while modules.complete and (outer := module.rpartition(".")[0]):
            inside = {n for n in modules.shapes if n.startswith(f"{outer}.")}
            if not inside <= moved:
                break
            module = outer
        if not module:
            raise ValueError(
                f"{name} trains, and is in no module that PEFT could save whole."
            )
        found[module] = None
    _check_ends(found, modules.shapes)
    return list(found)


def _check_ends(saved: Iterable[str], names: Iterable[str]) -> None:
    """Raises a `ValueError` for a module that PEFT takes others for, too."""
    parts = [name.split(".") for name in names]
    known = {".".join(own[:i]) for own in parts for i in range(1, len(own))}
    for module in saved:
        if others := sorted(n for n in known - {module} if n.endswith(module)):
            raise ValueError(
                f"Something in {module} trains, and PEFT would save that whole, and "
                f"{others[0]}, whose name ends so: leave it out of `trainable`, or "
                "have a head, with which names begin otherwise."
            )


def _check_apart(saved: Iterable[str], loras: Iterable[str]) -> None:
    """Raises a `ValueError` for a module that is saved whole and holds a LoRA."""
    loras = list(loras)
    for module in saved:
        inside = [name for name in loras if f"{name}.".startswith(f"{module}.")]
        if inside:
            raise ValueError(
                f"In {module} something trains beside the LoRA of {inside[0]}: PEFT "
                "saves what trains by whole modules, without LoRA in them. Leave it "
                "out of `trainable`."
            )
