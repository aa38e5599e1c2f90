"""Tasks with masks: where they are, how they are split, stamps on photographs."""

import dataclasses
import hashlib
import re

import masks
import numpy as np
import pictures
import pytest
from PIL import Image
from rich.console import Console

from experiments.config.presets import QUICKSTART
from experiments.data import pair_check
from experiments.data.segmentation_task import SegmentationTask
from experiments.data.source import Arrays, take
from experiments.data.task import Task
from experiments.runs import images
from experiments.tasks import polyps, segmentation_catalogue, show, tuxpaint_masks
from experiments.tasks.segmentation_catalogue import load
from experiments.tasks.tuxpaint import Stamps

NAMES = [f"k{i}" for i in range(12)]


@pytest.fixture
def data(tmp_path):
    """A data directory with small copies of Kvasir-SEG and CVC-ClinicDB."""
    kvasir = masks.draw(tmp_path / "Kvasir-SEG", NAMES, suffix=".jpg")
    masks.lists(kvasir, train=NAMES[:10], val=NAMES[10:])
    kinds = ("Original", "Ground Truth")
    masks.draw(tmp_path / "cvc_clinicdb", "123", 1, kinds=kinds, suffix=".tif")
    return tmp_path


def official(data):
    folder = data / "Kvasir-SEG"
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in polyps.LISTS
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kvasir", r"kvasir_seg: unpack https://datasets.simula.no/kvasir-seg/ there, "
                   r"and put train.txt and val.txt \(in Data-split/ of https://github"),
        ("cvc_clinicdb", "cvc_clinicdb: unpack https://polyp.grand-challenge.org/CVCC"),
        ("pranet", "pranet: unpack TrainDataset.zip and TestDataset.zip of https://gi"),
    ],
)  # fmt: skip
def test_what_is_not_there_says_where_it_is_and_its_terms(tmp_path, name, said):
    with pytest.raises(FileNotFoundError, match=said) as error:
        load(name, tmp_path)
    assert "research and education only; cite its authors" in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_kvasir_has_its_official_lists(data, monkeypatch):
    task = load("kvasir", data)
    folder = data / "Kvasir-SEG"
    note = f"{folder}: train.txt and val.txt are not the official lists"
    assert task.name == "Kvasir-SEG" and task.notes[0] == note
    sizes = [len(part) for part in (task.train, task.validation, task.test)]
    assert sizes == [9, 1, 2]
    assert [own.name for own in task.test.files] == NAMES[10:]
    monkeypatch.setattr(polyps, "LISTS", official(data))
    (only,) = load("kvasir", data).notes
    assert only == f"{folder}: val.txt is the test, there is no test.txt"
    assert len(load("kvasir", data, validation=0.3).validation) == 3
    own = load(str(folder), data)
    assert own.name == "Kvasir-SEG" and own.train.files == task.train.files
    (folder / "val.txt").unlink()
    message = r"val.txt is missing: put train.txt and val.txt \(in Data-split/ of"
    with pytest.raises(FileNotFoundError, match=message):
        load("kvasir", data)


def test_cvc_clinicdb_is_a_test_alone_and_one_of_others(data):
    task = load("cvc_clinicdb", data)
    assert [own.name for own in task.test.files] == ["1", "2", "3"]
    assert not len(task.train) and not len(task.validation)
    plain = masks.draw(data / "plain", "ab", 2)
    task = load("kvasir", data, also=("cvc_clinicdb", str(plain)))
    sizes = {name: len(source) for name, source in task.extra_tests.items()}
    assert sizes == {"cvc_clinicdb": 3, "plain": 2}
    assert task.titles == {"cvc_clinicdb": "CVC-ClinicDB"}  # the folder's is its name
    same = load(str(data / "Kvasir-SEG"), data, also=("kvasir", str(plain)))
    assert same.name == "Kvasir-SEG" and not same.titles  # nor one that is another's
    assert task.extra_tests["cvc_clinicdb"][0]["mask"].any()
    with pytest.raises(ValueError, match="there are two tests called cvc_clinicdb"):
        load("kvasir", data, also=("cvc_clinicdb", "cvc_clinicdb"))


def test_what_was_released_tests_on_images_that_it_trains_on(data):
    """All of Kvasir-SEG, whatever its lists say, and others of the same images."""
    message = r"sessile-main-Kvasir-SEG: unpack https://datasets.simula.no/kvasir-seg/"
    with pytest.raises(FileNotFoundError, match=message):
        load("kvasir_released", data)
    masks.draw(data / "sessile-main-Kvasir-SEG", NAMES[:3], suffix=".jpg")
    task = load("kvasir_released", data)
    assert {own.name for own in (*task.train.files, *task.validation.files)} == {*NAMES}
    assert [own.name for own in task.test.files] == NAMES[:3]
    console = Console(record=True, width=120)
    pair_check.checked(task, console)
    said = console.export_text()
    counts = re.findall(r"test: (\d) images are in the (\w+) split, too", said)
    assert sum(int(count) for count, _ in counts) == 3


