"""Collectives of a compiled program, read from its HLO text.

Those inside a loop count as often as it turns. Bytes are those of the larger side on
one device: of an all-gather its result, of a reduce-scatter its operand.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from typing import TypedDict

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

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_OPERANDS = re.compile(r"%([\w.-]+)")
_CALLS = re.compile(
    r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"\bcondition=%?([\w.-]+), body=%?([\w.-]+)")
_TURNS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
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
    computations, entry = _computations(hlo)

    @functools.cache
    def found(name: str) -> tuple[_Found, ...]:
        lines = computations.get(name, ())
        sizes = {line.name: line.bytes for line in lines}
        return _once(each for line in lines for each in of_line(name, line, sizes))

    def of_line(name: str, line: "_Line", sizes: dict[str, int]) -> list[_Found]:
        kind = re.sub(r"-start$", "", line.op)
        if kind in KINDS:
            # The TPU's compiler has a reduce-scatter as a fusion of an all-reduce.
            scatter = kind == "all-reduce" and name.startswith("all-reduce-scatter")
            chain = _CHAIN.search(line.rest)
            return [
                _Found(
                    "reduce-scatter" if scatter else kind,
                    line.larger(sizes),
                    chain=chain and chain.groups(),
                )
            ]
        if loop := _LOOP.search(line.rest):
            turns = _turns(line, computations.get(loop[1], ()))
            return [each.times(turns) for each in found(loop[2])]
        if line.op.endswith(("-done", "-update")):
            return []
        called = _CALLS.findall(line.rest)
        for branches in _BRANCHES.findall(line.rest):
            called += _OPERANDS.findall(branches)
        return [each for callee in called for each in found(callee)]

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


@dataclasses.dataclass(frozen=True)
class _Line:
    """An instruction; `rest` is what follows the opening bracket of its operands."""

    name: str
    type: str
    op: str
    rest: str

    @property
    def bytes(self) -> int:
        return (
            sum(
                math.prod(int(n) for n in dims.split(",") if n) * max(int(bits or 8), 8)
                for _, bits, dims in _ARRAY.findall(self.type)
            )
            // 8
        )

    def larger(self, sizes: dict[str, int]) -> int:
        """Returns the bytes of the operands or of the results."""
        operands = _OPERANDS.findall(self.rest.partition(")")[0])
        read = sum(sizes.get(name, 0) for name in operands)
        # That an asynchronous one starts with has its operands, too, but an all-reduce.
        both = self.op.endswith("-start") and self.op != "all-reduce-start"
        return max(read, self.bytes - both * read)


def _computations(hlo: str) -> tuple[dict[str, list[_Line]], str]:
    """Returns the instructions of every computation, and the entry's name."""
    found: dict[str, list[_Line]] = {}
    lines: list[_Line] = []
    entry = ""
    for text in hlo.splitlines():
        if head := _COMPUTATION.match(text):
            lines = found[head[2]] = []
            entry = head[2] if head[1] else entry
        elif parts := _INSTRUCTION.match(text):
            lines.append(_Line(*parts.groups()))
    if not entry:
        raise ValueError("the text has no ENTRY: expected that of a compiled program.")
    return found, entry


def _once(found: Iterable[_Found]) -> tuple[_Found, ...]:
    """Leaves out all but the first part of each that the TPU's compiler has cut.

    It overlaps one with computation in several fusions, which name the same chain.
    """
    kept: dict[object, _Found] = {}
    for number, each in enumerate(found):
        kept.setdefault(each.chain or number, each)
    return tuple(kept.values())


def _turns(loop: _Line, condition: Iterable[_Line]) -> int | None:
    """Returns how often a loop turns; None if the text does not tell.

    The TPU's compiler leaves the number out: then it is the only one that the counter,
    which starts at 0, is compared with.
    """
    if known := _TURNS.search(loop.rest):
        return int(known[1])
    condition = list(condition)
    below = any(x.op == "compare" and "direction=LT" in x.rest for x in condition)
    limits = {x.rest.partition(")")[0] for x in condition if x.op == "constant"}
    return int(limits.pop()) if below and len(limits) == 1 else None
