"""Lists of files: VTAB-1k folders as NOAH's and VPT's writers leave them; others."""

import numpy as np
import pytest
from PIL import Image

from experiments.data import folders
from experiments.tasks import catalogue

SPLITS = {"train800": 7, "val200": 4, "test": 5}


def written(folder, sizes=SPLITS, classes=3):
    """Every list has images of its own, numbered from 0; returns the labels of each.

    `train800val200` has copies of the images of its parts, in another order.
    """
    images, labels = {}, {}
    for number, (name, size) in enumerate(sizes.items()):
        rows = np.arange(size)
        labels[name] = (rows + number) % classes
        images[name] = np.stack([rows, 0 * rows + number, labels[name]], 1)
    order = np.random.default_rng(0).permutation(sizes["train800"] + sizes["val200"])
    for kept in (images, labels):
        both = np.concatenate([kept["train800"], kept["val200"]])
        kept["train800val200"] = both[order]
    for name, colours in images.items():
        place = folder / "images" / name
        place.mkdir(parents=True)
        lines = []
        for i, (colour, label) in enumerate(zip(colours, labels[name], strict=True)):
            pixels = np.full((5, 4, 3), colour, np.uint8)
            Image.fromarray(pixels).save(place / f"{i:06d}.png")
            lines.append(f"images/{name}/{i:06d}.png {label}\n")
        (folder / f"{name}.txt").write_text("".join(lines), "utf-8")
    return labels


def colours(source):
    return [source[i]["image"][0, 0].tolist() for i in range(len(source))]


def labels_of(source):
    return [source[i]["label"] for i in range(len(source))]


def test_every_list_has_its_own_copies(tmp_path):
    labels = written(tmp_path / "dtd")
    task = folders.load(tmp_path / "dtd")
    parts = {"train800": task.train, "val200": task.validation, "test": task.test}
    for number, (name, source) in enumerate(parts.items()):
        assert labels_of(source) == labels[name].tolist()
        rows = enumerate(labels[name].tolist())
        assert colours(source) == [[i, number, label] for i, label in rows]
    assert task.classes == 3 and len(task.full) == 11 and not task.notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], "10 images, expected 11"),
        (lambda lines: [*lines, lines[0]], "12 images, expected 11"),
        (
            lambda lines: [line[:-1] + "2" for line in lines],
            "0 images of label 0, expected 4",
        ),
        (
            lambda lines: [lines[0][:-1] + "9", *lines[1:]],
            r"\d images of label \d, expected \d",
        ),
    ],
)
def test_a_list_of_both_that_contradicts_its_parts(tmp_path, change, message):
    written(tmp_path)
    path = tmp_path / "train800val200.txt"
    path.write_text("\n".join(change(path.read_text("utf-8").splitlines())), "utf-8")
    with pytest.raises(ValueError, match=rf"train800val200\.txt does not.*{message}"):
        folders.load(tmp_path)


def test_a_list_of_both_may_be_absent_or_alone(tmp_path):
    labels = written(tmp_path)
    whole = (tmp_path / "train800val200.txt").read_text("utf-8")
    (tmp_path / "train800val200.txt").unlink()
    assert labels_of(folders.load(tmp_path).train) == labels["train800"].tolist()
    (tmp_path / "train800val200.txt").write_text(whole, "utf-8")
    (tmp_path / "train800.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"train800\.txt is missing: expected"):
        folders.load(tmp_path)
    (tmp_path / "val200.txt").unlink()
    task = folders.load(tmp_path)  # 11 images, of which a fifth
    both = labels["train800val200"].tolist()
    assert labels_of(task.train) == both[:-2]
    assert labels_of(task.validation) == both[-2:]
    (tmp_path / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.txt is missing"):
        folders.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffa b/1.png 0\r\n\r\n c.png  3\r\n",
        "a b/1.png\t0\n\n\nc.png\t3",
        "{folder}/a b/1.png 0\n{folder}/c.png 3\n",
        "a b/1.png 0\rc.png 3\r",
    ],
    ids=["windows", "tabs", "absolute", "mac"],
)
def test_spellings_of_lines(tmp_path, text):
    for name in ("train.txt", "val.txt", "test.txt"):
        lines = text.format(folder=tmp_path).replace("1.png", f"{name}.png")
        lines = lines.replace("c.png", f"{name}  c\u2028.png")
        (tmp_path / name).write_bytes(lines.encode())
    task = folders.load(tmp_path)
    expected = [tmp_path / "a b/train.txt.png", tmp_path / "train.txt  c\u2028.png"]
    assert list(task.train.paths) == expected
    assert task.train.labels.tolist() == [0, 3]  # 1 and 2 may be of other lists
    assert task.classes == 4


@pytest.mark.parametrize(
    "task, shared", [("cifar100", "cifar"), ("kitti_dist", "kitti")]
)
def test_folders_of_the_field_have_names_of_their_own(tmp_path, task, shared):
    classes = catalogue.ENTRIES[task].classes
    for name, count in (("train800", 800), ("val200", 200), ("test", 100)):
        lines = [f"images/{name}/{i}.jpg {i % classes}" for i in range(count)]
        (tmp_path / shared).mkdir(exist_ok=True)
        (tmp_path / shared / f"{name}.txt").write_text("\n".join(lines), "utf-8")
    found = catalogue.load(task, tmp_path)
    assert (found.name, found.classes, len(found.full)) == (task, classes, 1000)
    assert found.notes == (
        f"{task}: read from the folder {tmp_path / shared}, not from TFDS",
    )
