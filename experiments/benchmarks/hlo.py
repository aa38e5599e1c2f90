"""Instructions of a compiled program, read from its HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterable

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


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """Type of an array, or of one in a tuple.

    Attributes:
      dtype: HLO's name of the dtype.
      shape: sizes of its axes.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of a number; at least one."""
        bits = re.search(r"\d+", self.dtype)
        return max(int(bits[0]) // 8, 1) if bits else 1

    @property
    def bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.itemsize


@dataclasses.dataclass(frozen=True)
class Line:
    """An instruction; `rest` is what follows the opening bracket of its operands."""

    name: str
    type: str
    op: str
    rest: str

    @property
    def arrays(self) -> tuple[ArrayType, ...]:
        """Types of the arrays that it makes: several for a tuple."""
        return tuple(
            ArrayType(dtype, tuple(int(n) for n in sizes.split(",") if n))
            for dtype, _, sizes in _ARRAY.findall(self.type)
        )

    @property
    def bytes(self) -> int:
        """Bytes of the arrays that it makes."""
        return sum(each.bytes for each in self.arrays)

    @property
    def operands(self) -> list[str]:
        """Names of its operands."""
        return _OPERANDS.findall(self.rest.partition(")")[0])

    @property
    def loop(self) -> tuple[str, str] | None:
        """Computations of a loop's condition and body; None if it is no loop."""
        found = _LOOP.search(self.rest)
        return (found[1], found[2]) if found else None

    @property
    def called(self) -> list[str]:
        """Computations that it calls once: branches and a fusion's, too."""
        called = _CALLS.findall(self.rest)
        for branches in _BRANCHES.findall(self.rest):
            called += _OPERANDS.findall(branches)
        return called

    def turns(self, condition: Iterable["Line"]) -> int | None:
        """Returns how often a loop turns; None if the text does not tell.

        The TPU's compiler leaves the number out: then it is the only one that the
        counter, which starts at 0, is compared with.

        Args:
          condition: instructions of the loop's condition.
        """
        if known := _TURNS.search(self.rest):
            return int(known[1])
        condition = list(condition)
        below = any(x.op == "compare" and "direction=LT" in x.rest for x in condition)
        limits = {x.rest.partition(")")[0] for x in condition if x.op == "constant"}
        return int(limits.pop()) if below and len(limits) == 1 else None


def computations(hlo: str) -> tuple[dict[str, list[Line]], str]:
    """Returns the instructions of every computation, and the entry's name.

    Args:
      hlo: `jax.jit(...).lower(...).compile().as_text()`.

    Raises:
      ValueError: the text is not that of a compiled program.
    """
    found: dict[str, list[Line]] = {}
    lines: list[Line] = []
    entry = ""
    for text in hlo.splitlines():
        if head := _COMPUTATION.match(text):
            lines = found[head[2]] = []
            entry = head[2] if head[1] else entry
        elif parts := _INSTRUCTION.match(text):
            lines.append(Line(*parts.groups()))
    if not entry:
        raise ValueError("the text has no ENTRY: expected that of a compiled program.")
    return found, entry
