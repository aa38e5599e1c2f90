"""Bases of adapters: the weights that neither have one nor train, and how two differ.

Names, shapes and stacking may differ between a file and a model. So weights of one name
and shape are compared one by one, those that one side stacks by rows, and all others by
the numbers that they hold together, in any order.
"""

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snella_jax.adapters.fingerprint import Fingerprint, are_rows, dtype_of, total

log = logging.getLogger("snella_jax")


@dataclasses.dataclass(frozen=True)
class Base:
    """The weights of a model by path: its arrays, or the fingerprints in a file.

    Attributes:
      weights: weights of the model, by path.
      others: variables that other bindings may not have, by path: they count where
        there are some of the same name.
      configs: fields of the configs of models in it that weights do not show, by path
        of the model (`models.arithmetic`).
      positions: name of the weights that follow from a config's `grid`; "" in a file.
    """

    weights: Mapping[str, Any]
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    positions: str = ""

    def rest(self, adapted: Iterable[str], carried: Collection[str]) -> "Base":
        """Leaves out the weights of the layers at `adapted`, and what a file carries.

        Integers count among weights as `others`, for another binding may compute its
        indices; among others not at all: they may be counters.
        """
        taken = {name for path in adapted for name in variables_at(path)} | {*carried}
        kept = self._changed(
            lambda kind: {
                name: value
                for name, value in kind.items()
                if name not in taken and _is_number(value)
            }
        )
        floats = kept._changed(
            lambda kind: {name: x for name, x in kind.items() if _is_inexact(x)}
        )
        indices = kept.weights.keys() - floats.weights.keys()
        others = {name: kept.weights[name] for name in kept.weights if name in indices}
        return dataclasses.replace(floats, others={**floats.others, **others})

    def named(self, name: Callable[[str], str]) -> "Base":
        """Renames every weight."""
        return self._changed(lambda kind: {name(old): x for old, x in kind.items()})

    def fingerprints(self) -> "Base":
        """Replaces arrays by their fingerprints."""
        return self._changed(
            lambda kind: {name: Fingerprint.of(x) for name, x in kind.items()}
        )

    def _changed(self, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> "Base":
        """Replaces `weights` and `others`, each by a change of what it was."""
        weights, others = map(change, (self.weights, self.others))
        return dataclasses.replace(self, weights=weights, others=others)

    def as_json(self) -> dict[str, Any]:
        """Returns the fingerprints for a file; `from_json` reads them."""
        weights, others = (
            {name: found.as_json() for name, found in kind.items()}
            for kind in (self.weights, self.others)
        )
        configs = {path: dict(config) for path, config in self.configs.items()}
        return {"weights": weights, "others": others, "configs": configs}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "Base":
        """Reads what `as_json` returned; raises whatever damage may cause."""
        weights, others = (
            {name: Fingerprint.from_json(said) for name, said in given[kind].items()}
            for kind in ("weights", "others")
        )
        configs = {path: dict(config) for path, config in given["configs"].items()}
        return cls(weights, others, configs)


def differences(
    known: Base,
    found: Base,
    trained: Collection[str] = (),
    sides: tuple[str, str] = ("the file", "the model"),
) -> list[str]:
    """Lists how a model's rest differs from that of a file; empty if it does not.

    Args:
      known: base of the file, fingerprints.
      found: base of the model, arrays.
      trained: paths in the model of what comes from the file.
      sides: names of the two, for messages.
    """
    problems, resized = _configs(known, found, trained, sides)
    ours, theirs, extra, spare = (
        {name: value for name, value in kind.items() if name not in resized}
        for kind in (known.weights, found.weights, known.others, found.others)
    )
    everything = theirs | spare
    named = {
        name: own.is_of(everything[name])
        for name, own in (ours | extra).items()
        if name in everything and own.shape == np.shape(everything[name])
    }
    restacked, gone = _restacked(
        *({k: v for k, v in kind.items() if k not in named} for kind in (ours, theirs))
    )
    named |= restacked
    left, more, right, spare = (
        {k: v for k, v in kind.items() if k not in named and k not in gone}
        for kind in (ours, extra, theirs, spare)
    )
    pools = [(left, right)]
    pools += [(left, right | spare)] if spare else []
    pools += [(left | more, right)] if more else []
    same = any(_same_numbers(*pool) for pool in pools)
    if not same and left and right and _same_numbers(ours, theirs):
        return problems  # names stand for something else in the model
    problems += [
        f"{name}: its numbers are not those of the base"
        for name, agrees in named.items()
        if not agrees
    ]
    problems += [
        f"{name}: {list(left[name].shape)} in {sides[0]} and {list(right[name].shape)} "
        f"in {sides[1]}: is image_size the same?"
        for name in sorted(left.keys() & right.keys())
        if found.positions and name.endswith(found.positions)
    ]
    return problems if same else [*problems, _unlike(left, right, sides)]


def _restacked(
    known: Mapping[str, Fingerprint], found: Mapping[str, Any]
) -> tuple[dict[str, bool], set[str]]:
    """Compares weights that are stacked on one side alone with the rows of the other.

    `blocks/fc/bias` is then `blocks/0/fc/bias`, ... on the other side.

    Returns:
      For each stack, by name, True if its rows are the same; and the names of the rows.
    """
    agrees: dict[str, bool] = {}
    gone: set[str] = set()
    for stacks, others in ((known, found), (found, known)):
        for name, stack in stacks.items():
            count, *shape = np.shape(stack) or (0,)
            for rows in _rows_of(name, count) if shape else ():
                own: Any = [others[row] for row in rows if row in others]
                if len(own) < count or any(np.shape(x) != tuple(shape) for x in own):
                    continue
                of_file = isinstance(stack, Fingerprint)
                agrees[name] = (
                    stack.is_stack_of(own) if of_file else are_rows(own, stack)
                )
                gone |= {*rows}
    return agrees, gone


def _rows_of(name: str, count: int) -> Iterator[list[str]]:
    """Yields names that rows of a stack may have: an index behind or in its path."""
    yield [f"{name}[{i}]" for i in range(count)]
    parts = name.split("/")
    for k in range(len(parts) if count else 0):
        yield ["/".join([*parts[:k], str(i), *parts[k:]]) for i in range(count)]


def variables_at(path: str) -> tuple[str, str]:
    """Returns the names that the weight of an adapter at a path may have."""
    return path, _join(path, "kernel")


def _same_numbers(known: Mapping[str, Fingerprint], found: Mapping[str, Any]) -> bool:
    """Returns True if both hold the same numbers, perhaps rounded on one side."""
    ours = [(np.dtype(own.dtype), own.size) for own in known.values()]
    theirs = [(dtype_of(value), np.size(value)) for value in found.values()]
    seen = {dtype: dtype for dtype, _ in (*ours, *theirs)}
    if _by_dtype(ours) != _by_dtype(theirs):  # as the narrowest floats on either side
        floats = [dtype for dtype in seen if jnp.issubdtype(dtype, jnp.floating)]
        least = min((dtype.itemsize for dtype in floats), default=0)
        narrow = [dtype for dtype in floats if dtype.itemsize == least]
        if len(narrow) != 1:
            return False
        seen |= dict.fromkeys(floats, narrow[0])
    sizes = [_by_dtype((seen[d], n) for d, n in side) for side in (ours, theirs)]
    known_sums = [
        (seen[dtype], own.numbers.get(str(seen[dtype])))
        for own, (dtype, _) in zip(known.values(), ours, strict=True)
    ]
    expected = [(dtype, own) for dtype, own in known_sums if own is not None]
    if sizes[0] != sizes[1] or len(expected) != len(known_sums):
        return False
    totals = (
        (seen[dtype], int(total(value, seen[dtype])))
        for value, (dtype, _) in zip(found.values(), theirs, strict=True)
    )
    return _by_dtype(expected) == _by_dtype(totals)


def _by_dtype(numbers: Iterable[tuple[np.dtype, int]]) -> dict[np.dtype, int]:
    """Sums numbers by dtype, modulo 2^64."""
    found: Counter[np.dtype] = Counter()
    for dtype, number in numbers:
        found[dtype] = (found[dtype] + number) % 2**64
    return dict(found)


def _unlike(
    known: Mapping[str, Any], found: Mapping[str, Any], sides: tuple[str, str]
) -> str:
    """Describes weights that cannot be told one from the other."""
    said = []
    for kind, side in zip((known, found), sides, strict=True):
        count = sum(math.prod(np.shape(value)) for value in kind.values())
        listed = ", ".join(f"{name} {list(np.shape(v))}" for name, v in kind.items())
        said.append(f"{count} in {side} ({listed or 'none'})")
    return (
        "the rest of the base, where names or shapes differ, does not hold the same "
        f"numbers: {' and '.join(said)}"
    )


def _configs(
    known: Base, found: Base, trained: Collection[str], sides: tuple[str, str]
) -> tuple[list[str], set[str]]:
    """Lists how configs differ, and the weights that need not be the same for it."""
    problems, resized = [], set()
    if len(known.configs) != len(found.configs):  # another binding, or a part
        if known.configs and found.configs:
            numbers = len(known.configs), len(found.configs)
            log.warning("%s and %s models: their configs were not compared", *numbers)
        return problems, resized
    for one, other in zip(sorted(known.configs), sorted(found.configs), strict=True):
        ours, theirs = known.configs[one], found.configs[other]
        shared = [name for name in ours if name in theirs and name != "grid"]
        differ = [name for name in shared if not _equal(ours[name], theirs[name])]
        if ours.get("grid") != theirs.get("grid"):
            name = _join(other, found.positions)
            own, value = known.weights.get(name), found.weights.get(name)
            if name in trained or (own and value is not None and own.is_of(value)):
                differ.append("grid")  # the same weights for other places
            elif own or value is not None:  # else no weight follows from the grid
                log.warning("%s is that of another grid: it was not compared", name)
                resized |= {_join(one, found.positions), name}
        problems += [
            f"{_join(other, name)}: {ours[name]} in {sides[0]} and {theirs[name]} in "
            f"{sides[1]}"
            for name in differ
        ]
    return problems, resized


def _equal(one: Any, other: Any) -> bool:
    """Returns True if two values of JSON are the same to six digits."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _join(path: str, name: str) -> str:
    return f"{path}/{name}".lstrip("/")


def _is_number(value: Any) -> bool:
    """Returns False for counters and the keys of random streams, old or new."""
    if not hasattr(value, "dtype"):
        return isinstance(value, float | complex)
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return False
    key = value.dtype == np.uint32 and value.shape[-1:] in ((2,), (4,))
    counter = not value.shape and jnp.issubdtype(value.dtype, jnp.integer)
    return not key and not counter


def _is_inexact(value: Any) -> bool:
    return jnp.issubdtype(dtype_of(value), jnp.inexact)
