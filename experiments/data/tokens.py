"""Tokenised records: what a language model is trained on."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Int

from experiments.data.prompts import Template
from experiments.data.records import Record

Learnt = Literal["answer", "all"]
Overlong = Literal["leave_out", "cut"]


class Encoder(Protocol):
    """Tokenizer, such as `snella_jax.models.llama.Tokenizer`."""

    @property
    def eos(self) -> int:
        """Id that ends a text."""
        ...

    def encode(self, text: str, bos: bool | None = None, /) -> list[int]:
        """Returns the ids of a text."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Source of tokenised records.

    Attributes:
      tokens: ids of prompt, answer and end, int32 `[T]` each.
      starts: place in each of its first token that is learnt.
      rows: place of each in the records that were given.
    """

    tokens: Sequence[Int[np.ndarray, " T"]]
    starts: Sequence[int]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns `tokens`, int32 `[T]`, and `loss`, True for tokens that are learnt.

        The loss of a token is that of predicting it from all before it.
        """
        tokens = self.tokens[index]
        loss: Bool[np.ndarray, " T"] = np.arange(len(tokens)) >= self.starts[index]
        return {"tokens": tokens, "loss": loss}


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenised:
    """Records as examples, and what became of the long ones.

    Attributes:
      examples: the examples, in the records' order.
      left_out: number of records that were longer than the cutoff and left out.
      cut: number of those that were cut at it, so that the answer's end is lost.
      cutoff: most tokens of an example.
    """

    examples: Examples
    left_out: int
    cut: int
    cutoff: int

    def report(self) -> str:
        """Returns a sentence on the records, to print.

        >>> print(Tokenised(Examples([], [], []), 2, 0, 256).report())
        2 of 2 records have more than 256 tokens and are left out.
        """
        records = len(self.examples) + self.left_out
        if self.cut:
            return (
                f"{self.cut} of {records} records have more than {self.cutoff} tokens "
                "and are cut: their answers are not learnt to the end."
            )
        return (
            f"{self.left_out} of {records} records have more than {self.cutoff} tokens "
            "and are left out."
        )


def tokenised(
    records: Sequence[Record],
    encoder: Encoder,
    template: Template,
    *,
    cutoff: int,
    learnt: Learnt = "answer",
    overlong: Overlong = "leave_out",
) -> Tokenised:
    """Tokenises records: prompt, answer, and the token that ends a text.

    Args:
      records: the records.
      encoder: the model's tokenizer; it says whether `bos` stands first.
      template: what stands around them.
      cutoff: most tokens of an example.
      learnt: `answer` for a loss on the answer and the end, `all` for one on all tokens
        but the first, which nothing precedes.
      overlong: `leave_out` for no record longer than the cutoff; `cut` for DoRA's way,
        with `llm_adapters` alone: what is too long loses its right end, the answer.

    Raises:
      ValueError: the cutoff is below 2, or `cut` stands with another template, or a
        prompt of a stable template has other tokens before an answer.
    """
    if cutoff < 2:
        raise ValueError(f"cutoff={cutoff}: expected at least 2.")
    if overlong == "cut" and template.stable:
        raise ValueError(
            f"overlong=cut: it is the llm_adapters template's, not {template.name}'s, "
            "which keeps every answer whole; expected leave_out."
        )
    made = Examples(tokens := [], starts := [], rows := [])
    left_out = cut = 0
    for row, record in enumerate(records):
        ids, answer = _encoded(record, encoder, template)
        if len(ids) > cutoff and overlong == "leave_out":
            left_out += 1
            continue
        cut += len(ids) - 1 > cutoff  # where the end alone has no place, none is lost
        tokens.append(np.asarray(ids[:cutoff], np.int32))
        starts.append(answer if learnt == "answer" else 1)
        rows.append(row)
    return Tokenised(made, left_out, cut, cutoff)


def _encoded(
    record: Record, encoder: Encoder, template: Template
) -> tuple[list[int], int]:
    """Returns the ids of a record, and where the answer begins."""
    prompt = encoder.encode(template.taught(record))
    whole = encoder.encode(template.whole(record))
    if template.stable and whole[: len(prompt)] != prompt:
        raise ValueError(
            f"The tokens of the prompt {template.taught(record)[-40:]!r} are others "
            f"where {record.output!r} follows."
        )
    return [*whole, encoder.eos], len(prompt)
