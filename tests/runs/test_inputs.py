"""A run goes on only with the images, labels and weights that it began with."""

import dataclasses
import gc
import hashlib
import json
import pathlib
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pictures
import pytest
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file, save_file

from experiments import ablate, compare, vtab
from experiments.config.images import ImageConfig
from experiments.data import check, fingerprint, folders
from experiments.data.source import Arrays
from experiments.data.task import Task
from experiments.files import MismatchError
from experiments.pretrained import base_models
from experiments.runs import images, search
from experiments.runs.run import RunFailed
from experiments.studies import table_store
from experiments.studies.ablations import SNELLA
from experiments.tasks import catalogue

LORA = ("--methods", "lora", "--epochs", "2")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a run that was killed after its last epoch, and what it found."""
    root = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return root, pictures.killed("pets", *LORA)


@pytest.fixture
def copied(begun, tmp_path, monkeypatch):
    """A copy of that folder, in which the test runs."""
    shutil.copytree(begun[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return begun[1]


def resumed(capsys):
    summary = vtab.main(["--resume", "run"])
    return summary, " ".join(capsys.readouterr().out.split())


# What changes


def swap(train=pathlib.Path("pets/train")):
    """Every training label is the other one."""
    (train / "dark").rename(train / "held")
    (train / "light").rename(train / "dark")
    (train / "held").rename(train / "light")


def paint():
    path = pathlib.Path("pets/val/dark/0.png")
    pixels = np.array(Image.open(path))
    pixels[3, 4] += 1
    Image.fromarray(pixels).save(path)


def reorder():
    folder = pathlib.Path("pets/test/light")
    (folder / "0.png").rename(folder / "9.png")


def remove():
    pathlib.Path("pets/train/light/3.png").unlink()


def move():
    """An image of `val` is one of `train`, another the other way."""
    one, other = (pathlib.Path(f"pets/{p}/dark/0.png") for p in ("train", "val"))
    one.rename("held.png")
    other.rename(one)
    pathlib.Path("held.png").rename(other)


def name():
    """A class without an image, whose folder is the last."""
    pathlib.Path("pets/train/zebra").mkdir()


def retrain():
    path = pathlib.Path("weights/pets/model.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layernorm.bias"))
    tensors[name] = tensors[name] + np.float32(1e-3)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap, r"data of train differ \(other images or labels\)\. It goes"),
        (paint, r"data of validation differ \(other images or labels\)\. It goes"),
        (reorder, r"data of test differ \(the same images in another order\)\. It"),
        (remove, r"data of train differ \(8 images then, 7 now\)\. It goes"),
        (move, r"data of train differ .*; the data of validation differ"),
        (name, r"others: the classes differ \(2 then, 3 now\)\. It goes"),
        (
            retrain,
            r"others: the base's weights differ \(model\.safetensors\)\. It goes",
        ),
    ],
)
def test_what_changed_is_named_and_nothing_goes_on(copied, change, said):
    change()
    with pytest.raises(RunFailed, match=said):
        vtab.main(["--resume", "run"])
    assert not pathlib.Path("run/results.json").exists()


def test_a_run_goes_on_with_the_same_and_ends_the_same(copied, capsys):
    """Also where the files were copied, and others lie beside them."""
    pathlib.Path("pets/train/dark/notes.txt").write_text("mine", "utf-8")
    pathlib.Path("weights/pets/README.md").write_text("mine", "utf-8")
    summary, said = resumed(capsys)
    assert "inputs.json" not in said and "began on" not in said
    assert re.search(
        r"Targets: \d+ of \d+ matrices, [\d.]+% of the weights adapted", said
    )
    result = summary["methods"]["lora"]
    for name in ("test_accuracy", "val_accuracy", "best_epoch", "seconds_per_step"):
        assert result[name] == copied["methods"]["lora"][name]


def test_a_folder_from_before_goes_on_and_says_so(copied, capsys):
    known = pathlib.Path("run/inputs.json").read_text("utf-8")
    pathlib.Path("run/inputs.json").unlink()
    summary, said = resumed(capsys)
    assert "run has no inputs.json: it goes on, whether its images, labels" in said
    assert (
        summary["methods"]["lora"]["test_accuracy"]
        == (copied["methods"]["lora"]["test_accuracy"])
    )
    assert pathlib.Path("run/inputs.json").read_text("utf-8") == known


def more():
    for label, kind in enumerate(("dark", "light")):
        for index in range(4, 8):
            pixels = np.full((28, 28), 150 * label, np.uint8)
            Image.fromarray(pixels).save(f"pets/train/{kind}/{index}.png")


def third():
    for part in ("train", "val", "test"):
        shutil.copytree(f"pets/{part}/dark", f"pets/{part}/middle")


def damage():
    shutil.rmtree("run/checkpoints/lora/2/state")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            more,
            "2 was made after 4 updates, expected 8: there are more or fewer",
        ),
        (
            third,
            r"Checkpoint 2 in .* of another model .* \(2,\) and should be of \(3,\)",
        ),
        (damage, "Checkpoint 2 in .* or is damaged"),
    ],
)
def test_no_library_has_the_last_word_about_a_folder_from_before(copied, change, said):
    pathlib.Path("run/inputs.json").unlink()
    change()
    with pytest.raises(RunFailed, match=said):
        vtab.main(["--resume", "run"])
    gc.collect()  # what reading left behind would show as a warning here


def test_other_devices_are_allowed_and_said_aloud(copied, capsys):
    """From one device to four, with the second of two epochs to go."""
    shutil.rmtree("run/checkpoints/lora/2")
    values = json.loads(pathlib.Path("run/config.json").read_text("utf-8"))
    values["mesh"] = "data=2,model=2"
    pathlib.Path("run/config.json").write_text(json.dumps(values), "utf-8")
    summary, said = resumed(capsys)
    assert "The run began on" in said and "4 x cpu (data=2, fsdp=1, tensor=2)" in said
    assert summary["methods"]["lora"]["val_accuracy"] == pytest.approx(
        copied["methods"]["lora"]["val_accuracy"], abs=0.13
    )


# Fingerprints


def task(images, labels):
    part = Arrays(images, labels)
    return check.checked(Task("noise", 2, part, part, part), Console(quiet=True))


def test_a_fingerprint_is_that_of_pixels_shapes_labels_and_order():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 8, 1), np.uint8)
    labels = np.arange(6) % 2
    own = task(images, labels).fingerprint["train"]
    each = [
        hashlib.sha256(f"((4, 8, 1), {n})".encode() + image.tobytes()).digest()
        for image, n in zip(images, labels.tolist(), strict=True)
    ]
    assert own == {
        "images": 6,
        "sha256": hashlib.sha256(b"".join(each)).hexdigest(),
        "in_any_order": hashlib.sha256(b"".join(sorted(each))).hexdigest(),
    }
    assert task(np.asfortranarray(images), labels.astype(">i4")).fingerprint == (
        task(images, labels).fingerprint
    )
    turned = task(images[::-1], labels[::-1]).fingerprint["train"]
    assert turned["in_any_order"] == own["in_any_order"]
    assert turned["sha256"] != own["sha256"]
    others = (images.reshape(6, 8, 4, 1), labels), (images, 1 - labels)
    for other in others:
        assert task(*other).fingerprint["train"]["in_any_order"] != own["in_any_order"]


def test_a_corrupt_image_that_is_left_out_has_no_part_in_it(tmp_path):
    pictures.draw(tmp_path / "pets")
    whole = check.checked(folders.load(tmp_path / "pets"), Console(quiet=True))
    (tmp_path / "pets/train/light/3.png").write_bytes(b"\x89PNG")
    found = folders.load(tmp_path / "pets")
    left = check.checked(found, Console(quiet=True), skip_corrupt=True).fingerprint
    assert left["train"]["images"] == 7
    assert left["test"] == whole.fingerprint["test"]


def test_of_a_model_what_it_is_read_from_counts(tmp_path):
    config = ImageConfig(model=str(pictures.CLASSIFIER))
    names = {"config.json", "model.safetensors"}
    assert names <= {path.name for path in base_models.files(config)}
    (tmp_path / "README.md").write_text("mine", "utf-8")
    assert base_models.files(ImageConfig(model=str(tmp_path))) == []
    random = ImageConfig(model="vit_b16", random_weights=True)
    assert base_models.files(random) == []
    file = base_models.files(dataclasses.replace(random, random_weights=False))
    assert file == [pathlib.Path("ViT-B_16.npz")]
    digest = hashlib.sha256((pictures.CLASSIFIER / "config.json").read_bytes())
    found = fingerprint.of_files(base_models.files(config))
    assert found["config.json"] == digest.hexdigest()


# Tables that take long


def inputs(sha="a", weights=None):
    split = {"images": 2, "sha256": sha, "in_any_order": sha}
    data, files = {"train": split}, weights or {}
    return {"data": data, "classes": 2, "weights": files, "pillow": "12"}


def test_cells_of_a_task_share_images_and_weights(tmp_path, capsys):
    store, console = (
        table_store.Store(tmp_path, {"epochs": 3}, {}),
        Console(soft_wrap=True),
    )
    store.begin("pets", inputs(), console)  # a control from random weights
    store.begin("pets", inputs(weights={"x": "1"}), console)
    store.begin("birds", inputs(sha="b"), console)
    store = table_store.Store(tmp_path, {"epochs": 3}, {})
    store.begin("pets", inputs(), console)
    with pytest.raises(MismatchError, match=r"data of train differ .*another --out"):
        store.begin("pets", inputs(sha="b"), console)
    with pytest.raises(MismatchError, match=r"weights differ \(x\)"):
        store.begin("pets", inputs(weights={"x": "2"}), console)
    assert capsys.readouterr().out == ""
    store.keep("cars", "lora", {"chosen": {}, "seeds": {"0": {}}})
    store.begin("cars", inputs(), console)
    assert "does not say on which images cars was begun" in capsys.readouterr().out
    with pytest.raises(MismatchError, match="data of train differ"):
        store.begin("cars", inputs(sha="b"), console)


def test_a_comparison_adds_no_seed_on_other_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures.draw(tmp_path / "pets")
    words = ["--tasks=pets", "--methods", "linear", "--controls", "--out=run"]
    words += ["--run.model=vit_fashion_mnist", "--run.image_size=None"]
    words += ["--run.linear.strengths=1", "--run.batch=4", "--seeds=0"]
    compare.main(words)
    (tmp_path / "pets/test/dark/0.png").unlink()
    compare.main(words)  # nothing is left to run
    path = tmp_path / "run/results.json"
    known = json.loads(path.read_text("utf-8"))
    del known["rows"]["pets"]["linear"]["seeds"]["0"]
    path.write_text(json.dumps(known), "utf-8")
    with pytest.raises(SystemExit, match=r"test differ \(8 images then, 7 now\)"):
        compare.main(words)


def test_an_ablation_searches_and_trains_on_the_images_it_began_with(
    tmp_path, monkeypatch
):
    task = check.checked(catalogue.load("digits"), Console(quiet=True))
    config = ablate.Ablation(out=tmp_path)
    setting = SimpleNamespace(task=task, inputs=inputs(), out=tmp_path / "x")
    monkeypatch.setattr(images, "prepared", lambda *_: setting)
    monkeypatch.setattr(search, "chosen", lambda *_: pytest.fail("it was searched"))
    store = table_store.Store(tmp_path, {}, {})
    store.begin(config.run.task, inputs(sha="b"), Console(quiet=True))
    with pytest.raises(SystemExit, match="data of train differ"):
        ablate._tried(SNELLA, config, store, Console(quiet=True))
    store.keep(config.run.task, SNELLA.name, {"chosen": {"lr": 0.1}})
    with pytest.raises(SystemExit, match="data of train differ"):
        ablate._tried(SNELLA, config, store, Console(quiet=True))
