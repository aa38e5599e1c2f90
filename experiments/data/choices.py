"""Choices of a record: their labels and their texts, parsed from its instruction."""

import re

from experiments.data.records import Record

FORMAT = re.compile(r"Answer format:[ \t]*(\S+)\s*\Z")


def labels(record: Record) -> tuple[str, ...] | None:
    """Returns what `Answer format: a/b/...` at the instruction's end lists.

    None where there is no such list of two labels or more, all different, with the
    right answer among them.

    >>> labels(Record("Is it?\\n\\nAnswer format: true/false", "", "true", "true"))
    ('true', 'false')
    """
    found = FORMAT.search(record.instruction)
    names = tuple(found[1].split("/")) if found else ()
    different = len(set(names)) == len(names) >= 2 and "" not in names
    return names if different and record.answer in names else None


def texts(record: Record) -> tuple[str, ...] | None:
    """Returns the text of each label: what stands after `Answer1:` for `answer1`.

    Labels without such marks, as true and false, are their own texts. None where the
    labels do not parse, some mark is missing or stands twice, marks are not in the
    labels' order, or a text is empty.

    >>> ask = "Which?\\n\\nOption1: Ann Option2: Bo Answer format: option1/option2"
    >>> texts(Record(ask, "", "option2", "option2"))
    ('Ann', 'Bo')
    """
    names = labels(record)
    if names is None:
        return None
    if not any(re.search(r"\d", name) for name in names):
        return names
    asked = record.instruction[: FORMAT.search(record.instruction).start()]  # pyright: ignore[reportOptionalMemberAccess]
    spans = []
    for name in names:
        marks = list(re.finditer(rf"(?<!\w){re.escape(name.capitalize())}:", asked))
        if len(marks) != 1:
            return None
        spans.append(marks[0].span())
    if spans != sorted(spans):
        return None
    starts = [start for start, _ in spans[1:]] + [len(asked)]
    found = [
        asked[end:start].strip() for (_, end), start in zip(spans, starts, strict=True)
    ]
    return tuple(found) if all(found) else None
