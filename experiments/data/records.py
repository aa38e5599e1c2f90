"""Records of questions with their answers, from JSON and JSONL files.

The form is that of LLM-Adapters (arXiv 2304.01933): a record has an `instruction`, an
`input` (often empty), the `output` to learn and the `answer`, the label in it.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FIELDS = ("instruction", "input", "output", "answer")
MAY_BE_EMPTY = ("input",)
ENDS = (".json", ".jsonl")


@dataclasses.dataclass(frozen=True)
class Record:
    """Question with its answer.

    Attributes:
      instruction: task and question, perhaps with choices.
      input: what the question is about; often empty.
      output: text to learn, such as `the correct answer is answer2`.
      answer: label of the right answer, such as `answer2`.
    """

    instruction: str
    input: str
    output: str
    answer: str


def read(path: Path) -> list[Record]:
    """Reads a file: a JSON list of records, or with `.jsonl` one record a line.

    Other fields than those of a `Record` are ignored.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is neither, is empty, or a record lacks a field, or has something
        else than a text there, or an empty one; names the file and the record, from 1.
    """
    if path.suffix not in ENDS:
        raise ValueError(f"{path}: expected a file in {' or '.join(ENDS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There are no records at {path}.")
    found = [_record(where, value) for where, value in _values(path)]
    if not found:
        raise ValueError(f"{path} has no records.")
    return found


def read_folder(folder: Path) -> dict[str, dict[str, list[Record]]]:
    """Reads a folder of tests: `NAME/train.json`, `NAME/test.json`, either or both.

    Returns:
      Records by name, sorted, and by split, `train` and `test`.

    Raises:
      FileNotFoundError: there is no such file in any folder below `folder`.
      ValueError: as `read`.
    """
    found: dict[str, dict[str, list[Record]]] = {}
    for path in sorted(folder.glob("*/*")):
        if path.stem in ("train", "test") and path.suffix in ENDS:
            splits = found.setdefault(path.parent.name, {})
            if path.stem in splits:
                raise ValueError(f"{path.parent} has two files for {path.stem}.")
            splits[path.stem] = read(path)
    if not found:
        raise FileNotFoundError(
            f"{folder} has no records: expected NAME/train.json or NAME/test.json."
        )
    return found


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the values of a file, and where they stand."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            values = json.loads(text)
            if not isinstance(values, list):
                raise ValueError("expected a list of records")
            for number, value in enumerate(values, start=1):
                yield f"{path}, record {number}", value
            return
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is no JSON: {error}.") from error


def _record(where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: {type(value).__name__}, expected an object with the fields "
            f"{', '.join(FIELDS)}."
        )
    for name in FIELDS:
        if name not in value:
            raise ValueError(f"{where}: the field {name!r} is missing.")
        text = value[name]
        if not isinstance(text, str):
            raise ValueError(f"{where}: {name}={text!r}, expected a text.")
        if not text.strip() and name not in MAY_BE_EMPTY:
            raise ValueError(f"{where}: the field {name!r} is empty.")
    return Record(**{name: value[name] for name in FIELDS})
