"""Exports hold more than weights: grids, heads, constants, names of classes."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from places import ASSETS
from safetensors import safe_open
from safetensors.numpy import save_file

import snella_jax as snella
from snella_jax import models
from snella_jax.models import vit
from snella_jax.models.checkpoints import position_grid
from snella_jax.models.checkpoints.read import read

HEADS = {"heads": 2}
OLD = {"0": "airplane", "1": "bird", "2": "cat"}
LABELS = {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


def same(one, other):
    assert one.config == other.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))


def timm(folder, name="vit/moco.pth.tar", **config):
    """Weights as a folder of timm's."""
    tensors = read(ASSETS / name).tensors
    tensors = {n.removeprefix("module."): t for n, t in tensors.items()}
    folder.mkdir()
    tensors = {n: np.ascontiguousarray(t) for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text("utf-8"))


# Grids


@pytest.mark.parametrize("size", [(8, 32), (16, 12)])  # 2 x 8, which 4 x 4 is, too
@pytest.mark.parametrize(
    ("name", "out"),
    [
        ("vit/classifier", "out"),
        ("vit/dinov2", "out"),
        ("vit/classifier", "out.safetensors"),
        ("vit/original.npz", "out.safetensors"),
        ("vit/moco.pth.tar", "out.safetensors"),
    ],
)
def test_grids_that_are_no_square_survive(name, out, size, tmp_path, caplog):
    model = vit.load(ASSETS / name, image_size=size, **HEADS)
    models.export(model, tmp_path / out, like=ASSETS / name)
    again = vit.load(tmp_path / out)
    same(again, model)
    assert again.config.image_hw == size
    assert ("for a square, and this one is" in caplog.text) == (name == "vit/dinov2")
    resized = vit.load(tmp_path / out, image_size=(24, 20)).pos_embed[...][0, 1:]
    own = np.asarray(model.pos_embed[...][0, 1:]).reshape(
        size[0] // 4, size[1] // 4, 12
    )
    expected = position_grid.resize(own, (6, 5)).reshape(30, 12)
    np.testing.assert_allclose(resized, expected, rtol=1e-5, atol=1e-6)
    second = tmp_path / f"second{Path(out).suffix}"
    models.export(again, second, like=tmp_path / out)
    same(vit.load(second), model)


@pytest.mark.parametrize("size", [(8, 32), (16, 12)])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architecture": "vit", "pretrained_cfg": {"input_size": [3, 20, 20]}},
        {
            "architecture": "vit",
            "input_size": [3, 20, 20],
            "model_args": {"num_heads": 2},
        },
        {"architecture": "vit", "model_args": {"num_heads": 2, "img_size": 20}},
    ],
)
def test_grids_of_timms_folders_survive(config, size, tmp_path):
    source = timm(tmp_path / "source", **config)
    model = vit.load(source, image_size=size, **HEADS)
    models.export(model, tmp_path / "out", like=source, max_shard_bytes=9000)
    same(vit.load(tmp_path / "out"), model)
    if config:
        said = config_of(tmp_path / "out")
        assert said["model_args"]["img_size"] == list(size)
        nested = said.get("pretrained_cfg", said)
        assert nested["input_size"] == [3, *size]


