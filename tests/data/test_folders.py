"""Folders, archives and CSV files; checking every example; contact sheets; own sets."""

import csv
import io
import pickle

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.io import savemat

from experiments.data import check, folders, source
from experiments.data.source import Arrays, CorruptImageError
from experiments.data.task import Task
from experiments.tasks import catalogue, show


def picture(path, colour=(200, 10, 10), size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).save(path)


def examples(part):
    return [part[i] for i in range(len(part))]


def labels(part):
    return [example["label"] for example in examples(part)]


def write_lists(folder, name="cifar100", classes=3):
    for part, count in (("train800", 6), ("val200", 3), ("test", 5)):
        lines = []
        for i in range(count):
            file = f"images/{part}/{i}.png"
            picture(folder / name / file, (i, 0, 0))
            lines.append(f"{file} {i % classes}")
        (folder / name / f"{part}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / name


def test_lists_of_the_peft_papers(tmp_path):
    task = folders.load(write_lists(tmp_path))
    assert (task.name, task.classes) == ("cifar100", 3)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [6, 3, 5]
    assert labels(task.train) == [0, 1, 2, 0, 1, 2]
    image = task.train[4]["image"]
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8
    assert image[0, 0].tolist() == [4, 0, 0]


def test_a_folder_of_the_tasks_name_goes_before_tfds(tmp_path):
    write_lists(tmp_path, "dtd", classes=47)
    with pytest.raises(ValueError, match="has 6 classes, expected 47"):
        catalogue.load("dtd", tmp_path)
    folder = write_lists(tmp_path, "patch_camelyon", classes=2)
    with pytest.raises(ValueError, match="6 images to train and 3 to validate"):
        catalogue.load("patch_camelyon", tmp_path)
    assert catalogue.load(str(tmp_path / "dtd")).classes == 6
    for part, count in (("train800", 800), ("val200", 200)):
        lines = [f"images/{part}/{i}.png {i % 2}" for i in range(count)]
        (folder / f"{part}.txt").write_text("\r\n".join(lines), "utf-8")
    task = catalogue.load("patch_camelyon", tmp_path)
    assert task.name == "patch_camelyon" and len(task.full) == 1000


def test_one_list_of_both_is_cut_and_must_not_contradict(tmp_path):
    lines = [f"images/{i}.png {i % 3}" for i in range(1000)]
    (tmp_path / "train800val200.txt").write_text("\ufeff" + "\n".join(lines), "utf-8")
    (tmp_path / "test.txt").write_text("images/x.png 2\n", "utf-8")
    task = folders.load(tmp_path)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [800, 200, 1]
    assert task.train.paths[0] == tmp_path / "images/0.png"
    assert task.validation.paths[0] == tmp_path / "images/800.png"
    (tmp_path / "train800.txt").write_text("\n".join(lines[:800]), "utf-8")
    (tmp_path / "val200.txt").write_text("\n".join(lines[800:999]), "utf-8")
    with pytest.raises(ValueError, match="does not list what"):
        folders.load(tmp_path)


def test_a_file_in_two_splits(tmp_path):
    folder = write_lists(tmp_path)
    with (folder / "test.txt").open("a", encoding="utf-8") as file:
        file.write("images/train800/3.png 0\n")
    with pytest.raises(ValueError, match=r"train800/3\.png is in two splits"):
        folders.load(folder)


def test_class_folders(tmp_path):
    for part, count in (("train", 20), ("test", 2)):
        for name in ("cat", "ant", "dog"):
            for i in range(count):
                picture(tmp_path / part / name / f"{i:02}.PNG", (i, 1, 2))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image", "utf-8")
    task = folders.load(tmp_path, "animals")
    assert task.names == ("ant", "cat", "dog")
    assert [len(s) for s in (task.train, task.validation, task.test)] == [54, 6, 6]
    assert labels(task.test) == [0, 0, 1, 1, 2, 2]
    picture(tmp_path / "valid" / "dog" / "0.jpg")
    picture(tmp_path / "train" / ".ipynb_checkpoints" / "0.jpg")
    picture(tmp_path / "train" / "ant" / "._0.jpg")
    task = folders.load(tmp_path)
    assert labels(task.validation) == [2] and len(task.train) == 60
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="has both val and valid"):
        folders.load(tmp_path)
    (tmp_path / "val").rmdir()
    picture(tmp_path / "test" / "emu" / "0.jpg")
    with pytest.raises(ValueError, match=r"classes that train/ has not: \['emu'\]"):
        folders.load(tmp_path)


def write_cub(folder):
    """NABirds' layout: hexadecimal image ids, class ids with gaps."""
    rows = {"0a-1": ("0817/a.png", "817", "1"), "0a-2": ("0295/b.png", "295", "1")}
    rows["0b-1"] = ("0817/c.png", "817", "0")
    tables = {"images.txt": 0, "image_class_labels.txt": 1, "train_test_split.txt": 2}
    for number, (file, _, _) in enumerate(rows.values()):
        picture(folder / "images" / file, (number, 0, 0))
    for name, column in tables.items():
        lines = [f"{image} {row[column]}" for image, row in rows.items()]
        (folder / name).write_text("\n".join(lines), "utf-8")
    (folder / "classes.txt").write_text(
        "295 Some Bird (Adult)\n817 Other Bird\n9 None", "utf-8"
    )
    return folder


