"""The sets that packages hold: pinned, and split by the protocol."""

import numpy as np
import pytest
from PIL import Image

from experiments.tasks import catalogue, elpv, fashion_mnist, tuxpaint
from experiments.tasks import digits as digits_module


def labels(part):
    return [part[i]["label"] for i in range(len(part))]


def test_digits_are_pinned(monkeypatch):
    task = catalogue.load("digits")
    assert task.classes == 10 and task.train[0]["image"].shape == (8, 8, 1)
    monkeypatch.setattr(digits_module, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"handwritten digits.*the data differ"):
        catalogue.load("digits")


def test_fashion_mnist_is_pinned(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def read(part, _):
        size = {"train": 1200, "test": 50}[part]
        images = rng.integers(0, 256, (size, 28, 28, 1), np.uint8)
        return images, rng.integers(0, 10, size).astype(np.int32)

    monkeypatch.setattr(fashion_mnist, "read", read)
    with pytest.raises(ValueError, match="Fashion-MNIST, 1k, train: the data differ"):
        fashion_mnist.load(tmp_path)
    monkeypatch.setattr(fashion_mnist, "pin", lambda *_: None)
    task = fashion_mnist.load(tmp_path)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [800, 200, 50]


@pytest.mark.reference
def test_elpv_by_the_protocol():
    task = catalogue.load("elpv")
    assert [len(s) for s in (task.train, task.validation, task.test)] == [
        800,
        200,
        1624,
    ]
    everything = [labels(s) for s in (task.train, task.validation, task.test)]
    counts = np.bincount(np.concatenate(everything))
    assert counts.tolist() == [1508, 295, 106, 715]
    mono = catalogue.load("elpv_mono")
    everything = [labels(s) for s in (mono.train, mono.validation, mono.test)]
    assert np.bincount(np.concatenate(everything)).tolist() == [1550, 1074]
    assert task.train[0]["image"].shape == (300, 300, 1)
    assert elpv.NAMES["defect"][1] == "1/3"


def stamps_folder(tmp_path):
    counts = (38, 11, 20, 67, 41, 18, 25, 33, 32, 10)
    for (_, part), count in zip(tuxpaint.FOLDERS.items(), counts, strict=True):
        for i in range(count):
            pixels = np.zeros((5, 7, 4), np.uint8)
            pixels[1:3, 2:5] = (255, 0, 0, 255)
            path = tmp_path / part / ("sub" if i % 2 else "") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path


def test_tuxpaint_has_masks_and_its_classes_are_split_alike(tmp_path, monkeypatch):
    folder = stamps_folder(tmp_path)
    with pytest.raises(ValueError, match=r"The 295 stamps in .* are not the 295 of"):
        tuxpaint.load(folder)
    digest = tuxpaint.digest(folder)
    monkeypatch.setattr(tuxpaint, "SHA256", digest)
    task = tuxpaint.load(folder)
    sizes = [len(s) for s in (task.train, task.validation, task.test)]
    assert sum(sizes) == 295 and sizes == [147, 46, 102]
    assert np.bincount(labels(task.train)).tolist()[:4] == [19, 6, 10, 34]
    example = task.train[0]
    assert example["image"][0, 0].tolist() == [255] * 3  # on white
    assert example["image"][1, 2].tolist() == [255, 0, 0]
    expected = np.zeros((5, 7))
    expected[1:3, 2:5] = 255
    np.testing.assert_array_equal(example["mask"], expected)
    with pytest.raises(FileNotFoundError, match="apt-get install tuxpaint-stamps"):
        tuxpaint.load(tmp_path / "animals")
