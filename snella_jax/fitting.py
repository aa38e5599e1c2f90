"""Whether an adapter from a file fits a model, and what of it goes where."""

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from snella_jax.adapter_file import AdapterFile, Unit
from snella_jax.config import Rule
from snella_jax.models.checkpoint_error import CheckpointError
from snella_jax.weight import AdaptedWeight, Site

log = logging.getLogger("snella_jax")
T = TypeVar("T")
Locate = Callable[[str, Rule, bool], tuple[Site, Array]]


def fit(
    file: AdapterFile,
    locate: Locate,
    variables: Mapping[str, tuple[int, ...]],
    stats: Mapping[str, tuple[int, ...]],
    *,
    rename: Mapping[str, str] | None = None,
    present: Mapping[str, Site] | None = None,
) -> tuple[dict[str, AdaptedWeight], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The adapted weights of a model by path, what else trained, and statistics.

    Args:
      file: read from a folder.
      locate: the site and the weight of the base at a path, for a rule and `must_move`;
        raises a `ValueError` where there is none that the rule fits.
      variables: shapes of those that a model has, by path.
      stats: shapes of its running statistics, by path.
      rename: for a regex of names in the file, their name in the model, which may take
        the regex's groups (`re.Match.expand`); the first that matches a name in full
        holds. Rows of stacked weights are names with an index, `blocks/mlp/fc1[3]`.
      present: the sites of the adapters that a model has, which have to be the same.

    Raises:
      CheckpointError: it does not fit; lists every weight that differs, and how.
    """
    units = _renamed(file, file.units, rename)
    trained, moved = (_renamed(file, f, rename) for f in (file.trained, file.stats))
    rows: dict[str, dict[tuple[int, ...], Unit]] = {}
    for name, unit in units.items():
        path, index = _split(name)
        rows.setdefault(path, {})[index] = unit
    fitted: dict[str, AdaptedWeight] = {}
    problems = []
    for path, own in rows.items():
        try:
            fitted[path] = _fitted(path, own, locate)
            if present is not None:
                _check_same(fitted[path], present.get(path))
        except ValueError as error:
            problems.append(f"{path}: {error}")
    for path in (present or {}).keys() - rows.keys():
        problems.append(f"{path}: the file has no adapter for it")
    for values, shapes in ((trained, variables), (moved, stats)):
        for path, value in values.items():
            if path not in shapes:
                problems.append(f"{path}: this model has no such variable")
            elif tuple(value.shape) != shapes[path]:
                found, expected = list(value.shape), list(shapes[path])
                problems.append(f"{path}: {found} in the file, {expected} in the model")
    if problems:
        raise CheckpointError(
            file.folder, "\n  ".join(["the adapter does not fit the model:", *problems])
        )
    return fitted, trained, moved


def _renamed(
    file: AdapterFile, named: Mapping[str, T], rename: Mapping[str, str] | None
) -> dict[str, T]:
    new = {}
    for name, value in named.items():
        rules = (rename or {}).items()
        matches = ((re.fullmatch(regex, name), to) for regex, to in rules)
        other = next((m.expand(to) for m, to in matches if m), name)
        if other in new:
            raise CheckpointError(file.folder, f"two weights are renamed to {other}")
        new[other] = value
    return new


def _split(name: str) -> tuple[str, tuple[int, ...]]:
    """A path and the index behind it."""
    path = re.sub(r"(\[\d+\])+$", "", name)
    return path, tuple(map(int, re.findall(r"\d+", name[len(path) :])))


def _fitted(
    path: str, own: Mapping[tuple[int, ...], Unit], locate: Locate
) -> AdaptedWeight:
    first = next(iter(own.values()))
    if len({(unit.rule, unit.must_move) for unit in own.values()}) > 1:
        raise ValueError("the rows of this weight have different rules")
    site, w0 = locate(path, first.rule, first.must_move)
    if own.keys() != set(np.ndindex(site.stack)):
        raise ValueError(
            f"the file has rows {sorted(own)} of it, the model is stacked "
            f"{list(site.stack)}: see rename"
        )
    shape = (*site.layout.slices, site.layout.n, site.layout.m)
    others = {unit.shape for unit in own.values()} - {shape}
    if others:
        raise ValueError(
            f"the adapter is for {list(others.pop())}, the weight is {list(shape)}"
        )
    ordered = [own[index] for index in np.ndindex(site.stack)]

    def stacked(parts: list[np.ndarray]) -> Array:
        return jnp.asarray(np.stack(parts).reshape(site.stack + parts[0].shape))

    factors = {k: stacked([unit.factors[k] for unit in ordered]) for k in first.factors}
    budget = stacked([unit.budget for unit in ordered])
    since = stacked([unit.allocated_at for unit in ordered])
    weight = AdaptedWeight(path, site, w0, factors, budget, since)
    matrices = weight.matrices().reshape(len(ordered), *shape)
    wrong = [i for i, unit in enumerate(ordered) if not unit.base.matches(matrices[i])]
    if wrong:
        which = f" (rows {wrong})" if site.stack else ""
        raise ValueError(
            f"the weight{which}, {matrices.dtype}, is not that of the base it was "
            f"trained on, {first.base.dtype}: its SHA-256 differs"
        )
    if first.base.dtype != str(matrices.dtype):
        log.warning(
            "%s is %s and was %s where its adapter was trained: outputs differ by that "
            "rounding",
            path,
            matrices.dtype,
            first.base.dtype,
        )
    return weight


def _check_same(weight: AdaptedWeight, site: Site | None) -> None:
    if site is None:
        raise ValueError("the model is adapted, but not there")
    ours, theirs = (dataclasses.asdict(s.rule) for s in (site, weight.site))
    differ = [
        f"{name} is {theirs[name]} in the file and {ours[name]} in the model"
        for name in ours
        if ours[name] != theirs[name]
    ]
    if differ:
        raise ValueError("; ".join(differ))


def any_of(paths: Any) -> str:
    """A regex of these paths and no other."""
    return "|".join(map(re.escape, paths))
