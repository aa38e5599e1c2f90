"""Accuracy by generated answers, as published: beam search, then keywords.

As in the code of LLM-Adapters and DoRA a model writes on behind the prompt, 32 tokens
with 4 beams, and the first of the record's labels in that text, in its own case, is its
answer; a text without one is wrong.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.data import choices
from experiments.data.prompts import Template
from experiments.data.questions import Asked
from experiments.data.records import Record
from snella_jax.models import llama

NEW_TOKENS, BEAMS = 32, 4
MULTIPLE = 64  # of tokens, to which prompts are padded
Write = Callable[[Sequence[str]], list[str]]


def answer_of(text: str, record: Record) -> str | None:
    """Returns the first label of a record in a text; None for none.

    >>> ask = "Which? Option1: Ann Option2: Bo Answer format: option1/option2"
    >>> answer_of(" It is option2, not option1.", Record(ask, "", "x", "option1"))
    'option2'
    """
    labels = choices.labels(record) or ()
    found = re.search("|".join(map(re.escape, labels)), text) if labels else None
    return found[0] if found else None


def measured(
    asked: Sequence[Asked], names: Sequence[str], template: Template, write: Write
) -> dict[str, float]:
    """Returns `test_generated_NAME` of each test, and their mean.

    Args:
      asked: records of the tests.
      names: names of the sets of records.
      template: makes their prompts.
      write: returns what a model writes behind each of several prompts.
    """
    texts = write([template.asked(own.record) for own in asked])
    hits: dict[str, list[bool]] = {}
    for own, text in zip(asked, texts, strict=True):
        right = answer_of(text, own.record) == own.record.answer
        hits.setdefault(names[own.test], []).append(right)
    found = {f"test_generated_{test}": float(np.mean(h)) for test, h in hits.items()}
    return found | {"test_generated": float(np.mean(list(found.values())))}


def writer(model: Any, tokenizer: llama.Tokenizer, batch: int) -> Write:
    """Returns `write` of a plain model; prompts of like length stand together.

    Args:
      batch: prompts in a step.
    """

    def write(prompts: Sequence[str]) -> list[str]:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        texts = [""] * len(ids)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            own = [ids[row] for row in rows]
            own += own[-1:] * (batch - len(own))  # one shape for all
            length = -(-max(map(len, own)) // MULTIPLE) * MULTIPLE
            tokens = np.full((batch, length), tokenizer.pad, np.int32)
            for place, row in enumerate(own):
                tokens[place, : len(row)] = row
            new = llama.generate(
                model,
                jnp.asarray(tokens),
                lengths=jnp.asarray([len(row) for row in own]),
                max_new_tokens=NEW_TOKENS,
                eos=(tokenizer.eos,),
                beams=BEAMS,
            )
            for row, written in zip(rows, np.asarray(new), strict=False):
                texts[row] = tokenizer.decode(written)
        return texts

    return write
