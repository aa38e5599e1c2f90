"""Adapters of NNX models as files: `save`, `load`, and taking an adapter off.

>>> import tempfile
>>> import jax.numpy as jnp
>>> import snella_jax as snella
>>> class Net(nnx.Module):
...     def __init__(self, rngs):
...         self.fc1 = nnx.Linear(6, 8, rngs=rngs)
...     def __call__(self, x):
...         return self.fc1(x)
>>> base = Net(nnx.Rngs(0))
>>> config = snella.SnellaConfig(rank=4, targets="fc1", trainable="")
>>> model = snella.adapt(base, config, rngs=nnx.Rngs(1))
>>> with tempfile.TemporaryDirectory() as folder:
...     save(model, f"{folder}/digits", base="our/net")
...     again = load(base, f"{folder}/digits")
>>> x = jnp.ones((1, 6))
>>> bool((again(x) == model(x)).all()), bool((unload(model)(x) == base(x)).all())
(True, True)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from snella_jax.adapters import file_format
from snella_jax.adapters.base import Base
from snella_jax.adapters.fitting import any_of, fit
from snella_jax.core.config import Rule
from snella_jax.core.layout import Layout
from snella_jax.core.paths import join, path_of
from snella_jax.core.placement import like
from snella_jax.core.weight import Site
from snella_jax.files.errors import CheckpointError
from snella_jax.models import arithmetic
from snella_jax.nnx import peft_saving
from snella_jax.nnx.adapt import attach, remove
from snella_jax.nnx.selection import (
    adapted_variables,
    has_adapters,
    require_adapters,
    weights_of,
)
from snella_jax.nnx.surgery import freeze
from snella_jax.nnx.targets import layouts_of, targets_of
from snella_jax.nnx.variables import Factor, array_of, arrays_held, variables_of

M = TypeVar("M", bound=nnx.Module)
Format = Literal["snella", "peft"]
# What changes when a model is called. Statistics count where a file carries none.
STATE = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)


def save(
    model: nnx.Module,
    folder: str | Path,
    *,
    base: str | None = None,
    format: Format = "snella",
    like: str | Path | None = None,
    names: Mapping[str, str] | None = None,
) -> None:
    """Writes the adapters of a model, and what else trained, to a folder.

    `adapter_config.json` and `adapter_model.safetensors`, as PEFT names them. An
    adapter that is in the folder is replaced; a crash leaves the old one, the new one,
    or (in an instant between) both, each complete, beside the folder.

    `format="peft"` writes LoRA, `kernel="linear"` with `gate="none"`, as a folder that
    `PeftModel.from_pretrained` loads: `alpha` is the rank, and what else trained is in
    `modules_to_save`, of a module of PyTorch's all or nothing. An MMDiT's folder also
    has `pytorch_lora_weights.safetensors`, for `load_lora_adapter` of diffusers. What
    PEFT's files do not say is lost: which base it was, dropout of single weights.

    Args:
      model: an adapted model. Its factors and budgets are written, and every other
        `nnx.Param` (the head and what `config.trainable` named) and batch statistics.
      folder: folder to write.
      base: name of the base model, such as a path or a name on a hub; None for `like`
        in PEFT's format.
      format: "snella", which `load` reads; or "peft", which `load_peft` reads.
      like: for a model of `snella_jax.models` in PEFT's format, the folder of
        transformers or diffusers that its base is in (or of timm, for a ViT). A LLaMA,
        a SAM or an MMDiT may do without: then the whole base is read.
      names: for another model in PEFT's format, the name of the PyTorch module for a
        regex of paths, which may take its groups. Rows of stacked weights have an
        index: `{r"blocks/fc1\\[(\\d+)\\]": r"layers.\\1.fc1"}`. What a module has
        besides a weight is found by its variables' names; another variable needs the
        name of its tensor.

    Raises:
      ValueError: the model has no adapters, or a kernel that is none of ours; in PEFT's
        format another update than LoRA's, something that the other model has no
        module for, or neither `like` nor `names`.
      CheckpointError, FileNotFoundError: `like` is damaged, or not of such a model.
      FileExistsError: the folder holds something else.
    """
    check_format(format, like, names)
    weights, plain = weights_of(model), unload(model)
    kinds = (_trained(model), _variables(model, nnx.BatchStat))
    trained, stats = ({p: array_of(p, v) for p, v in kind.items()} for kind in kinds)
    if format == "snella":
        file_format.write(folder, weights, trained, stats, base_of(plain), base)
        return
    if stats:
        raise ValueError(
            f"PEFT has no place for batch statistics ({', '.join(stats)}): "
            "format='snella' writes them."
        )
    how: Any = {"like": like, "names": names, "base": base}
    peft_saving.write(folder, plain, weights, trained, **how)


def check_format(format: str, like: Any, names: Any) -> None:
    """Raises a `ValueError` for an unknown format, or what it cannot take."""
    if format not in get_args(Format):
        raise ValueError(f"format={format!r}: expected 'snella' or 'peft'.")
    if format == "snella" and (like is not None or names is not None):
        raise ValueError("like= and names= are of format='peft'.")


def load(
    model: M,
    folder: str | Path,
    *,
    rename: Mapping[str, str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    allow_base_mismatch: bool = False,
) -> M:
    """Loads the adapters that `save` wrote into a copy of a model.

    The outputs are those of the saved model, bit for bit, and training can go on. The
    arrays of the base are shared with `model`, which is not changed: many adapters can
    sit on one base.

    Args:
      model: the base, in the shape that it was adapted in (a new head's classes, too);
        or an adapted model, whose adapters are replaced by others like them.
      folder: folder of an adapter.
      rename: names in this model, if they are others: new name by regex, which
        may take its groups. Rows of stacked blocks have an index:
        `{r"layers/(\\d+)/fc": r"blocks/fc[\\1]"}`.
      layouts: see `adapt`; only for the base, an adapted model has them already.
      allow_base_mismatch: load even if this is not the base that the adapter was
        trained on, and log in what it differs.

    Raises:
      FileNotFoundError: there is no adapter.
      CheckpointError: a file is damaged, or the adapter does not fit: another base
        (weights, or the config of a model of `snella_jax.models`), shape, rank or
        place; lists all that differs.
    """
    file = file_format.read(folder)
    adapted = has_adapters(model)
    present = {w.path: w.site for w in weights_of(model)} if adapted else None
    trains = _trained(model).keys()
    modes = {path: own.deterministic for path, own, _ in adapted_variables(model)}
    if adapted:
        layouts = layouts_of(model) if layouts is None else layouts
    model = unload(model) if adapted else nnx.clone(model)
    targets = targets_of(model, layouts)

    def locate(path: str, rule: Rule, must_move: bool) -> tuple[Site, Array]:
        if path not in targets:
            raise ValueError(
                "this model has no such layer that can be adapted (a layer of your "
                "own needs layouts=, as in adapt)"
            )
        return targets[path].site(path, rule, must_move), targets[path].weight[...]

    params, statistics = (_variables(model, k) for k in (nnx.Param, nnx.BatchStat))
    weights, trained, stats = fit(
        file,
        locate,
        base_of(model),
        {path: variable[...] for path, variable in statistics.items()},
        rename=rename,
        present=present,
        allow_base_mismatch=allow_base_mismatch,
    )
    if adapted and trains != trained.keys():
        differ = ", ".join(sorted(trains ^ trained.keys()))
        raise CheckpointError(
            file.folder, f"in the file and in the model other variables train: {differ}"
        )
    try:
        attach(
            model,
            {path: targets[path] for path in weights},
            {path: weight.site for path, weight in weights.items()},
            {p: (w.factors, w.budget, w.allocated_at) for p, w in weights.items()},
        )
    except ValueError as error:
        raise CheckpointError(file.folder, str(error).rstrip(".")) from error
    for path, own, _ in adapted_variables(model):
        own.deterministic = modes.get(path, own.deterministic)
    for path, value in (*trained.items(), *stats.items()):
        variable = (params | statistics)[path]
        variable.set_value(like(jnp.asarray(value), variable[...]))
    freeze(model, any_of(trained))
    return model


def unload(model: M) -> M:
    """Returns a plain copy of an adapted model without adapters: the base's weights.

    What `config.trainable` named stays as it was trained, for it replaced the base's:
    keep the base itself if you need its head.

    Raises:
      ValueError: the model has no adapters.
    """
    require_adapters(model)
    model = nnx.clone(model)
    remove(model)
    return model


def base_of(model: nnx.Module) -> Base:
    """Returns the base of a plain model: its parameters, and what else is constant."""
    params = _variables(model, nnx.Param)
    others = {
        path: variable
        for path, variable in variables_of(model, nnx.Variable)
        if path not in params and not isinstance(variable, STATE)
    }
    return Base(
        _leaves(params),
        arrays_held(model) | _leaves(others),
        arithmetic.of(model),
        arithmetic.POSITIONS,
    )


def _leaves(variables: Mapping[str, nnx.Variable]) -> dict[str, Any]:
    """Returns values by path; those of a variable that holds a tree by their own."""
    return {
        join((path, *path_of(key))): value
        for path, variable in variables.items()
        for key, value in jax.tree_util.tree_leaves_with_path(variable.get_value())
    }


def _variables(model: nnx.Module, kind: type) -> dict[str, Any]:
    return dict(variables_of(model, kind))


def _trained(model: nnx.Module) -> dict[str, Any]:
    """Returns what trains besides the factors."""
    params = _variables(model, nnx.Param)
    return {path: v for path, v in params.items() if not isinstance(v, Factor)}