def test_names_that_are_none_and_folders_of_a_tasks_name(data, monkeypatch):
    with pytest.raises(ValueError, match="'kvasr'; did you mean kvasir"):
        load("kvasr", data)
    assert not segmentation_catalogue.knows("kvasr")
    monkeypatch.chdir(data)
    (data / "kvasir").mkdir()
    note = f"kvasir: the task of that name is taken, not the folder {data / 'kvasir'}"
    assert load("kvasir", data).notes[0] == note


def test_classification_points_to_the_command_for_masks(data, monkeypatch):
    def missing(task):
        config = dataclasses.replace(QUICKSTART.config, task=str(task), batch=4)
        return images.missing(config)

    for task in ("kvasir", data / "Kvasir-SEG"):
        command = f"`python -m experiments.polyp --config minisam --task {task}`"
        assert f"{task} has masks, not classes: {command}" in missing(task)
    monkeypatch.chdir(data)
    pictures.draw(data / "kvasir")  # with a folder for each class
    assert missing("kvasir") is None


def test_the_listing_names_every_task_and_its_terms(capsys):
    assert show.main(["--list"]) is None
    listed = capsys.readouterr().out
    console = Console(width=200, record=True, markup=False)
    console.print(segmentation_catalogue.listing())
    text = console.export_text()
    for name, entry in segmentation_catalogue.ENTRIES.items():
        assert name in listed and name in text
        assert entry.licence in text and entry.get in text


@pytest.mark.parametrize(("name", "kind"), [("kvasir", "12"), ("cvc_clinicdb", "3")])
def test_show_draws_images_with_their_masks(data, capsys, name, kind):
    out = data / "sheet.png"
    words = {"kvasir": ["--task", name], "cvc_clinicdb": [name]}[name]
    options = [*words, "--data_dir", str(data), "--size=16", "--fit=pad"]
    assert show.main([*options, "--out", str(out)]) == out
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    blue = pixels[:, 2] - pixels[:, 0] > 40  # the masks' layer
    assert image.width > image.height > 100 and blue.mean() > 0.01
    said = " ".join(capsys.readouterr().out.split())
    sizes = {"12": "9 to train, 1 to validate, 2 to test",
             "3": "0 to train, 0 to validate, 3 to test"}[kind]  # fmt: skip
    assert f"images with masks; {sizes}" in said


# Stamps on photographs


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    """Nine stamps, a colour each, on grey photographs, a level each."""
    paths = []
    for i in range(9):
        pixels = np.zeros((6, 12, 4), np.uint8)
        pixels[1:5, 2:10] = (255, 20 * i, 0, 255)
        pixels[0] = (255, 20 * i, 0, 90)  # less than half
        paths.append(tmp_path / f"s{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    stamps = Stamps(tuple(paths), np.zeros(9, np.int32))
    levels = 60 + 10 * np.arange(12, dtype=np.uint8)
    photographs = np.broadcast_to(levels[:, None, None, None], (12, 40, 40, 1)).copy()

    def task(source, cut):
        parts = [np.arange(*ends) for ends in ((0, cut), (cut, cut + 2), (cut + 2, 9))]
        return Task("", 1, *(take(source, rows) for rows in parts))

    cells = Arrays(photographs, np.zeros(12, np.int32))
    monkeypatch.setattr(tuxpaint_masks.tuxpaint, "load", lambda _: task(stamps, 4))
    monkeypatch.setattr(tuxpaint_masks.elpv, "load", lambda: task(cells, 5))
    return tuxpaint_masks.load()


def test_a_scene_is_a_stamp_on_a_photograph(scenes):
    """The mask is where the stamp's red covers at least half of a pixel."""
    assert isinstance(scenes, SegmentationTask)
    assert [len(s) for s in (scenes.train, scenes.validation, scenes.test)] == [
        16,
        2,
        3,
    ]
    for index in range(len(scenes.train)):
        found = scenes.train[index]
        image, mask = found["image"].astype(int), found["mask"]
        ground = image[mask == 0]
        level = np.bincount(ground[:, 2]).argmax()
        assert (image.shape, mask.shape) == ((40, 40, 3), (40, 40))
        share = (image[..., 0] - level) / (255 - level)
        clear = abs(share - 0.5) > 0.02
        np.testing.assert_array_equal(mask[clear], (share > 0.5)[clear])
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        long = np.ptp(columns) + 1  # 8 of 12, of 0.3 to 0.8 of 40
        assert 12 * 8 / 12 - 2 <= long <= 32 * 8 / 12 + 2 and np.ptp(rows) < long
        again = scenes.train[index]
        np.testing.assert_array_equal(found["image"], again["image"])


def test_no_stamp_and_no_photograph_is_in_two_splits(scenes):
    stamps, levels = [], []
    for part in (scenes.train, scenes.validation, scenes.test):
        found = [part[i] for i in range(len(part))]
        stamps.append({own["name"].split("_")[0] for own in found})
        levels.append(
            {int(np.bincount(o["image"][..., 2].ravel()).argmax()) for o in found}
        )
    assert [len(own) for own in stamps] == [4, 2, 3]
    for own in (stamps, levels):
        assert sum(map(len, own)) == len(set.union(*own))
    assert len(levels[0]) > 2
    first, second = scenes.train[0], scenes.train[4]
    assert (first["name"], second["name"]) == ("s0_0", "s0_1")
    assert (first["image"] != second["image"]).any()