def test_archives_of_cub_and_nabirds(tmp_path):
    task = folders.load(write_cub(tmp_path / "nabirds"))
    assert task.classes == 2 and task.names == ("Some Bird (Adult)", "Other Bird")
    assert sorted(labels(task.train) + labels(task.validation)) == [0, 1]
    assert labels(task.test) == [1]
    assert task.test[0]["image"][0, 0, 0] == 2
    with pytest.raises(ValueError, match="has 2 classes, expected 555"):
        catalogue.load("nabirds", tmp_path)
    split = tmp_path / "nabirds" / "train_test_split.txt"
    split.write_text(split.read_text("utf-8").replace("0a-1 1", "0a-1 2"), "utf-8")
    with pytest.raises(ValueError, match=r"split\.txt: '2', expected 0 or 1"):
        folders.load(tmp_path / "nabirds")
    split.write_text("0a-1 1\n", "utf-8")
    with pytest.raises(ValueError, match="do not list the same images"):
        folders.load(tmp_path / "nabirds")


def test_archive_of_stanford_cars(tmp_path):
    kinds = [("bbox_x1", "u1"), ("class", "u1"), ("fname", "O")]
    for part, table in (
        ("cars_train", "devkit/cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels.mat"),
    ):
        rows = [(3, 1 + i % 4, f"{i:05}.jpg") for i in range(20)]
        (tmp_path / table).parent.mkdir(exist_ok=True)
        savemat(tmp_path / table, {"annotations": np.array(rows, kinds)})
        for i in range(20):
            picture(tmp_path / part / f"{i:05}.jpg", (10 * i, 0, 0))
    names = np.array(["AM General Hummer", "Acura RL", "Acura TL", "Audi TT"], object)
    savemat(tmp_path / "devkit" / "cars_meta.mat", {"class_names": names})
    task = folders.load(tmp_path, "cars")
    assert task.names[1] == "Acura RL" and task.classes == 4
    assert [len(s) for s in (task.train, task.validation, task.test)] == [18, 2, 20]
    assert labels(task.test)[:5] == [0, 1, 2, 3, 0]
    (tmp_path / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(FileNotFoundError, match="cars_test_annos_withlabels"):
        folders.load(tmp_path)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        writer.writerows(rows)
    return path


def test_csv(tmp_path):
    rows = [(f"x/{i}.png", ("b", "a")[i % 2], "train") for i in range(10)]
    rows += [("x/10.png", "a", "test"), ("x/11.png", "b ", "val")]
    for i in range(12):
        picture(tmp_path / f"x/{i}.png", (i, i, i))
    task = folders.load(write_csv(tmp_path / "mine.csv", rows))
    assert (task.name, task.names) == ("mine", ("a", "b"))
    assert (labels(task.train), labels(task.validation)) == ([1, 0] * 5, [1])
    numbered = [(path, "2", split) for path, _, split in rows]
    task = folders.load(write_csv(tmp_path / "numbers.csv", numbered))
    assert task.classes == 3 and not task.names
    rows[3] = ("x/3.png", "a", "dev")
    with pytest.raises(ValueError, match=r"bad\.csv, line 5: split 'dev'"):
        folders.load(write_csv(tmp_path / "bad.csv", rows))
    (tmp_path / "none.csv").write_text("file,class\nx,1\n", "utf-8")
    with pytest.raises(ValueError, match="expected a header with path, label, split"):
        folders.load(tmp_path / "none.csv")
    (tmp_path / "none.csv").write_bytes(b"path,label,split\n\xff,1,test\n")
    with pytest.raises(ValueError, match="no CSV file in UTF-8"):
        folders.load(tmp_path / "none.csv")
    excel = (tmp_path / "mine.csv").read_text("utf-8").replace("x/10.png", '"x/10.png"')
    (tmp_path / "excel.csv").write_text("\ufeff" + excel, "utf-8")
    assert folders.load(tmp_path / "excel.csv").classes == 2


@pytest.mark.parametrize("label", ["-1", "1.0", "a", "99999999999", ""])
def test_labels_that_are_no_numbers_among_numbers(label, tmp_path):
    """Sorted as names they would take each other's places."""
    rows = [("0.png", "0", "train"), ("1.png", label, "train"), ("2.png", "10", "test")]
    with pytest.raises(ValueError, match=r"t\.csv, line 3: .*expected"):
        folders.load(write_csv(tmp_path / "t.csv", rows))


def test_lists_that_cannot_be(tmp_path):
    folder = write_lists(tmp_path)
    (folder / "val200.txt").write_text("images/0.png zero\n", "utf-8")
    with pytest.raises(ValueError, match=r"val200\.txt, line 1: .*expected a path and"):
        folders.load(folder)
    (folder / "val200.txt").write_text("\n", "utf-8")
    with pytest.raises(ValueError, match=r"val200\.txt is empty"):
        folders.load(folder)
    (folder / "val200.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val200\.txt is missing"):
        folders.load(folder)
    with pytest.raises(FileNotFoundError, match="no folder or CSV file"):
        folders.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no layout that is known"):
        folders.load(tmp_path / "empty")


# Looking at every example


def quiet():
    return Console(file=io.StringIO(), width=200)


def corrupted(tmp_path):
    folder = write_lists(tmp_path)
    (folder / "images/train800/2.png").write_bytes(b"no picture at all")
    whole = (folder / "images/test/1.png").read_bytes()
    (folder / "images/test/1.png").write_bytes(whole[: len(whole) // 2])
    deep = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000
    Image.fromarray(deep).save(folder / "images/test/3.png")
    return folder


def test_a_corrupt_image_is_named_with_its_index(tmp_path):
    task = folders.load(corrupted(tmp_path))
    with pytest.raises(ValueError) as error:
        check.checked(task, quiet())
    said = str(error.value)
    assert "cifar100, train: 1 of 6 images are corrupt (--skip_corrupt" in said
    assert "image 2 (" in said and "images/train800/2.png" in said
    with pytest.raises(CorruptImageError, match=r"image 1 \(.*test/1\.png"):
        task.test[1]
    with pytest.raises(CorruptImageError, match="expected 8 bits a channel"):
        task.test[3]


def test_a_missing_image_is_never_skipped(tmp_path):
    folder = write_lists(tmp_path)
    (folder / "images/test/3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"test/3\.png"):
        check.checked(folders.load(folder), quiet(), skip_corrupt=True)
    with pytest.raises(SystemExit, match=r"test/3\.png"):
        show.main(["--task", str(folder), "--out", str(tmp_path / "x.png")])


def test_corrupt_images_are_skipped_and_counted_where_asked(tmp_path):
    console = quiet()
    task = check.checked(folders.load(corrupted(tmp_path)), console, skip_corrupt=True)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [5, 3, 3]
    assert labels(task.train) == [0, 1, 0, 1, 2]
    said = " ".join(console.file.getvalue().split())
    assert "train: 1 corrupt images of 6 left out" in said
    assert "test: 2 corrupt images of 5 left out" in said


def task_of(train, classes=2, validation=(0, 1), test=(0, 1)):
    def part(values):
        values = np.array(values)
        return Arrays(np.zeros((len(values), 2, 2, 1), np.uint8), values)

    return Task("mine", classes, part(train), part(validation), part(test))


def test_labels_out_of_range():
    with pytest.raises(
        ValueError, match=r"train: 2 labels are not in 0 to 1: 5.*example 1"
    ):
        check.checked(task_of([0, 5, 5, 1]), quiet())
    with pytest.raises(ValueError, match=r"test: 1 labels are not in 0 to 1: -1"):
        check.checked(task_of([0, 1], test=[0, -1]), quiet())
    with pytest.raises(ValueError, match="validation: there are no examples"):
        check.checked(task_of([0, 1], validation=[]), quiet())


def test_classes_without_a_training_image_are_said():
    console = quiet()
    checked = check.checked(task_of([0, 1], classes=4), console)
    assert checked.classes == 4
    assert "2 of 4 classes have no training image (2, 3)" in console.file.getvalue()


def test_corrupt_errors_travel_between_processes():
    error = CorruptImageError("x.png", 3, "cut short")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and isinstance(again, CorruptImageError)


# Contact sheets


def test_show_writes_a_sheet_and_says_what_the_task_is(tmp_path, capsys):
    folder = write_lists(tmp_path)
    out = tmp_path / "sheet.png"
    options = [
        "--task",
        str(folder),
        "--out",
        str(out),
        "--size",
        "16",
        "--images",
        "5",
    ]
    assert show.main([*options, "--crop", "random"]) == out
    with Image.open(out) as image:
        assert image.width > image.height > 100
    said = " ".join(capsys.readouterr().out.split())
    assert "cifar100: 3 classes; 6 to train, 3 to validate, 5 to test" in said


def test_show_lists_tasks(capsys):
    assert show.main(["--list"]) is None
    assert "CC-BY-NC-SA" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--task is missing"),
        (["--task", "digits", "--images", "0"], "images=0: expected at least 1"),
        (["--task", "nothing"], "no task, folder or CSV file is called 'nothing'"),
        (["--task", "digits", "--size", "0"], r"size=\(0, 0\)"),
    ],
)
def test_show_says_what_it_expected(options, message):
    with pytest.raises(SystemExit, match=message):
        show.main(options)


def test_a_split_needs_enough_examples():
    task = task_of([0, 1])
    with pytest.raises(ValueError, match="3 examples are wanted, there are 2"):
        source.split(task.train, 0, 2, 1)
