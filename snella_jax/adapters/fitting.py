"""Fits adapters from files to models."""

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from snella_jax.adapters.base import Base, differences
from snella_jax.adapters.file_format import OF_TRAINING, AdapterFile, Unit
from snella_jax.adapters.fingerprint import Digest, Fingerprint, dtype_of, row_totals
from snella_jax.core.config import Rule
from snella_jax.core.paths import renamed
from snella_jax.core.weight import AdaptedWeight, Site
from snella_jax.files.errors import CheckpointError

log = logging.getLogger("snella_jax")
T = TypeVar("T")
Locate = Callable[[str, Rule, bool], tuple[Site, Array]]


def fit(
    file: AdapterFile,
    locate: Locate,
    model: Base,
    stats: Mapping[str, Any],
    *,
    rename: Mapping[str, str] | None = None,
    present: Mapping[str, Site] | None = None,
    allow_base_mismatch: bool = False,
) -> tuple[dict[str, AdaptedWeight], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Fits an adapter from a file to a model.

    Args:
      file: an adapter that was read from a folder.
      locate: the site and the weight of the base at a path, for a rule and `must_move`;
        raises a `ValueError` where there is none that the rule fits.
      model: base of the model; its `weights` may train.
      stats: running statistics of the model, by path.
      rename: for a regex of names in the file, their name in the model, which may take
        the regex's groups (`re.Match.expand`); the first that matches a name in full
        holds. Rows of stacked weights are names with an index, `blocks/mlp/fc1[3]`.
      present: the sites of the adapters that a model has, which have to be the same.
      allow_base_mismatch: log where the base is another one, instead of raising.

    Returns:
      The adapted weights by path, what else trained, and running statistics.

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
    problems, mismatches = [], []
    for path, own in rows.items():
        try:
            fitted[path], another = _fitted(path, own, locate)
            if present is not None:
                _check_same(fitted[path], present.get(path))
            mismatches += [f"{path}: {another}"] if another else []
        except ValueError as error:
            problems.append(f"{path}: {error}")
    for path in (present or {}).keys() - rows.keys():
        problems.append(f"{path}: the file has no adapter for it")
    problems += [*_misplaced(trained, model.weights), *_misplaced(moved, stats)]
    if not problems:
        found = model.rest(fitted, {**trained, **moved})
        mismatches += _differences(file, found, trained, rename)
    if mismatches and allow_base_mismatch and not problems:
        log.warning(
            "%s", "\n  ".join([f"{file.folder} has another base:", *mismatches])
        )
    elif problems or mismatches:
        lines = ["the adapter does not fit the model:", *problems, *mismatches]
        if not problems:
            lines.append("allow_base_mismatch=True loads it all the same")
        raise CheckpointError(file.folder, "\n  ".join(lines))
    return fitted, trained, moved


def _misplaced(
    values: Mapping[str, np.ndarray], places: Mapping[str, Any]
) -> Iterator[str]:
    """Yields what has no place in a model, or one of another shape."""
    for path, value in values.items():
        if path not in places:
            yield f"{path}: this model has no such variable"
        elif value.shape != jnp.shape(places[path]):
            found, expected = list(value.shape), list(jnp.shape(places[path]))
            yield f"{path}: {found} in the file, {expected} in the model"


def _differences(
    file: AdapterFile,
    found: Base,
    trained: Collection[str],
    rename: Mapping[str, str] | None,
) -> list[str]:
    """Lists how the rest of a model's base differs from that of the file."""
    if file.rest is None:
        log.warning(
            "%s is of format 1: whether the rest of the base, besides the adapted "
            "weights, is that of its training was not compared",
            file.folder,
        )
        return []
    # Where a rule for adapters says one name for two weights, these keep theirs.
    new = {
        name: _new_name(name, rename)
        for name in (*file.rest.weights, *file.rest.others)
    }
    clear = Counter(new.values())
    known = file.rest.named(lambda name: new[name] if clear[new[name]] == 1 else name)
    return differences(known, found, trained)


def _renamed(
    file: AdapterFile, named: Mapping[str, T], rename: Mapping[str, str] | None
) -> dict[str, T]:
    new = {}
    for name, value in named.items():
        other = _new_name(name, rename)
        if other in new:
            raise CheckpointError(file.folder, f"two weights are renamed to {other}")
        new[other] = value
    return new


def _new_name(name: str, rename: Mapping[str, str] | None) -> str:
    found = renamed(name, rename or {})
    return name if found is None else found[1]


def _split(name: str) -> tuple[str, tuple[int, ...]]:
    """Splits a name into a path and the index behind it."""
    path = re.sub(r"(\[\d+\])+$", "", name)
    return path, tuple(map(int, re.findall(r"\d+", name[len(path) :])))


def _fitted(
    path: str, own: Mapping[tuple[int, ...], Unit], locate: Locate
) -> tuple[AdaptedWeight, str]:
    """Returns the adapted weight, and how its base differs, in words."""
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
    dtype, known = dtype_of(w0), [unit.base for unit in ordered]
    if wrong := _of_another_base(weight, known):
        which = f" (rows {wrong})" if site.stack else ""
        kind = "SHA-256" if isinstance(known[0], Digest) else "fingerprint"
        return weight, (
            f"the weight{which}, {dtype}, is not that of the base it was trained on, "
            f"{first.base.dtype}: its {kind} differs"
        )
    if first.base.dtype != str(dtype):
        log.warning(
            "%s is %s and was %s where its adapter was trained: outputs differ by that "
            "rounding",
            path,
            dtype,
            first.base.dtype,
        )
    return weight, ""


def _of_another_base(
    weight: AdaptedWeight, known: Sequence[Digest | Fingerprint]
) -> list[int]:
    """Lists the rows of a weight that are not those of the file."""
    site = weight.site
    own = dtype_of(weight.w0)
    if old := [row for row in known if isinstance(row, Digest)]:
        layout = site.layout
        shape = (len(known), *layout.slices, layout.n, layout.m)
        matrices = weight.matrices().reshape(shape)
        return [i for i, row in enumerate(old) if not row.is_of(matrices[i])]
    rows = [row for row in known if isinstance(row, Fingerprint)]
    dtypes = [row.dtype_for(own) for row in rows]
    sums = {
        dtype: row_totals(weight.w0, dtype, site.layout, site.axes).reshape(-1)
        for dtype in dict.fromkeys(dtypes)
    }
    return [
        i
        for i, (row, dtype) in enumerate(zip(rows, dtypes, strict=True))
        if not row.comparable(own) or int(sums[dtype][i]) != row.places[str(dtype)]
    ]


def _check_same(weight: AdaptedWeight, site: Site | None) -> None:
    if site is None:
        raise ValueError("the model is adapted, but not there")
    ours, theirs = (dataclasses.asdict(s.rule) for s in (site, weight.site))
    differ = [
        f"{name} is {theirs[name]} in the file and {ours[name]} in the model"
        for name in ours
        if ours[name] != theirs[name] and name not in OF_TRAINING
    ]
    if differ:
        raise ValueError("; ".join(differ))


def any_of(paths: Any) -> str:
    """Returns a regex of these paths and no other."""
    return "|".join(map(re.escape, paths))
