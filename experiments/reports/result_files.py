"""The files of a benchmark or a study: one JSON file and one picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import files


def write(
    out: Path,
    name: str,
    result: Any,
    console: Console,
    draw: Callable[[Path, Any], None] | None = None,
    table: Table | None = None,
) -> None:
    """Writes `NAME.json` and `NAME.png` into a folder, and prints where they are.

    Args:
      out: the folder; it is made if it is missing.
      name: name of the files, without a suffix.
      result: content of the JSON file.
      console: where the table and the folder are printed.
      draw: draws the result into the PNG of the given path; None for no picture.
      table: printed first.
    """
    files.write(out / f"{name}.json", result)
    written = f"{name}.json is"
    if draw is not None:
        draw(out / f"{name}.png", result)
        written = f"{name}.json and {name}.png are"
    if table is not None:
        console.print(table)
    console.print(f"{written} in {out}", soft_wrap=True)
