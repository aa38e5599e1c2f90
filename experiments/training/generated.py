"""Accuracy by generated answers, as published: beam search, then keywords.

As in the code of LLM-Adapters a model writes on behind the prompt, 32 tokens
with 4 beams, and the first keyword of the test in that text, in its own case, is its
answer; a text without one is wrong. What stands behind another mark of a response is
not looked at; DoRA's code looks behind the last mark alone. (In both a batch is one
question: larger ones have no mask of padding.)
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from experiments import terminal
from experiments.data import choices
from experiments.data.prompts import Template
from experiments.data.questions import Asked
from experiments.data.records import Record
from experiments.data.tokens import Encoder
from snella_jax.models import llama

NEW_TOKENS, BEAMS = 32, 4
MULTIPLE = 64  # of tokens, to which prompts are padded
KEYWORDS = (  # published: those of a test, however many choices a question has
    ("true", "false"),
    ("solution1", "solution2"),
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    ("ending1", "ending2", "ending3", "ending4"),
    ("option1", "option2"),
)
Write = Callable[[Sequence[str]], list[str]]


def keywords(record: Record) -> tuple[str, ...]:
    """Returns the published keywords of a record's test, or else the record's labels.

    >>> ask = "Which? Answer1: Ann Answer2: Bo Answer format: answer1/answer2"
    >>> keywords(Record(ask, "", "x", "answer1"))[-1]
    'answer5'
    """
    labels = choices.labels(record) or ()
    return next((own for own in KEYWORDS if {*labels} <= {*own}), labels)


def answer_of(text: str, known: Sequence[str], mark: str) -> str | None:
    """Returns the first keyword in a text before a mark; None for none.

    >>> answer_of(" It is option2, not option1.", ("option1", "option2"), "Response:")
    'option2'
    """
    longest_first = sorted(known, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    found = re.search(pattern, text.split(mark)[0]) if known else None
    return found[0] if found else None


def check(
    asked: Sequence[Asked], template: Template, encoder: Encoder, context: int
) -> None:
    """Raises a `ValueError` if a prompt has no room for its answer in a context."""
    longest = max(len(encoder.encode(template.asked(own.record))) for own in asked)
    if longest + NEW_TOKENS > context:
        raise ValueError(
            f"scores=generated: the longest question has {longest} tokens, its answer "
            f"{NEW_TOKENS}: expected at most the model's context={context} in all."
        )


def measured(
    asked: Sequence[Asked], names: Sequence[str], template: Template, write: Write
) -> dict[str, Any]:
    """Returns `test_generated_NAME` of each test, their mean, and `keywordless`.

    Args:
      asked: records of the tests.
      names: names of the sets of records.
      template: makes their prompts.
      write: returns what a model writes behind each of several prompts.

    Returns:
      Accuracies, and the number of texts without a keyword, by test.
    """
    prompts = [template.asked(own.record) for own in asked]
    hits: dict[str, list[bool]] = {}
    lost = dict.fromkeys((names[own.test] for own in asked), 0)
    for own, prompt, text in zip(asked, prompts, write(prompts), strict=True):
        mark = prompt.rstrip().rpartition("\n")[2].strip()
        answer = answer_of(text, keywords(own.record), mark)
        hits.setdefault(names[own.test], []).append(answer == own.record.answer)
        lost[names[own.test]] += answer is None
    found = {f"test_generated_{test}": float(np.mean(h)) for test, h in hits.items()}
    mean = float(np.mean(list(found.values())))
    return {**found, "test_generated": mean, "keywordless": lost}


def writer(
    model: Any, tokenizer: llama.Tokenizer, batch: int, console: Console
) -> Write:
    """Returns `write` of a plain model; prompts of like length stand together.

    Args:
      batch: prompts in a step.
      console: where progress is shown.
    """

    ends = sorted({tokenizer.eos, *model.config.eos})

    def written(ids: list[list[int]]) -> np.ndarray:
        length = -(-max(map(len, ids)) // MULTIPLE) * MULTIPLE
        tokens = np.full((len(ids), length), tokenizer.pad, np.int32)
        for place, row in enumerate(ids):
            tokens[place, : len(row)] = row
        new = llama.generate(
            model,
            tokens,
            lengths=[len(row) for row in ids],
            max_new_tokens=NEW_TOKENS,
            eos=ends,
            beams=BEAMS,
        )
        return np.asarray(new)

    def write(prompts: Sequence[str]) -> list[str]:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        texts = [""] * len(ids)
        with terminal.progress(console) as bar:
            starts = range(0, len(order), batch)
            for start in bar.track(starts, description="generating answers"):
                rows = order[start : start + batch]
                own = [ids[row] for row in rows]
                own += own[-1:] * (batch - len(own))  # one shape for all
                for row, new in zip(rows, written(own), strict=False):
                    texts[row] = tokenizer.decode(new)
        return texts

    return write
