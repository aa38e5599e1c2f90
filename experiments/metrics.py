"""`metrics.jsonl`, a row for each epoch of each method."""

import json
import os
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"


def log(out: Path, row: dict[str, Any]) -> None:
    """Appends a row; it is on the disk when this returns."""
    with (out / NAME).open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def of(out: Path, method: str) -> list[dict[str, Any]]:
    """The rows of a method."""
    return [row for row in _read(out) if row["method"] == method]


def keep(out: Path, method: str, epochs: int) -> None:
    """Drops what an interrupted run logged of a method after so many epochs."""
    rows = [
        row
        for row in _read(out)
        if row["method"] != method or row.get("epoch", 1) <= epochs
    ]
    partial = (out / NAME).with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(out / NAME)


def _read(out: Path) -> list[dict[str, Any]]:
    path = out / NAME
    lines = path.read_text().split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]  # a line cut short is no row
