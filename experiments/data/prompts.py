"""Templates: what a model reads of a record, and what it is to write.

`plain` is ours: one text to train and to test with, whose end is no white space, so
that the tokens of a question do not depend on what follows. `llm_adapters` is that of
the code that DoRA's tables were made with (https://github.com/NVlabs/DoRA), where both
texts differ in their white space: adapters that were trained there need it so.
"""

import dataclasses
from collections.abc import Callable

from experiments.data.records import Record

INDENT = " " * 16
TASK = "Below is an instruction that describes a task"
CONTEXT = f"{TASK}, paired with an input that provides further context"
WRITE = "Write a response that appropriately completes the request."


@dataclasses.dataclass(frozen=True)
class Template:
    """Template of prompts.

    Attributes:
      name: name in a config.
      asked: returns the prompt of a record when it is tested.
      taught: returns the prompt of a record when it is trained on.
      joint: what stands between that prompt and the output.
      stable: True if a prompt has the same tokens whatever follows.
    """

    name: str
    asked: Callable[[Record], str]
    taught: Callable[[Record], str]
    joint: str
    stable: bool

    def whole(self, record: Record) -> str:
        """Returns the text that is trained on."""
        return self.taught(record) + self.joint + record.output


def plain(record: Record) -> str:
    r"""Returns instruction and input, and a mark of the response.

    >>> plain(Record("Is it?\n\nAnswer format: true/false", "", "true", "true"))
    'Is it?\n\nAnswer format: true/false\n\nResponse:'
    """
    parts = [record.instruction, record.input, "Response:"]
    return "\n\n".join(part for part in parts if part)


def _adapters_taught(record: Record) -> str:
    """Returns the text that DoRA's fine-tuning makes, but the output."""
    return _alpaca(record, blank=INDENT, ends=("  ", " "))


def _adapters_asked(record: Record) -> str:
    """Returns the text that DoRA's evaluation makes."""
    return _alpaca(record, blank="", ends=(" ", ""))


def _alpaca(record: Record, blank: str, ends: tuple[str, str]) -> str:
    """Returns Alpaca's template, indented as a string in a function is.

    Args:
      blank: what lines between the parts consist of.
      ends: end of the first line without and with an input.
    """
    first = f"{CONTEXT if record.input else TASK}. {WRITE}{ends[bool(record.input)]}"
    lines = [first, "", f"{INDENT}### Instruction:", INDENT + record.instruction]
    if record.input:
        lines += [blank, f"{INDENT}### Input:", INDENT + record.input]
    return "\n".join([*lines, blank, f"{INDENT}### Response:", INDENT])


TEMPLATES = {
    template.name: template
    for template in (
        Template("plain", plain, plain, joint=" ", stable=True),
        Template(
            "llm_adapters", _adapters_asked, _adapters_taught, joint="", stable=False
        ),
    )
}
