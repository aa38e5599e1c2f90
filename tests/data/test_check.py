"""A task is described, and may be refused, before anything trains on it."""

import io
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from rich.console import Console

from experiments import vtab
from experiments.data import check
from experiments.data.source import Arrays
from experiments.data.task import Task
from experiments.methods import linear_probe
from experiments.pretrained import base_models, small_vit
from experiments.runs import run
from experiments.tasks import catalogue, show
from experiments.training import evaluation, sharding


def folder(path, counts, size=28):
    """Class folders with so many images of each class in every split."""
    for part in ("train", "val", "test"):
        for name, count in counts.items():
            (path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((size, size), 9 * i, np.uint8)
                Image.fromarray(pixels).save(path / part / name / f"{i}.png")
    return path


def said_of(task):
    console = Console(file=io.StringIO(), width=60)
    check.checked(task, console)
    return console.file.getvalue()


# Classes


@pytest.mark.parametrize("methods", [("linear",), ("lora", "snella"), ("full",)])
def test_one_class_is_refused_for_every_method(tmp_path, monkeypatch, methods):
    folder(tmp_path / "one", {"only": 4})
    monkeypatch.setattr("experiments.runs.cli.run", pytest.fail)
    words = ["--config", "quickstart", "--task", str(tmp_path / "one"), "--batch", "4"]
    words += ["--methods", *methods, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"one: all images .*class \(only\), expected"):
        vtab.main(words)
    assert not (tmp_path / "out").exists()
    assert show.main(["--task", words[3], "--out", str(tmp_path / "x.png")])


def test_one_class_of_several_is_refused_too():
    images = np.zeros((4, 2, 2, 1), np.uint8)
    two, one = Arrays(images, np.arange(4) % 2), Arrays(images, np.ones(4, int))
    task = Task("mine", 2, one, two, two)
    quiet = Console(quiet=True)
    assert len(check.checked(task, quiet).train) == 4
    with pytest.raises(ValueError, match=r"mine, train: all 4 images .*class \(1\)"):
        check.checked(task, quiet, to_train=True)
    check.checked(Task("mine", 2, two, one, one), quiet, to_train=True)


def test_classes_with_one_training_image_are_said():
    labels = np.array([0, 1, 1, 3, 4])
    source = Arrays(np.zeros((5, 2, 2, 1), np.uint8), labels)
    task = Task("mine", 5, source, source, source, ("a", "b", "c", "[v2]", "nan"))
    assert said_of(task).split("\n")[1:-1] == [
        "mine: 1 of 5 classes have no training image (c)",
        "mine: 3 of 5 classes have one training image (a, [v2], nan)",
    ]


# A folder and a task of one name


def test_a_folder_of_a_tasks_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(Path("digits"), {"cat": 2, "dog": 2})
    task = catalogue.load("digits", tmp_path / "data")
    assert task.classes == 10
    expected = f"taken, not {tmp_path / 'digits'}; --task ./digits takes that"
    assert expected in said_of(task)
    own = catalogue.load("./digits", tmp_path / "data")
    assert own.names == ("cat", "dog") and not own.notes
    other = folder(tmp_path / "data" / "digits", {"emu": 2, "fox": 2})
    said = said_of(catalogue.load("digits", tmp_path / "data"))
    assert expected in said and f"taken, not {other}; --task {other} takes that" in said
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert not catalogue.load("digits", tmp_path).notes[1:]
    assert not catalogue.load("digits", tmp_path / "empty").notes


def test_a_folder_that_goes_before_tfds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {f"{i:03}": 1 for i in range(102)}
    flowers = folder(tmp_path / "flowers", names, size=2)
    note = f"flowers: read from the folder {flowers}, not from TFDS"
    assert catalogue.load("flowers", tmp_path).notes == (note,)
    (tmp_path / "here" / "flowers").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    first, second = catalogue.load("flowers", tmp_path).notes
    assert first == note and f"not {tmp_path / 'here/flowers'}; " in second


def test_a_folder_of_a_models_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / small_vit.NAME).mkdir()
    monkeypatch.setattr("experiments.runs.cli.run", lambda setting, resume: setting)
    setting = vtab.main(["--config", "quickstart", "--methods", "linear"])
    assert setting.base.config.num_classes == 10
    said = " ".join(capsys.readouterr().out.split())
    taken = f"is taken, not {tmp_path / small_vit.NAME}; --model ./{small_vit.NAME}"
    assert said.startswith(f"{small_vit.NAME}: the model of that name {taken} takes")


# Weights that are not finite


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, monkeypatch, value):
    model = small_vit.load(0)
    kernel = model.blocks.attn.query.kernel
    kernel[...] = kernel[...].at[0, 0, 0].set(value)
    small_vit.save(model, tmp_path / "bad.safetensors")
    monkeypatch.setattr(small_vit, "WEIGHTS", tmp_path / "bad.safetensors")
    monkeypatch.setattr("experiments.runs.cli.run", pytest.fail)
    expected = "has weights that are not finite .*: blocks/attn/query/kernel"
    with pytest.raises(SystemExit, match=f"{small_vit.NAME} {expected}"):
        vtab.main(["--config", "quickstart", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_features_that_are_not_finite(tmp_path, monkeypatch):
    """The error names the weights, which are finite, and no head is fitted."""
    task = Task("tiny", 3, tiny.SOURCE, tiny.SOURCE, tiny.SOURCE)
    model = tiny.base()
    base_models.check_finite(model, "tiny")
    model.norm.scale[...] = jnp.full_like(model.norm.scale[...], 3e38)
    base_models.check_finite(model, "tiny")
    how = task, tiny.TRANSFORM, sharding.make("data=1"), (1.0,)
    expected = "the weights x.npz give .* of 24 images features that are not finite"
    with pytest.raises(FloatingPointError, match=expected):
        linear_probe.train(model, *how, weights="x.npz")

    def features(*_):
        return np.array([[0.0], [np.nan]]), np.arange(2)

    monkeypatch.setattr(evaluation, "features", features)
    words = ["--config", "quickstart", "--methods", "linear"]
    with pytest.raises(run.RunFailed, match=f"{small_vit.NAME} give 1 of 2 images"):
        vtab.main([*words, "--out", str(tmp_path / "out")])
