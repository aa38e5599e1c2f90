"""Splits of questions: those that are asked twice are in one part."""

import json

import pytest

from experiments.data import questions, records


def record(question, answer="true"):
    return {"instruction": question, "input": "", "output": answer, "answer": answer}


def written(path, found):
    path.write_text(json.dumps(found), "utf-8")
    return path


def test_a_question_is_never_in_both_parts_of_a_file(tmp_path):
    """Of 40 questions that are asked twice, a fifth is the test, both times."""
    path = written(tmp_path / "mine.json", [record(f"q{i % 40}") for i in range(80)])
    (split,) = questions._sets(path).values()
    train, test = ([own.instruction for own in split[n]] for n in ("train", "test"))
    assert len(test) == 16 and len(set(test)) == 8 and not set(test) & set(train)


def test_nor_in_training_and_validation():
    asked = [
        questions.Asked(records.Record(f"q{i // 2}", "", "true", "true"), 0, "")
        for i in range(40)
    ]
    train, validation = questions._held_out(asked, 5)
    held = {own.record.instruction for own in validation}
    assert len(validation) == 6 and len(held) == 3
    assert not held & {own.record.instruction for own in train}


def test_one_question_cannot_be_split(tmp_path):
    path = written(tmp_path / "mine.json", [record("q")] * 10)
    with pytest.raises(ValueError, match="every record has one question"):
        questions._sets(path)
