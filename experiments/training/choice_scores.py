"""Accuracy by the likelihood of the texts of a question's choices.

As lm-evaluation-harness scores: the question without its choices is the context, the
text of a choice is scored behind it, by the sum of its tokens' log-likelihoods (`text`)
or by that sum over its number of characters (`text_norm`).
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from experiments.data import choices
from experiments.data.questions import AnswerBuckets, Candidates
from experiments.data.records import Record
from experiments.data.tokens import Encoder, Examples
from experiments.training import likelihood

SCORES = ("text", "text_norm")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Choice of a question.

    Attributes:
      question: number of the question.
      right: True if it is the answer.
      characters: length of its text.
    """

    question: int
    right: bool
    characters: int


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """Choices of the questions of several tests, tokenised.

    Attributes:
      examples: a context with a choice each, of which the choice counts.
      buckets: how they become batches.
      choices: what they are, those of a question side by side.
      tests: name of the test of every question, by its number.
      unparsed: number of questions without parsed choices, by test.
    """

    examples: Examples
    buckets: AnswerBuckets
    choices: Sequence[Choice]
    tests: dict[int, str]
    unparsed: dict[str, int]

    @classmethod
    def of(
        cls,
        source: Candidates,
        names: Sequence[str],
        encoder: Encoder,
        pad: int,
        batch: int,
    ) -> "Choices":
        """Tokenises the choices of questions; counts those that do not parse.

        Args:
          source: the questions.
          names: names of the sets of records.
          encoder: the model's tokenizer.
          pad: id to fill rows with.
          batch: choices in a step of an evaluation.

        Raises:
          ValueError: none parses.
        """
        tokens, starts, found = [], [], []
        tests, unparsed = {}, dict.fromkeys((names[a.test] for a in source.asked), 0)
        for number, asked in enumerate(source.asked):
            texts = choices.texts(asked.record)
            if texts is None:
                unparsed[names[asked.test]] += 1
                continue
            tests[number] = names[asked.test]
            before = context(asked.record)
            start = len(encoder.encode(before))
            labels = choices.labels(asked.record) or ()
            for label, text in zip(labels, texts, strict=True):
                ids = encoder.encode(f"{before} {text}")
                tokens.append(np.asarray(ids, np.int32))
                starts.append(start)
                right = label == asked.record.answer
                found.append(Choice(number, right, len(text)))
        if not found:
            raise ValueError("scores=text: the choices of no question can be parsed.")
        examples = Examples(tokens, starts, list(range(len(tokens))))
        buckets = AnswerBuckets.fitting(examples, 3, pad, batch)
        return cls(examples, buckets, found, tests, unparsed)


def context(record: Record) -> str:
    r"""Returns a question without its choices, up to `Answer:`.

    >>> ask = "Which? Option1: Ann Option2: Bo Answer format: option1/option2"
    >>> context(Record(ask, "", "option2", "option2"))
    'Which?\nAnswer:'
    """
    asked = record.instruction[: record.instruction.rindex("Answer format:")]
    first = (choices.labels(record) or ("",))[0].capitalize()
    mark = re.search(rf"(?<!\w){re.escape(first)}:", asked)
    return f"{(asked[: mark.start()] if mark else asked).strip()}\nAnswer:"


def measured(model: Any, given: Choices, mesh: Mesh) -> dict[str, Any]:
    """Returns `test_SCORE_NAME` of each test, the means, and what did not parse."""
    sums = likelihood.of_examples(model, given.examples, given.buckets, mesh)
    return accuracies(sums, given) | {"unparsed": given.unparsed}


def accuracies(sums: np.ndarray, given: Choices) -> dict[str, float]:
    """Returns the accuracies by both scores; of equal choices the first is taken.

    Args:
      sums: log-likelihood of every choice.
    """
    lengths = np.asarray([choice.characters for choice in given.choices])
    questions = np.asarray([choice.question for choice in given.choices])
    right = np.asarray([choice.right for choice in given.choices])
    found: dict[str, float] = {}
    for score, values in zip(SCORES, (sums, sums / lengths), strict=True):
        by_test: dict[str, list[bool]] = {}
        for question, test in given.tests.items():
            (own,) = np.nonzero(questions == question)
            best = own[values[own].argmax()]
            by_test.setdefault(test, []).append(bool(right[best]))
        means = {test: float(np.mean(hits)) for test, hits in by_test.items()}
        found |= {f"test_{score}_{test}": mean for test, mean in means.items()}
        found[f"test_{score}"] = float(np.mean(list(means.values())))
    return found
