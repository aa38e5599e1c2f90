"""Live bytes along the schedule of a compiled program, read from its HLO text.

An array lives from the instruction that makes it to the last one that reads it, the
arguments and what is returned in their memory for the whole program. As the compiler
does, a fusion writes over an operand of its size that nobody reads again, and what a
loop carries stays where it is. What a compiler adds for alignment and gaps is not seen.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from experiments.benchmarks.hlo import Line, computations

Array = tuple[str, int]  # the instruction that makes it, and which of its results
# Instructions whose results lie where their operands do.
VIEWS = {"bitcast", "get-tuple-element", "opt-barrier", "tuple", "while"}
GIVEN = {"constant", "parameter"}

_INDEX = re.compile(r"\bindex=(\d+)")
_SHARED = re.compile(r"\{(\d*)\}: \((\d+), \{\}")  # a result, the operand of its memory


def live_bytes(hlo: str) -> list[int]:
    """Returns what is in memory at each instruction, in the order in which they run.

    The body of a loop stands there once, as every turn takes the same, and of branches
    the one that takes most. Views and constants are left out.

    Args:
      hlo: text of a program that was compiled for one device.

    Raises:
      ValueError: the text is not scheduled, or has instructions that overlap others.
    """
    head = hlo.partition("\n")[0]
    if "is_scheduled=true" not in head:
        raise ValueError(
            "the text has no is_scheduled=true: expected that of a compiled program."
        )
    lines_of, entry = computations(hlo)
    arguments = sum(line.bytes for line in lines_of[entry] if line.op == "parameter")
    shared = head.partition("input_output_alias=")[2]
    donated = {int(result or 0) for result, _ in _SHARED.findall(shared)}
    return list(_walk(lines_of, entry, arguments, donated))


def _walk(
    lines_of: Mapping[str, Sequence[Line]],
    name: str,
    held: int,
    placed: Collection[int] | None,
) -> Iterator[int]:
    """Walks through a computation.

    Args:
      lines_of: instructions of every computation.
      name: the computation.
      held: bytes of what lives around it, its parameters among them.
      placed: its results whose memory is part of `held`; None for all.
    """
    lines = lines_of[name]
    arrays_of = _arrays(lines)
    returned = arrays_of[lines[-1].name]
    outside = {
        array
        for place, array in enumerate(returned)
        if placed is None or place in placed
    }
    last = {array: len(lines) for array in returned}
    for place, line in enumerate(lines):
        for array in _read(line, arrays_of):
            last[array] = max(place, last.get(array, 0))
    sizes: dict[Array, int] = {}  # of what lives and was made here
    for place, line in enumerate(lines):
        read = _read(line, arrays_of)
        done = {array for array in read if array in sizes and last[array] == place}
        if line.op not in VIEWS | GIVEN:
            for index, array in enumerate(line.arrays):
                made = line.name, index
                if made in outside or made not in arrays_of[line.name]:
                    continue
                sizes[made] = array.bytes
                over = _overwritten(line, array.bytes, done, sizes)
                if over is not None:
                    done.remove(over)
                    del sizes[over]
                if made not in last:  # nobody reads it
                    done.add(made)
        now = held + sum(sizes.values())
        inner = [list(_walk(lines_of, callee, now, None)) for callee in _run_by(line)]
        yield from max(inner, key=lambda sizes: max(sizes, default=0), default=[])
        if line.op not in VIEWS | GIVEN:
            yield now
        for array in done:
            del sizes[array]


def _arrays(lines: Sequence[Line]) -> dict[str, list[Array]]:
    """Returns the arrays that each instruction's results lie in."""
    found: dict[str, list[Array]] = {}
    for line in lines:
        if line.op.endswith("-start"):
            raise ValueError(
                f"{line.name} overlaps others: expected a program for one device "
                "without asynchronous instructions."
            )
        own = [(line.name, index) for index in range(len(line.arrays))]
        if line.op in VIEWS:
            own = [array for name in line.operands for array in found.get(name, ())]
            if line.op == "get-tuple-element" and (index := _INDEX.search(line.rest)):
                own = own[int(index[1]) :][:1]
        elif "output_to_operand_aliasing=" in line.rest:
            shared = line.rest.partition("output_to_operand_aliasing=")[2]
            for result, operand in _SHARED.findall(shared):
                (own[int(result or 0)],) = found[line.operands[int(operand)]]
        found[line.name] = own
    return found


def _read(line: Line, arrays_of: Mapping[str, list[Array]]) -> list[Array]:
    return [array for name in line.operands for array in arrays_of.get(name, ())]


def _overwritten(
    line: Line, size: int, done: Collection[Array], sizes: Mapping[Array, int]
) -> Array | None:
    """Returns the operand that a fusion writes a result of a size over, if any."""
    if line.op != "fusion" or "kind=kLoop" not in line.rest:
        return None
    return next((array for array in sorted(done) if sizes[array] == size), None)


def _run_by(line: Line) -> list[str]:
    """Returns the computations that an instruction runs as a schedule of their own."""
    if line.loop:
        return [line.loop[1]]
    return line.called if line.op in ("call", "conditional") else []
