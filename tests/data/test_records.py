"""Records, their templates, choices and tokens."""

import json

import numpy as np
import pytest
from words import Words

from experiments.data import choices, records
from experiments.data.prompts import TEMPLATES
from experiments.data.records import Record
from experiments.data.tokens import tokenised

FIRST = {
    "instruction": "Which is a fruit?\n\nAnswer1: a brick Answer2: a pear\n\n"
    "Answer format: answer1/answer2",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}
SECOND = {**FIRST, "instruction": "Is tea wet?\n\nAnswer format: true/false"}
SECOND |= {"input": "Ein Glas Tee, heiß", "answer": "true", "output": "it is true"}
PLAIN, ADAPTERS = TEMPLATES["plain"], TEMPLATES["llm_adapters"]


def written(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        lines = [json.dumps(value) for value in values]
        text = "\n".join([lines[0], "", *lines[1:]])
    else:
        text = json.dumps(values, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl"])
def test_files(name, tmp_path):
    values = [FIRST, {**SECOND, "more": 1}]
    found = records.read(written(tmp_path / name, values))
    assert found == [Record(**FIRST), Record(**SECOND)]


def test_folders(tmp_path):
    written(tmp_path / "boolq" / "train.json", [SECOND])
    written(tmp_path / "boolq" / "test.json", [SECOND, FIRST])
    written(tmp_path / "arc" / "test.jsonl", [FIRST])
    written(tmp_path / "arc" / "notes.json", [1])
    found = records.read_folder(tmp_path)
    assert list(found) == ["arc", "boolq"]
    assert found["arc"] == {"test": [Record(**FIRST)]}
    counts = {split: len(some) for split, some in found["boolq"].items()}
    assert counts == {"test": 2, "train": 1}
    written(tmp_path / "arc" / "test.json", [FIRST])
    with pytest.raises(ValueError, match="arc has two files for test"):
        records.read_folder(tmp_path)


def without(name):
    return {key: value for key, value in FIRST.items() if key != name}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[", r"a\.json cannot be read: .*line 1"),
        ("a.json", "{}", r"a\.json cannot be read: expected a list of records"),
        ("a.json", "[]", r"a\.json has no records"),
        ("a.jsonl", "", r"a\.jsonl has no records"),
        ("a.json", [FIRST, 3], r"a\.json, record 2: int, expected an object with the"),
        (
            "a.json",
            [FIRST, without("input")],
            r"record 2: the field 'input' is missing",
        ),
        ("a.json", [{**FIRST, "answer": 2}], "record 1: answer=2, expected a text"),
        (
            "a.json",
            [{**FIRST, "output": " \n"}],
            "record 1: the field 'output' is empt",
        ),
        ("a.jsonl", "\n\n{", r"a\.jsonl, line 3 is no JSON"),
        ("a.txt", "x", r"a\.txt: expected a file in \.json or \.jsonl"),
    ],
)
def test_what_is_no_record(name, text, message, tmp_path):
    path = tmp_path / name
    whole = text if isinstance(text, str) else json.dumps(text)
    path.write_text(whole, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        records.read(path)


def test_other_encodings_and_nothing(tmp_path):
    (tmp_path / "a.json").write_bytes(json.dumps([SECOND]).encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.json cannot be read: .*codec"):
        records.read(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="There are no records at"):
        records.read(tmp_path / "b.json")
    with pytest.raises(
        FileNotFoundError, match=r"expected NAME/train\.json or NAME/te"
    ):
        records.read_folder(tmp_path)


def test_plain_ends_without_white_space():
    """And is what is trained on, to the output."""
    for record in (Record(**FIRST), Record(**SECOND)):
        asked = PLAIN.asked(record)
        assert asked == PLAIN.taught(record) == asked.rstrip()
        assert PLAIN.whole(record) == f"{asked} {record.output}"
    assert PLAIN.asked(Record("a", "b", "c", "d")) == "a\n\nb\n\nResponse:"


def test_llm_adapters_to_the_space():
    """The texts of DoRA's fine-tuning and of its evaluation."""
    s = " " * 16
    record = Record("Which?\n\nAnswer format: a/b", "", "the correct answer is a", "a")
    task = "Below is an instruction that describes a task"
    write = "Write a response that appropriately completes the request."
    asked = f"\n\n{s}### Instruction:\n{s}Which?\n\nAnswer format: a/b"
    assert ADAPTERS.whole(record) == (
        f"{task}. {write}  {asked}\n{s}\n{s}### Response:\n{s}the correct answer is a"
    )
    assert ADAPTERS.asked(record) == f"{task}. {write} {asked}\n\n{s}### Response:\n{s}"
    record = Record(
        "Which?\n\nAnswer format: a/b", "one", "the correct answer is a", "a"
    )
    more = f"{task}, paired with an input that provides further context"
    assert ADAPTERS.whole(record) == (
        f"{more}. {write} {asked}\n{s}\n{s}### Input:\n{s}one"
        f"\n{s}\n{s}### Response:\n{s}the correct answer is a"
    )
    assert ADAPTERS.asked(record) == (
        f"{more}. {write}{asked}\n\n{s}### Input:\n{s}one\n\n{s}### Response:\n{s}"
    )


def made(record, template=PLAIN, **options):
    encoder = Words()
    options = {"cutoff": 1000, **options}
    found = tokenised([Record(**record)], encoder, template, **options)
    (example,) = (found.examples[i] for i in range(len(found.examples)))
    tokens, loss = example["tokens"], example["loss"]
    assert (tokens.dtype, loss.dtype) == (np.int32, bool)
    return encoder, tokens, loss


def test_the_answer_and_the_end_are_learnt():
    encoder, tokens, loss = made(FIRST)
    assert encoder.decode(tokens) == PLAIN.whole(Record(**FIRST))
    assert encoder.decode(tokens[loss]) == " the correct answer is answer2"
    assert (tokens[0], tokens[-1]) == (1, 2) and loss[-1]
    _, same, loss = made(FIRST, learnt="all")
    np.testing.assert_array_equal(same, tokens)
    assert loss.tolist() == [False] + [True] * (len(tokens) - 1)


def test_llm_adapters_in_tokens():
    """Training sees 15 spaces and " the", but a test ends in 16 spaces."""
    encoder, tokens, loss = made(FIRST, ADAPTERS)
    first = np.flatnonzero(loss)[0]
    known = {number: word for word, number in encoder.known.items()}
    assert known[tokens[first - 1]] == "\n" + " " * 15  # within the prompt, as there
    assert known[tokens[first]] == " the"
    asked = encoder.encode(ADAPTERS.asked(Record(**FIRST)))
    assert encoder.decode(asked)[-17:] == "\n" + " " * 16
    assert asked[-1] not in tokens


def test_what_is_too_long_is_counted():
    """Left out whole, never cut, but where DoRA's way is asked for by name."""
    long = {**FIRST, "instruction": "word " * 60 + FIRST["instruction"]}
    some = [Record(**values) for values in (FIRST, long, SECOND)]
    encoder = Words()
    sizes = [len(encoder.encode(PLAIN.whole(record))) + 1 for record in some]
    assert sizes[1] > 60 > max(sizes[0], sizes[2])
    found = tokenised(some, encoder, PLAIN, cutoff=60)
    assert (found.left_out, found.cut, found.examples.rows) == (1, 0, [0, 2])
    assert found.report() == "1 of 3 records have more than 60 tokens and are left out."
    fits = tokenised(some, encoder, PLAIN, cutoff=sizes[1])
    assert (fits.left_out, len(fits.examples)) == (0, 3)
    assert tokenised(some, encoder, PLAIN, cutoff=sizes[1] - 1).left_out == 1


def test_dora_cuts_the_answer():
    """As `tokenize` there: at most `cutoff` ids, the end only where there is room."""
    long = {**FIRST, "instruction": "word " * 60 + FIRST["instruction"]}
    some = [Record(**values) for values in (FIRST, long)]
    encoder = Words()
    for cutoff in (
        len(encoder.encode(ADAPTERS.whole(some[1]))) + extra for extra in (-3, 0, 1)
    ):
        options = {"cutoff": cutoff, "learnt": "all", "overlong": "cut"}
        found = tokenised(some, encoder, ADAPTERS, **options)
        for record, tokens in zip(some, found.examples.tokens, strict=True):
            ids = encoder.encode(ADAPTERS.whole(record))
            cut = ids[:cutoff]
            if len(cut) < cutoff:
                cut.append(encoder.eos)
            assert tokens.tolist() == cut
        assert found.cut == (cutoff < len(ids)) and found.left_out == 0
    assert (
        "1 of 2 records have more than"
        in tokenised(some, encoder, ADAPTERS, cutoff=60, overlong="cut").report()
    )
    with pytest.raises(ValueError, match="overlong=cut: it is the llm_adapters templa"):
        tokenised(some, encoder, PLAIN, cutoff=60, overlong="cut")


def test_a_prompt_has_the_same_tokens_before_an_answer():
    class Joined(Words):
        def encode(self, text, bos=None):
            return super().encode(text.replace(": the", ":the"), bos)

    with pytest.raises(ValueError, match=r"prompt '.*Response:' are others where 'the"):
        tokenised([Record(**FIRST)], Joined(), PLAIN, cutoff=100)


def asking(text, answer="answer1"):
    return Record(text, "", f"the correct answer is {answer}", answer)


CHOICES = {
    "line": (
        "Which?\n\nAnswer1: a b. Answer2: c? Answer3: d\n\n"
        "Answer format: answer1/answer2/answer3",
        ("a b.", "c?", "d"),
    ),
    "paragraphs": (
        "How?\n\nSolution1: cut: twice\n\nSolution2: no\n\n"
        "Answer format: solution1/solution2",
        ("cut: twice", "no"),
    ),
    "same line": (
        "_ is.\n\nOption1: Ann Option2: Bo Answer format: option1/option2",
        ("Ann", "Bo"),
    ),
    "endings": (
        "Sit: She\n\nEnding1: [a] Ending2: b\n\nAnswer format: ending1/ending2\n",
        ("[a]", "b"),
    ),
    "words": ("Is it?\n\nAnswer format: true/false", ("true", "false")),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    text, expected = CHOICES[name]
    names = text.rsplit("format: ", 1)[1].strip().split("/")
    for answer in names:
        assert choices.labels(asking(text, answer)) == tuple(names)
        assert choices.texts(asking(text, answer)) == expected


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("Which? Answer1: a Answer2: b", None),
        ("Which?\n\nAnswer format: answer1", None),
        ("Which?\n\nAnswer format: answer1/answer1", None),
        ("Which?\n\nAnswer format: answer1//answer2", None),
        ("Which?\n\nAnswer format: answer2/answer3", None),  # answer1 is right
        ("Answer format: answer1/answer2\n\nWhich?", None),
        ("Which? Answer1: a\n\nAnswer format: answer1/answer2", 2),
        ("Which? Answer1: a Answer2:\n\nAnswer format: answer1/answer2", 2),
        ("Which? Answer2: a Answer1: b\n\nAnswer format: answer1/answer2", 2),
        ("Answer1: what? Answer1: a Answer2: b\n\nAnswer format: answer1/answer2", 2),
    ],
)
def test_what_does_not_parse(text, labels):
    record = asking(text)
    assert choices.labels(record) == (labels and ("answer1", "answer2"))
    assert choices.texts(record) is None
