"""Collectives of a compiled program, read from its HLO text.

Those inside a loop count as often as it turns. Bytes are those of the larger side on
one device: of an all-gather its result, of a reduce-scatter its operand.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import TypedDict

from experiments.benchmarks.hlo import Line, computations

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
SMALL = 1024  # bytes: below, a collective costs its latency
UNKNOWN = "in a loop of unknown length"

_CHAIN = re.compile(r'\bchannel_id=(\d+),.*chain_id="(\d+)"')


class Sum(TypedDict):
    """Collectives of a kind in one step, on one device.

    Attributes:
      count: how many run.
      bytes: bytes of all of them.
      small: how many of them are of less than `SMALL` bytes.
    """

    count: int
    bytes: int
    small: int


def of(hlo: str) -> dict[str, Sum]:
    """Returns the sums of every kind that a compiled program has.

    A kind ends in `UNKNOWN` where the text does not tell how often a loop turns: those
    are of one turn.

    Args:
      hlo: `jax.jit(...).lower(...).compile().as_text()`.
    """
    lines_of, entry = computations(hlo)

    @functools.cache
    def found(name: str) -> tuple[_Found, ...]:
        lines = lines_of.get(name, ())
        sizes = {line.name: line.bytes for line in lines}
        return _once(each for line in lines for each in of_line(name, line, sizes))

    def of_line(name: str, line: Line, sizes: dict[str, int]) -> list[_Found]:
        kind = re.sub(r"-start$", "", line.op)
        if kind in KINDS:
            # The TPU's compiler has a reduce-scatter as a fusion of an all-reduce.
            scatter = kind == "all-reduce" and name.startswith("all-reduce-scatter")
            chain = _CHAIN.search(line.rest)
            return [
                _Found(
                    "reduce-scatter" if scatter else kind,
                    _larger(line, sizes),
                    chain=chain and chain.groups(),
                )
            ]
        if line.loop:
            condition, body = line.loop
            turns = line.turns(lines_of.get(condition, ()))
            return [each.times(turns) for each in found(body)]
        if line.op.endswith(("-done", "-update")):
            return []
        return [each for callee in line.called for each in found(callee)]

    sums: dict[str, Sum] = {}
    for each in found(entry):
        own = sums.setdefault(each.kind, Sum(count=0, bytes=0, small=0))
        own["count"] += each.count
        own["bytes"] += each.count * each.bytes
        own["small"] += each.count * (each.bytes < SMALL)
    return dict(sorted(sums.items()))


@dataclasses.dataclass(frozen=True)
class _Found:
    """A collective, and how often it runs."""

    kind: str
    bytes: int
    count: int = 1
    chain: tuple[str, ...] | None = None

    def times(self, turns: int | None) -> "_Found":
        if turns is not None:
            return dataclasses.replace(self, count=self.count * turns)
        kind = self.kind.removesuffix(f" {UNKNOWN}")
        return dataclasses.replace(self, kind=f"{kind} {UNKNOWN}")


def _larger(line: Line, sizes: dict[str, int]) -> int:
    """Returns the bytes of the operands or of the results."""
    read = sum(sizes.get(name, 0) for name in line.operands)
    # That an asynchronous one starts with has its operands, too, but an all-reduce.
    both = line.op.endswith("-start") and line.op != "all-reduce-start"
    return max(read, line.bytes - both * read)


def _once(found: Iterable[_Found]) -> tuple[_Found, ...]:
    """Leaves out all but the first part of each that the TPU's compiler has cut.

    It overlaps one with computation in several fusions, which name the same chain.
    """
    kept: dict[object, _Found] = {}
    for number, each in enumerate(found):
        kept.setdefault(each.chain or number, each)
    return tuple(kept.values())
