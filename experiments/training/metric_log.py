"""Log of a method's rounds: `metrics.jsonl`, TensorBoard and, asked for, W&B.

A row of `metrics.jsonl` is a round of a method; its `epoch` is the round's number.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from experiments import files

NAME = "metrics.jsonl"


def log(out: Path, row: dict[str, Any]) -> None:
    """Appends a row; it is on the disk when this returns."""
    with (out / NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def of(out: Path, method: str) -> list[dict[str, Any]]:
    """Returns the rows that are left of a method that is trained by steps, in order."""
    own = (row for row in _read(out) if row["method"] == method and "epoch" in row)
    rows = {row["epoch"]: row for row in own}
    return [rows[epoch] for epoch in sorted(rows)]


def lacking(rows: list[dict[str, Any]], passed: int, unit: str = "epoch") -> str:
    """Returns the missing rows of so many rounds, to print; "" where all are there.

    >>> lacking([{"epoch": 2}, {"epoch": 6}], 6)
    'epochs 1, 3, 4, 5'
    """
    gone = sorted(set(range(1, passed + 1)) - {row["epoch"] for row in rows})
    return f"{unit}{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}" if gone else ""


def keep(out: Path, method: str, passed: int) -> None:
    """Drops what an interrupted run logged of a method after so many rounds."""
    rows = [
        row
        for row in _read(out)
        if row["method"] != method or row.get("epoch", 1) <= passed
    ]
    files.replace(out / NAME, "".join(json.dumps(row) + "\n" for row in rows))


def median(rows: list[dict[str, Any]], name: str) -> float | None:
    """Returns that of a value over the rows that have it; None where none has."""
    values = [row[name] for row in rows if name in row]
    return float(np.median(values)) if values else None


def of_matrices(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Returns the last value on record of every matrix, in the order of their names.

    >>> of_matrices([{"budget": {"fc2": 7, "fc1": 5}}, {"epoch": 2}], "budget")
    [5, 7]
    """
    known = [row[name] for row in rows if name in row][-1:]
    return [value for own in known for _, value in sorted(own.items())]


class Tracker:
    """Log of a method that is trained by steps.

    Attributes:
      rows: rows of its rounds, but those that the file has lost.
    """

    def __init__(self, out: Path, method: str, passed: int, wandb: str | None = None):
        """Goes on after `passed` rounds.

        Args:
          out: the run folder.
          method: stands in every row.
          passed: number of rounds that are over.
          wandb: a project in Weights & Biases; None for no log there.
        """
        self.out, self.method = out, method
        self.rows = [row for row in of(out, method) if row["epoch"] <= passed]
        self.board = self.wandb = None
        if not files.is_primary():
            return
        # Here, as its import takes a second where torch is installed.
        from tensorboardX import SummaryWriter

        keep(out, method, passed)
        board = str(out / "tensorboard" / method)
        self.board = SummaryWriter(board, purge_step=passed + 1)
        if wandb is not None:
            self.wandb = _wandb(wandb, out, method)

    def log(self, row: dict[str, Any]) -> None:
        """Records a round."""
        row = {"method": self.method, **row}
        self.rows.append(row)
        if self.board is None:
            return
        log(self.out, row)
        epoch = row["epoch"]
        scalars = {k: v for k, v in row.items() if isinstance(v, float)}
        for name, value in scalars.items():
            self.board.add_scalar(name, value, epoch)
        if "budget" in row:
            counts, sizes = (
                np.array(list(row[name].values())) for name in ("budget", "capacity")
            )
            self.board.add_histogram("density of the matrices", counts / sizes, epoch)
        self.board.flush()
        if self.wandb is not None:
            self.wandb.log(scalars, step=epoch)

    def close(self) -> None:
        """Closes TensorBoard's file and W&B's run."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _wandb(project: str, out: Path, method: str) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    name = f"{out.name}/{method}"
    key = hashlib.sha256(os.fsencode(f"{out.absolute()}/{method}")).hexdigest()[:16]
    config = files.read(out / "config.json")
    return wandb.init(
        project=project, name=name, id=key, resume="allow", config=config, dir=str(out)
    )


def _read(out: Path) -> list[dict[str, Any]]:
    """Returns every row that is whole; a line that a kill cut short is none."""
    path = out / NAME
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [row for line in lines if (row := _row(line))]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and "method" in row
    return row if whole and isinstance(row.get("epoch", 1), int) else None
