"""Questions with candidates for the answer: splits, and batches with both."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from experiments.data import choices, fingerprint, records
from experiments.data.buckets import FILLER, Buckets, Group
from experiments.data.prompts import Template
from experiments.data.records import Record
from experiments.data.source import Joined, Source
from experiments.data.tokens import (
    Encoder,
    Examples,
    Learnt,
    Overlong,
    Tokenised,
    tokenised,
)
from experiments.paths import stem

SEED = 0  # of the splits, which are the same for every seed of a run
SHARE = 0.2  # of a single file that is held out as its test


@dataclasses.dataclass(frozen=True)
class Asked:
    """Record of a test.

    Attributes:
      record: question and answer.
      test: number of the test.
      where: name for messages.
    """

    record: Record
    test: int
    where: str


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """Source of tokenised questions with their candidates.

    Attributes:
      examples: the questions with their right answers.
      asked: their records, in the same order.
      at: place of the first token in which the candidates differ.
      tokens: their tokens there; -1 fills up.
      labels: number of the right one.
    """

    examples: Examples
    asked: Sequence[Asked]
    at: Int[np.ndarray, " N"]
    tokens: Int[np.ndarray, "N C"]
    labels: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            **self.examples[index],
            "at": self.at[index],
            "candidates": self.tokens[index],
            "label": self.labels[index],
            "test": self.asked[index].test,
        }


@dataclasses.dataclass(frozen=True)
class AnswerBuckets(Buckets):
    """Buckets whose batches are those of `experiments.training.answers`.

    Attributes:
      learnt: most tokens of an example that are learnt.
    """

    learnt: int = 1

    @classmethod
    def fitting(
        cls, source: Any, count: int, pad: int, evaluated: int
    ) -> "AnswerBuckets":
        """Returns buckets that hold about equally many examples of a source each."""
        found = [source[index] for index in range(len(source))]
        plain = Buckets.of([len(x["tokens"]) for x in found], count, pad)
        learnt = max(int(x["loss"].sum()) for x in found)
        return cls(plain.lengths, pad, evaluated, learnt)

    def collated(self, source: Source, group: Group) -> dict[str, np.ndarray]:
        """Returns a group's arrays: `learnt` for `loss`, and what the source adds."""
        arrays = super().collated(source, group)
        loss = arrays.pop("loss")
        learnt = np.zeros((len(loss), min(self.learnt, group.length)), np.int32)
        for place, row in enumerate(loss):
            (own,) = np.nonzero(row)
            learnt[place, : len(own)] = own
        arrays["learnt"] = learnt
        if isinstance(source, Candidates):
            rows = [source[max(int(row), 0)] for row in group.rows]
            for name in ("at", "candidates", "label", "test"):
                arrays[name] = np.asarray([row[name] for row in rows], np.int32)
            arrays["at"][group.rows == FILLER] = 1  # a filler may be shorter
        return arrays


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """Splits of records, tokenised.

    Attributes:
      name: name of the data in tables.
      names: names of the sets of records, by number.
      train, validation, test: the splits.
      tests: names of the sets that are tested.
      majority: share of the most frequent answer, by test.
      fingerprint: fingerprints of the splits.
      notes: remarks for the user on how they were read.
    """

    name: str
    names: tuple[str, ...]
    train: Examples
    validation: Candidates
    test: Candidates
    tests: tuple[str, ...]
    majority: Mapping[str, float]
    fingerprint: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def full(self) -> Source:
        """Examples of training and validation."""
        return Joined(self.train, self.validation)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records become examples.

    Attributes:
      template: what stands around a record.
      learnt: tokens that the loss is on.
      cutoff: most tokens of a training example.
      overlong: what becomes of longer ones.
      validation: number of training records that are held out; at most a fifth.
      limit: most questions of a test; None for all.
      tests: sets to test; all for none.
    """

    template: Template
    learnt: Learnt = "answer"
    cutoff: int = 256
    overlong: Overlong = "leave_out"
    validation: int = 300
    limit: int | None = None
    tests: tuple[str, ...] = ()


def load(path: Path, encoder: Encoder, reading: Reading) -> Questions:
    """Reads a file, a fifth of which is held out, or a folder of sets.

    Validation and the questions of a test that `limit` keeps are drawn with a seed of
    their own: they are the same in every run on the same records.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: a record is malformed, has no candidates or candidates that begin
        alike and never differ, or there is nothing to train on or to test; names it.
    """
    sets = _sets(path)
    unknown = [name for name in reading.tests if "test" not in sets.get(name, {})]
    if unknown:
        known = [name for name, splits in sets.items() if "test" in splits]
        raise ValueError(
            f"tests={reading.tests}: {path} has no test of {', '.join(unknown)}; it "
            f"has {', '.join(known)}."
        )
    names = tuple(sets)
    asked = {
        split: [
            Asked(record, number, f"{path}, {name}, {split} record {row}")
            for number, name in enumerate(names)
            for row, record in enumerate(sets[name].get(split, ()), start=1)
        ]
        for split in ("train", "test")
    }
    if not asked["train"] or not asked["test"]:
        raise ValueError(f"{path}: expected records to train on and to test.")
    train, validation = _held_out(asked["train"], reading.validation)
    test = _limited(asked["test"], names, reading)
    learnt = tokenised(
        [own.record for own in train],
        encoder,
        reading.template,
        cutoff=reading.cutoff,
        learnt=reading.learnt,
        overlong=reading.overlong,
    )
    if not len(learnt.examples):
        raise ValueError(
            f"{path}: every training record has more than {reading.cutoff} tokens. "
            "Expected a larger --cutoff."
        )
    splits = {"train": train, "validation": validation, "test": test}
    tested = {own.test for own in test}
    tests = tuple(name for number, name in enumerate(names) if number in tested)
    return Questions(
        name=stem(path),
        names=names,
        train=learnt.examples,
        validation=_candidates(validation, encoder, reading),
        test=_candidates(test, encoder, reading),
        tests=tests,
        majority={name: _majority(test, names.index(name)) for name in tests},
        fingerprint={split: _fingerprint(own) for split, own in splits.items()},
        notes=_notes(learnt),
    )


def _sets(path: Path) -> dict[str, dict[str, list[Record]]]:
    if path.is_dir():
        return records.read_folder(path)
    found = records.read(path)
    count = round(SHARE * len(found))
    if not 1 <= count < len(found) - 1:
        raise ValueError(
            f"{path} has {len(found)} records: expected three or more, a fifth of "
            "which are held out as the test."
        )
    test = _drawn([_question(own) for own in found], count)
    rows = range(len(found))
    split = {
        "test": [found[row] for row in rows if row in test],
        "train": [found[row] for row in rows if row not in test],
    }
    if not split["train"]:
        raise ValueError(f"{path}: every record has one question.")
    return {stem(path): split}


def _question(record: Record) -> tuple[str, str]:
    return record.instruction, record.input


def _drawn(questions: list[tuple[str, str]], count: int) -> set[int]:
    """Draws rows to hold out, so many or a few more: a question is never in both parts.

    >>> sorted(_drawn([("a", ""), ("b", ""), ("a", ""), ("c", "")], 2))
    [0, 2, 3]
    """
    rows: dict[tuple[str, str], list[int]] = {}
    for row, question in enumerate(questions):
        rows.setdefault(question, []).append(row)
    alike, held = list(rows.values()), set()
    for place in np.random.default_rng(SEED).permutation(len(alike)):
        if len(held) >= count:
            break
        held.update(alike[place])
    return held


def _held_out(asked: list[Asked], count: int) -> tuple[list[Asked], list[Asked]]:
    """Returns records to train on, and some of them to validate with."""
    count = min(count, max(1, round(SHARE * len(asked))))
    chosen = _drawn([_question(own.record) for own in asked], count)
    train = [own for row, own in enumerate(asked) if row not in chosen]
    return train, [asked[row] for row in sorted(chosen)]


def _limited(
    asked: list[Asked], names: tuple[str, ...], reading: Reading
) -> list[Asked]:
    """Returns the records of the tests, at most `limit` of each."""
    found = []
    for number, name in enumerate(names):
        own = [x for x in asked if x.test == number]
        if reading.tests and name not in reading.tests:
            continue
        if reading.limit is not None and reading.limit < len(own):
            rows = np.random.default_rng(SEED).permutation(len(own))[: reading.limit]
            own = [own[row] for row in sorted(rows)]
        found += own
    return found


def _candidates(
    asked: Sequence[Asked], encoder: Encoder, reading: Reading
) -> Candidates:
    """Returns whole questions, however long, with what their answers differ in."""
    taken = [own.record for own in asked]
    limit = np.iinfo(np.int32).max
    whole = tokenised(
        taken, encoder, reading.template, cutoff=limit, learnt=reading.learnt
    )
    found = [candidates(own, encoder, reading.template) for own in asked]
    most = max(len(tokens) for _, tokens, _ in found)
    padded = np.full((len(found), most), -1, np.int32)
    for row, (_, tokens, _) in zip(padded, found, strict=True):
        row[: len(tokens)] = tokens
    return Candidates(
        examples=whole.examples,
        asked=asked,
        at=np.asarray([at for at, _, _ in found], np.int32),
        tokens=padded,
        labels=np.asarray([label for _, _, label in found], np.int32),
    )


def candidates(
    asked: Asked, encoder: Encoder, template: Template
) -> tuple[int, list[int], int]:
    """Returns where a record's answers differ, their tokens there, and the right one.

    Raises:
      ValueError: there are no candidates, or two have the same token at the first place
        at which any differ; names the record.
    """
    record = asked.record
    names = choices.labels(record)
    if names is None:
        raise ValueError(
            f"{asked.where}: expected an instruction that ends with `Answer format: "
            f"a/b`, with the answer {record.answer!r} among them."
        )
    head, found, tail = record.output.rpartition(record.answer)
    if not found:
        raise ValueError(
            f"{asked.where}: its output {record.output!r} is without its answer "
            f"{record.answer!r}."
        )
    written = [dataclasses.replace(record, output=head + n + tail) for n in names]
    rows = [[*encoder.encode(template.whole(r)), encoder.eos] for r in written]
    at = next(n for n, own in enumerate(zip(*rows, strict=False)) if len(set(own)) > 1)
    tokens = [row[at] for row in rows]
    if len(set(tokens)) < len(tokens):
        raise ValueError(
            f"{asked.where}: the answers {', '.join(names)} do not differ pairwise in "
            "the first token in which any of them do, by which they are scored."
        )
    return at, tokens, names.index(record.answer)


def _majority(asked: Sequence[Asked], test: int) -> float:
    counts = Counter(own.record.answer for own in asked if own.test == test)
    return max(counts.values()) / counts.total()


def _fingerprint(asked: Sequence[Asked]) -> dict[str, Any]:
    hashed = [
        hashlib.sha256(repr((own.test, own.record)).encode()).digest() for own in asked
    ]
    return fingerprint.of_split(hashed, "questions")


def _notes(learnt: Tokenised) -> tuple[str, ...]:
    return (learnt.report(),) if learnt.left_out or learnt.cut else ()