@pytest.mark.parametrize("size", [(8, 32), (16, 12)])
def test_an_npz_has_no_place_for_a_grid(size, tmp_path):
    model = vit.load(ASSETS / "vit/original.npz", image_size=size)
    with pytest.raises(
        ValueError, match=r"grid is no square but \d x \d: expected \.s"
    ):
        models.export(model, tmp_path / "a.npz", like=ASSETS / "vit/original.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["staged/swin.pth", "staged/convnext.pth"])
def test_image_sizes_of_models_with_stages_survive(name, tmp_path):
    model = models.load(ASSETS / name, image_size=(90, 84))
    models.export(model, tmp_path / "out.safetensors", like=ASSETS / name)
    same(models.load(tmp_path / "out.safetensors"), model)
    models.export(model, tmp_path / "out.npz", like=ASSETS / name)  # of no size
    source = timm(tmp_path / "timm", name, pretrained_cfg={"input_size": [3, 64, 64]})
    models.export(model, tmp_path / "out", like=source)
    assert config_of(tmp_path / "out")["pretrained_cfg"]["input_size"] == [3, 90, 84]
    same(models.load(tmp_path / "out"), model)


def test_the_metadata_is_what_others_expect(tmp_path):
    model = vit.load(ASSETS / "vit/mae.pth", **HEADS)
    models.export(model, tmp_path / "a.safetensors", like=ASSETS / "vit/mae.pth")
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"


# Other fields


CHANGED = {
    "heads": 3,
    "pixel_mean": (0.1, 0.2, 0.3),
    "pixel_std": (0.4, 0.5, 0.6),
}


@pytest.mark.parametrize("name", ["vit/moco.pth.tar", "vit/original.npz"])
def test_what_no_shape_says_survives_in_a_file(name, tmp_path):
    changed = CHANGED | {"pool": "mean", "norm_eps": 1e-3}
    model = vit.load(ASSETS / name, **changed)
    models.export(model, tmp_path / "a.safetensors", like=ASSETS / name)
    again = vit.load(tmp_path / "a.safetensors")
    same(again, model)
    assert again.config.pool == "mean" and again.config.norm_eps == 1e-3
    assert again.config.pixel_mean == (0.1, 0.2, 0.3)


def test_what_no_shape_says_survives_in_timms_folder(tmp_path):
    said = {"mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 3}
    source = timm(tmp_path / "source", architecture="vit", pretrained_cfg=said)
    model = vit.load(source, num_classes=5, pool="mean", **CHANGED)
    models.export(model, tmp_path / "out", like=source)
    said = config_of(tmp_path / "out")
    assert said["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert said["pretrained_cfg"]["num_classes"] == 5
    assert said["global_pool"] == "avg"
    assert said["model_args"] == {
        "num_heads": 3,
        "global_pool": "avg",
        "fc_norm": False,
        "img_size": [20, 20],
    }
    same(vit.load(tmp_path / "out"), model)


def test_a_timm_folder_that_did_not_change_says_what_it_said(tmp_path):
    config = {
        "architecture": "vit",
        "num_classes": 3,
        "model_args": {"num_heads": 2},
        "pretrained_cfg": {"input_size": [3, 20, 20], "mean": [0.5] * 3},
        "label_names": ["a", "b", "c"],
        "label_descriptions": {"a": "letter a"},
    }
    source = timm(tmp_path / "source", **config)
    models.export(vit.load(source), tmp_path / "out", like=source)
    assert config_of(tmp_path / "out") == config


@pytest.mark.parametrize("name", ["vit/classifier", "staged/swin", "staged/convnext"])
def test_other_constants_go_into_the_preprocessor(name, tmp_path):
    source = shutil.copytree(ASSETS / name, tmp_path / "source")
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": False}
    (source / "preprocessor_config.json").write_text(
        json.dumps(images | {"size": 9}), "utf-8"
    )
    model = models.load(source)
    models.export(model, tmp_path / "same", like=source)
    said = json.loads((tmp_path / "same/preprocessor_config.json").read_text("utf-8"))
    assert said == images | {"size": 9}
    constants = {name: CHANGED[name] for name in ("pixel_mean", "pixel_std")}
    model = models.load(source, **constants)
    models.export(model, tmp_path / "out", like=source)
    assert models.load(tmp_path / "out").config == model.config
    said = json.loads((tmp_path / "out/preprocessor_config.json").read_text("utf-8"))
    assert said["image_mean"] == [0.1, 0.2, 0.3] and said["size"] == 9
    assert said["do_rescale"] is True and said["rescale_factor"] == 1 / 255


# Names of classes


@pytest.fixture
def named(tmp_path):
    """The folder of a classifier of aeroplanes, birds and cats."""
    folder = shutil.copytree(ASSETS / "vit/classifier", tmp_path / "named")
    ids = {name: int(i) for i, name in OLD.items()}
    said = config_of(folder) | {"id2label": OLD, "label2id": ids, "num_labels": 3}
    (folder / "config.json").write_text(json.dumps(said), "utf-8")
    return folder


def exported(model, like, tmp_path, **options):
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    snella.export(model, out, like=like, **options)
    said = config_of(out)
    names = said.get("id2label")
    if names is not None:
        assert said["label2id"] == {name: int(i) for i, name in names.items()}
        assert said.get("num_labels", len(names)) == len(names)
    return names


def test_names_stay_with_the_head_that_they_name(named, tmp_path):
    """Also when it is trained, in half precision, or with its blocks as a list."""
    assert exported(models.load(named), named, tmp_path) == OLD
    model = models.unstack(models.load(named, param_dtype=jnp.bfloat16))
    config = snella.SnellaConfig(rank=2, allocation="fixed", trainable="head")
    model = snella.adapt(model, config, rngs=nnx.Rngs(0))
    model.head.kernel[...] += 1
    assert exported(model, named, tmp_path) == OLD
    assert exported(snella.merge(model), named, tmp_path) == OLD


def test_a_new_head_has_no_names_of_another(named, tmp_path):
    assert exported(models.load(named, num_classes=3), named, tmp_path) == LABELS
    model = models.load(named)
    model.head = nnx.Linear(12, 3, rngs=nnx.Rngs(0))
    assert exported(model, named, tmp_path) == LABELS
    drawn = vit.ViT(model.config, rngs=nnx.Rngs(0))
    assert exported(drawn, named, tmp_path) == LABELS
    assert exported(models.load(named, num_classes=0), named, tmp_path) is None
    four = models.load(named, num_classes=4)
    assert exported(four, named, tmp_path) == LABELS | {"3": "LABEL_3"}


def test_a_head_of_another_file_has_its_own_names(named, tmp_path):
    """The other file is as wide, and has the same backbone."""
    tensors = dict(read(named).tensors)
    tensors["classifier.weight"] = tensors["classifier.weight"] + 1
    other = shutil.copytree(named, tmp_path / "other")
    save_file(tensors, other / "model.safetensors")
    assert exported(models.load(other), named, tmp_path) == LABELS
    assert exported(models.load(other), other, tmp_path) == OLD


def test_names_that_the_caller_gives(named, tmp_path):
    names = ["cüt", "dent", "hole"]
    expected = dict(zip("012", names, strict=True))
    for classes in (None, 3):
        model = models.load(named, num_classes=classes)
        assert exported(model, named, tmp_path, class_names=names) == expected
    base = models.load(ASSETS / "staged/swin", num_classes=3)
    assert (
        exported(base, ASSETS / "staged/swin", tmp_path, class_names=names) == expected
    )
    base = models.load(ASSETS / "vit/pooled", num_classes=3)
    assert (
        exported(base, ASSETS / "vit/pooled", tmp_path, class_names=names) == expected
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "expected 3, one for each class of the model's head, found 2"),
        (["a", "b", "c", "d"], "found 4"),
        ("abc", "expected a list of strings"),
        (["a", "b", 3], "expected a list of strings"),
        (["a", "b", "a"], "class_names has a twice"),
    ],
)
def test_names_that_cannot_be(names, message, named, tmp_path):
    with pytest.raises(ValueError, match=message):
        exported(models.load(named), named, tmp_path, class_names=names)


def test_names_without_a_place(named, tmp_path):
    headless = models.load(named, num_classes=0)
    with pytest.raises(ValueError, match="expected 0, one for each class"):
        exported(headless, named, tmp_path, class_names=["a"])
    with pytest.raises(ValueError, match="a file has no place for them, a folder has"):
        models.export(
            models.load(named),
            tmp_path / "a.safetensors",
            like=named,
            class_names=["a", "b", "c"],
        )


@pytest.mark.parametrize("nested", [True, False])
def test_names_of_timms_folders(nested, tmp_path):
    names = {"label_names": ["a", "b", "c"], "label_descriptions": {"a": "x", "b": "y"}}
    config = {"architecture": "vit", "num_classes": 3, "model_args": {"num_heads": 2}}
    config |= {"pretrained_cfg": {"num_classes": 3} | (names if nested else {})}
    source = timm(tmp_path / "source", **config, **({} if nested else names))

    def said(name, classes=None, **options):
        model = vit.load(source, num_classes=classes)
        models.export(model, tmp_path / name, like=source, **options)
        found = config_of(tmp_path / name)
        cfg = found["pretrained_cfg"]
        assert cfg["num_classes"] == found["num_classes"] == model.config.num_classes
        assert "id2label" not in found
        descriptions = {**cfg, **found}.get("label_descriptions")
        return {**cfg, **found}.get("label_names"), descriptions

    assert said("same") == (["a", "b", "c"], {"a": "x", "b": "y"})
    assert said("new", 3) == (["LABEL_0", "LABEL_1", "LABEL_2"], None)
    assert said("two", 2, class_names=["d", "e"]) == (["d", "e"], None)
    assert said("none", 0) == (None, None)


# Paths


@pytest.mark.parametrize("end", [".pth", ".pt", ".bin", ".PT", ".ckpt", ".NPZ", ".h5"])
def test_a_folder_is_not_called_like_a_file(end, tmp_path):
    like = ASSETS / "vit/classifier"
    with pytest.raises(
        ValueError, match=r"expected \.npz or \.safetensors, or a folde"
    ):
        models.export(vit.load(like), tmp_path / f"merged{end}", like=like)
    assert not list(tmp_path.iterdir())
    models.export(vit.load(like), tmp_path / "vit-v1.5", like=like)
    assert (tmp_path / "vit-v1.5/model.safetensors").exists()


@pytest.mark.reference
def test_transformers_reads_grids_and_names(named, tmp_path):
    import torch
    from transformers import AutoModelForImageClassification

    model = vit.load(named, num_classes=3, image_size=(8, 32))
    model.head.kernel[...] = jax.random.normal(jax.random.key(0), (12, 3))
    models.export(model, tmp_path / "out", like=named, class_names=["x", "y", "z"])
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.id2label == {0: "x", 1: "y", 2: "z"}
    pixels = np.asarray(jax.random.normal(jax.random.key(1), (2, 8, 32, 3)))
    with torch.no_grad():
        logits = theirs(torch.tensor(pixels).permute(0, 3, 1, 2)).logits
    np.testing.assert_allclose(logits.numpy(), model(pixels), rtol=0, atol=1e-5)
