"""CSV files: names of classes, and rows of one file."""

import csv
from collections import Counter

import numpy as np
import pytest

from experiments.data import folders


def written(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return path


def rows_of(source):
    """Files and labels, of a source of files or of rows of one."""
    rows = getattr(source, "rows", np.arange(len(source)))
    files = getattr(source, "source", source)
    return [(files.paths[row], int(files.labels[row])) for row in rows]


@pytest.mark.parametrize(
    "names",
    [
        ("cat", "nan"),
        ("NA", "NaN", "None", "null"),
        ("inf", "infinity", "nan"),
        ("1_0", "dog"),
        ("00", "01", "02"),
        ("01", "10", "9"),
        ("-", "true"),
    ],
)
def test_names_that_look_like_something_else(tmp_path, names):
    rows = [(f"{i}.png", name, "train") for i, name in enumerate(names)]
    rows += [(f"t{i}.png", name, "test") for i, name in enumerate(names)]
    task = folders.load(
        written(tmp_path / "t.csv", [*rows, ("v.png", names[1], "val")])
    )
    assert (task.names, task.classes) == (names, len(names))
    assert task.test.labels.tolist() == list(range(len(names)))
    assert task.validation.labels.tolist() == [1]


def test_plain_numbers_are_labels(tmp_path):
    rows = [(f"{i}.png", i, "train") for i in (10, 2, 0)]
    rows += [("v.png", 2, "val"), ("t.png", 12, "test")]
    task = folders.load(written(tmp_path / "t.csv", rows))
    assert task.train.labels.tolist() == [10, 2, 0]
    assert (task.names, task.classes) == ((), 13)


def test_one_number_in_two_spellings(tmp_path):
    rows = [("0.png", "1", "train"), ("1.png", "01", "train"), ("2.png", "0", "test")]
    with pytest.raises(ValueError, match=r"t\.csv: '01' and '1' are one number"):
        folders.load(written(tmp_path / "t.csv", rows))


def test_a_missing_number_is_no_name(tmp_path):
    rows = [("0.png", "0", "train"), ("1.png", "nan", "train"), ("2.png", "1", "test")]
    with pytest.raises(ValueError, match="line 3: label 'nan' among numbers"):
        folders.load(written(tmp_path / "t.csv", rows))


def test_rows_of_one_file_stay_together(tmp_path):
    """However the file is called: a tenth of the files is held out, with all rows."""
    (tmp_path / "x").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "x/3.png")
    (tmp_path / "linked").symlink_to(tmp_path / "x")
    spellings = ("x/3.png", "./x/3.png", "x/../x/3.png", "linked/3.png", "link.png")
    spellings += (f"{tmp_path}/x/3.png",)
    rows = [(f"x/{i}.png", "ab"[i % 2], "train") for i in range(30) if i != 3]
    rows += [(name, "a", "train") for name in spellings * 50]
    path = written(tmp_path / "t.csv", [*rows, ("x/t.png", "a", "test")])
    task = folders.load(path)
    train, validation = (
        Counter(file.resolve().name for file, _ in rows_of(part))
        for part in (task.train, task.validation)
    )
    assert len(validation) == 3 and len(train) == 27
    assert not train.keys() & validation.keys()
    assert (train + validation)["3.png"] == 300
    assert set((train + validation).values()) == {1, 300}
    again = folders.load(path)
    assert rows_of(again.validation) == rows_of(task.validation)


def test_what_is_held_out_of_files_that_are_listed_once_is_as_ever(tmp_path):
    rows = [(f"{i}.png", "ab"[i % 2], "train") for i in range(20)]
    task = folders.load(written(tmp_path / "t.csv", [*rows, ("t.png", "a", "test")]))
    assert task.validation.rows.tolist() == [4, 19]
    expected = np.random.default_rng(0).permutation(20)[2:]
    assert task.train.rows.tolist() == expected.tolist()


def test_one_file_cannot_be_held_out(tmp_path):
    rows = [("a.png", "a", "train"), ("./a.png", "a", "train"), ("t.png", "b", "test")]
    with pytest.raises(ValueError, match=r"has 1 image to train on and no validation"):
        folders.load(written(tmp_path / "t.csv", rows))


def test_a_file_in_two_splits_by_another_path(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").symlink_to("a.png")
    rows = [("a.png", "a", "train"), ("v.png", "a", "val"), ("b.png", "b", "test")]
    with pytest.raises(
        ValueError, match=r"b\.png, which is .*a\.png, is in two splits"
    ):
        folders.load(written(tmp_path / "t.csv", rows))


def test_a_file_with_two_labels_is_said(tmp_path):
    rows = [("a.png", "a", "train"), ("a.png", "b", "train"), ("v.png", "a", "val")]
    task = folders.load(written(tmp_path / "t.csv", [*rows, ("t.png", "b", "test")]))
    where = tmp_path.resolve()
    assert task.notes == (
        f"{tmp_path / 't.csv'}: 1 files have several labels, first {where / 'a.png'}",
    )
