"""The table of `reports.table` as text."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich.console import Group
from rich.table import Table

from experiments.paths import printable

MISSING = "–"  # noqa: RUF001
Titled = tuple[str, list[str], list[list[str]]]  # title, header and rows of a table


def caption(made: dict[str, Any]) -> str:
    """Returns a line on the kind of numbers and on what is missing."""
    which = {
        "last": "the last epoch",
        "best": "the best epoch on what was followed",
        "ema": "the running mean of the weights",
    }[made["accuracy"]]
    metric = made["metric"]
    text = f"Test {metric['name']} of {which}{', %' * metric['percent']}. "
    text += f"{'; '.join(made['setups'])}."
    ours = [column for column in made["columns"] if not column["paper"]]
    counts = _counts(made)
    fewer = " (in parentheses where fewer)" if len(counts) > 1 else ""
    text += f" Seeds: {max(counts)}{fewer}."
    if any(column["tasks"].keys() != made["tasks"].keys() for column in ours):
        text += f" {MISSING}: not run; no mean without all of its tasks."
    if len(ours) < len(made["columns"]):
        text += (
            " Paper: Table XIII, ViT-B/16, best accuracy of a run on the test split."
        )
    if made["failed"]:
        text += f" Failed, and in no mean: {'; '.join(made['failed'])}"
    return text


def printed(made: dict[str, Any]) -> Table:
    """Returns the table for the terminal."""
    header, rows, rules = _lines(made)
    shown = Table(caption=caption(made), caption_justify="left")
    for index, title in enumerate(header):
        side: Literal["left", "right"] = "right" if index else "left"
        shown.add_column(title, justify=side, no_wrap=not index, overflow="fold")
    for index, row in enumerate(rows):
        shown.add_row(*row, end_section=index in rules)
    return shown


def markdown(made: dict[str, Any]) -> str:
    """Returns a Markdown table with its caption below."""
    header, rows, _ = _lines(made)
    return "\n".join([*markdown_lines(header, rows), "", caption(made), ""])


def markdown_lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    r"""Returns the lines of a Markdown table; all but the first column are numbers.

    >>> print("\n".join(markdown_lines(["", "mean"], [["cats|dogs", "1.5"]])))
    |  | mean |
    | --- | --: |
    | cats\|dogs | 1.5 |
    """
    ruler = ["---"] + ["--:"] * (len(header) - 1)
    return [
        f"| {' | '.join(map(_markdown_cell, row))} |" for row in (header, ruler, *rows)
    ]


def printed_tables(tables: Iterable[Titled], caption: str) -> Group:
    """Returns tables for the terminal, each under its title, and a caption below."""
    shown = []
    for title, header, rows in tables:
        table = Table(title=title)
        for place, name in enumerate(header):
            table.add_column(name, justify="right" if place else "left")
        for row in rows:
            table.add_row(*row)
        shown.append(table)
    return Group(*shown, caption)


def markdown_tables(tables: Iterable[Titled], caption: str) -> str:
    """Returns Markdown tables, each under its title, and a caption below."""
    lines = []
    for title, header, rows in tables:
        lines += [f"{title}:", "", *markdown_lines(header, rows), ""]
    return "\n".join([*lines, caption, ""])


def number(value: Any, form: str, factor: int = 1) -> str:
    """Returns a number times a factor as text, or a dash for None.

    >>> number(0.975, ".1f", 100), number(None, "d") == MISSING
    ('97.5', True)
    """
    return MISSING if value is None else f"{factor * value:{form}}"


def _markdown_cell(text: str) -> str:
    return " ".join(printable(text).split("\n")).replace("|", r"\|")


def memory_setup(row: dict[str, Any]) -> str:
    """Returns what a row of `memory.json` was measured with, for titles.

    >>> row = {"target": "h100", "batch": 8, "dtype": "bfloat16"}
    >>> memory_setup(row | {"frozen_dtype": "float32"})
    'h100, batch 8, bfloat16, frozen weights float32'
    """
    return (
        f"{row['target']}, batch {row['batch']}, {row['dtype']}, frozen weights "
        f"{row['frozen_dtype']}"
    )


def _lines(made: dict[str, Any]) -> tuple[list[str], list[list[str]], list[int]]:
    """Returns header, rows, and the rows with a line below; wide tables are turned."""
    form = ".1f" if made["metric"]["percent"] else ".4g"

    def number(mean: float | None) -> str:
        return MISSING if mean is None else f"{mean:{form}}"

    columns, group_of = made["columns"], made["tasks"]
    header = ["", *map(_title, columns)]
    rows, rules, most = [], [], max(_counts(made))
    groups = list(dict.fromkeys(group_of.values()))
    for group in groups:
        names = [name for name in group_of if group_of[name] == group]
        for name in names:
            cells = (column["tasks"].get(name) for column in columns)
            rows.append([name, *(_cell_text(cell, most, form) for cell in cells)])
        rules.append(len(rows) - 1)
    for group in groups if len(groups) > 1 else ():
        count = sum(own == group for own in group_of.values())
        means = (column["groups"].get(group) for column in columns)
        rows.append([f"mean, {group} ({count})", *map(number, means)])
    if len(groups) > 1:
        rows.append(["mean of groups", *(number(c["mean_of_groups"]) for c in columns)])
    if len(group_of) > 1:
        rows.append(["mean of tasks", *(number(c["mean_of_tasks"]) for c in columns)])
        rules.append(len(rows) - 1)
    sizes = (column.get("trainable") for column in columns)
    rows.append(["trainable", *map(_range, sizes)])
    if len(columns) > len(rows):  # a row for each method then
        header, *rows = map(list, zip(header, *rows, strict=True))
        rules = []
    return header, rows, rules


def _title(column: dict[str, Any]) -> str:
    notes = [column["setup"]] * bool(column["setup"]) + ["paper"] * column["paper"]
    return column["method"] + (f" ({', '.join(notes)})" if notes else "")


def _counts(made: dict[str, Any]) -> set[int]:
    """Returns the numbers of seeds that cells have."""
    ours = (
        column["tasks"].values() for column in made["columns"] if not column["paper"]
    )
    return {len(cell["seeds"]) for cells in ours for cell in cells}


def _cell_text(cell: dict[str, Any] | None, most: int, form: str) -> str:
    if cell is None:
        return MISSING
    text, deviation = f"{cell['mean']:{form}}", cell.get("deviation")
    if deviation is not None:
        text += f" ± {deviation:{form}}"
    seeds = len(cell.get("seeds", ())) or most  # the paper's have none
    return text if seeds == most else f"{text} ({seeds})"


def _range(ends: list[int] | None) -> str:
    return " to ".join(f"{end:,}" for end in dict.fromkeys(ends or ()))
