"""Table of cells that are done, running, failed or left."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from experiments.runs.cells import Cell

Kind = Literal["done", "running", "failed", "left"]
KINDS: tuple[Kind, ...] = ("done", "running", "failed", "left")


@dataclasses.dataclass(frozen=True)
class State:
    """State of a cell.

    Attributes:
      note: who is at it since when, or why it failed; empty for neither.
    """

    name: str
    kind: Kind
    note: dict[str, Any]


def states(
    cells: Sequence[Cell], is_finished: Callable[[Cell], bool], workers: Collection[str]
) -> list[State]:
    """Returns the state of every cell.

    Args:
      workers: those that are alive; notes of others were left by the dead.
    """
    return [_state(cell, is_finished(cell), workers) for cell in cells]


def _state(cell: Cell, is_finished: bool, workers: Collection[str]) -> State:
    note = cell.note() or {}
    kind: Kind = "left"
    if is_finished:
        kind = "done"
    elif "failed" in note:
        kind = "failed"
    elif note.get("worker") in workers:
        kind = "running"
    return State(cell.name, kind, note)


def brief(states: Sequence[State]) -> str:
    """Returns how many cells are in each state.

    >>> brief([State("digits", "done", {}), State("elpv", "left", {})])
    '2 cells: 1 done, 0 running, 0 failed, 1 left'
    """
    counts = Counter(state.kind for state in states)
    parts = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
    return f"{len(states)} cells: {parts}"


def shown(states: Sequence[State]) -> Group:
    """Returns the counts, and a table of the cells that run or failed, if any."""
    made = table(states)
    return Group(Text(brief(states)), *[made] * bool(made.row_count))


def table(states: Sequence[State]) -> Table:
    """Returns the cells that run, and those that failed."""
    made = Table("cell", "state", "")
    for state in states:
        if state.kind == "running":
            minutes = (time.time() - state.note["since"]) / 60
            text = f"worker {state.note['worker']}, for {minutes:.0f} min"
            made.add_row(Text(state.name), state.kind, Text(text))
        elif state.kind == "failed":
            made.add_row(Text(state.name), state.kind, Text(state.note["failed"]))
    return made
