"""Merged weights in the format of the base: read again by us, and by transformers."""

import itertools
import json
import shutil
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import called
from flax import nnx
from places import ASSETS
from safetensors.numpy import save_file

import snella_jax as snella
from snella_jax import models
from snella_jax.models import swin, vit
from snella_jax.models.checkpoints.read import read

VIT = ASSETS / "vit"
HEADS = {"heads": 2}
SIZE = {"image_size": (50, 38)}
SOURCES = {
    "vit/original.npz": ("out.npz", {}),
    "vit/classifier": ("out", {}),
    "vit/pooled": ("out", {}),
    "vit/dinov2": ("out", HEADS),
    "vit/mae.pth": ("out.safetensors", HEADS),
    "vit/moco.pth.tar": ("out.safetensors", HEADS),
    "staged/swin": ("out", {}),
    "staged/swin.pth": ("out.safetensors", SIZE),
    "staged/convnext": ("out", {}),
    "staged/convnext.pth": ("out.safetensors", SIZE),
}
VIT_FOLDERS = ["vit/classifier", "vit/pooled", "vit/dinov2"]
# Row of the table of biases for every two tokens of a window of 3 x 3.
INDEX = [
    [5 * (a // 3 - b // 3 + 2) + a % 3 - b % 3 + 2 for b in range(9)] for a in range(9)
]


def adapted(base, **changes):
    config = snella.SnellaConfig(
        **({"rank": 4, "allocation": "fixed", "trainable": ""} | changes)
    )
    return snella.adapt(base, config, rngs=nnx.Rngs(1))


def images(name):
    return np.load((ASSETS / name).parent / "expected.npz")["images"]


def kind_of(model):
    """The class in transformers."""
    name = {"Swin": "Swin", "ConvNeXt": "ConvNext"}[type(model).__name__]
    end = "ForImageClassification" if model.config.num_classes else "Model"
    return name + end


def same(one, other):
    one, other = (dict(nnx.to_flat_state(nnx.state(model))) for model in (one, other))
    assert one.keys() == other.keys()
    for path, variable in one.items():
        np.testing.assert_array_equal(variable[...], other[path][...], str(path))
        assert variable.dtype == other[path].dtype


@pytest.mark.parametrize(
    ("name", "stacked"),
    [
        *((name, True) for name in SOURCES if not name.startswith("staged/swin")),
        *((name, False) for name in SOURCES if "convnext" not in name),
    ],
)
def test_what_is_written_is_what_was_merged(name, stacked, tmp_path):
    out, options = SOURCES[name]
    options = options | {"stacked": stacked}
    model = adapted(models.load(ASSETS / name, **options))
    snella.export(model, tmp_path / out, like=ASSETS / name)
    again = models.load(tmp_path / out, **options)
    same(again, snella.merge(model))
    logits, plain, before = (
        called(m, images(name))
        for m in (model, again, models.load(ASSETS / name, **options))
    )
    np.testing.assert_allclose(plain, logits, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(plain - before)).max() > 1e-4


@pytest.mark.parametrize("name", SOURCES)
def test_a_model_that_did_not_change_is_the_file_that_it_was(name, tmp_path):
    out, options = SOURCES[name]
    model = models.load(ASSETS / name, **options)
    models.export(model, tmp_path / out, like=ASSETS / name)
    found, expected = (dict(read(p).tensors) for p in (tmp_path / out, ASSETS / name))
    for tensors in (found, expected):
        for dropped in ("pooler", "vit.pooler"):
            for end in ("weight", "bias"):
                tensors.pop(f"{dropped}.dense.{end}", None)
    for tensor in list(expected):
        if tensor.endswith("attn_mask"):
            del expected[tensor]
        if tensor.endswith("relative_position_index"):
            expected[tensor] = np.array(INDEX)
            assert found[tensor].dtype == np.int64
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_array_equal(found[tensor], value, tensor)


@pytest.mark.parametrize(
    "name", [n for n in SOURCES if n.startswith("vit") and n != "vit/dinov2"]
)
@pytest.mark.parametrize("size", [(16, 12), (24, 24)])
def test_a_new_head_and_another_size(name, size, tmp_path):
    out, options = SOURCES[name]
    old = vit.load(ASSETS / name, **options).config
    patch = old.patch_hw
    image = (patch[0] * size[0] // 4, patch[1] * size[1] // 4)
    base = vit.load(ASSETS / name, num_classes=12, image_size=image, **options)
    assert base.config.width == 12  # a square head: which way round?
    base.head.kernel[...] = jax.random.normal(jax.random.key(0), (12, 12))
    base.head.bias[...] = jnp.arange(12.0)
    if out == "out.npz" and size[0] != size[1]:
        with pytest.raises(ValueError, match=r"grid is no square but 4 x 3"):
            snella.export(adapted(base), tmp_path / out, like=ASSETS / name)
        return
    snella.export(adapted(base), tmp_path / out, like=ASSETS / name)
    again = vit.load(tmp_path / out)
    same(again, snella.merge(adapted(base)))
    assert again.config.num_classes == 12 and again.config.image_hw == image


@pytest.mark.parametrize("name", [name for name in SOURCES if "staged" in name])
def test_a_new_head_size_and_window_of_models_with_stages(name, tmp_path):
    out, options = SOURCES[name]
    window = {"window": 5} if "swin" in name else {}
    base = models.load(ASSETS / name, num_classes=8, image_size=(90, 84), **window)
    features = base.config.widths[-1]
    base.head.kernel[...] = jax.random.normal(jax.random.key(0), (features, 8))
    base.head.bias[...] = jnp.arange(8.0)
    models.export(base, tmp_path / out, like=ASSETS / name)
    again = models.load(tmp_path / out)
    same(again, base)
    if (tmp_path / out).is_dir():
        assert again.config == base.config
        said = json.loads((tmp_path / out / "config.json").read_text("utf-8"))
        assert said["image_size"] == [90, 84] and len(said["id2label"]) == 8
        assert said.get("window_size", 5) == 5
    elif window:
        tensors = read(tmp_path / out).tensors
        (index,) = {v.tobytes(): v for k, v in tensors.items() if "index" in k}.values()
        assert index.shape == (25, 25) and index.min() == 0 and index.max() == 80
    none = models.load(ASSETS / name, num_classes=0, **options)
    models.export(none, tmp_path / "no_head" / out, like=ASSETS / name)
    again = models.load(tmp_path / "no_head" / out)
    same(again, none)
    assert again.config.num_classes == 0


def test_what_only_pretraining_has_goes_with_a_new_head(tmp_path):
    """A Swin of SimMIM: its mask and its decoder."""
    tensors = dict(read(ASSETS / "staged/swin").tensors)
    tensors |= {
        "swin.embeddings.mask_token": np.ones((1, 1, 4), np.float32),
        "decoder.0.weight": np.ones((4, 16, 1, 1), np.float32),
    }
    del tensors["classifier.weight"], tensors["classifier.bias"]
    source = shutil.copytree(ASSETS / "staged/swin", tmp_path / "simmim")
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text("utf-8"))
    config |= {"architectures": ["SwinForMaskedImageModeling"]}
    (source / "config.json").write_text(json.dumps(config), "utf-8")

    def written(name, classes):
        model = models.load(source, num_classes=classes)
        models.export(model, tmp_path / name, like=source)
        made = read(tmp_path / name)
        return made.tensors.keys(), made.config["architectures"]

    assert written("none", 0) == (tensors.keys(), ["SwinForMaskedImageModeling"])
    expected = read(ASSETS / "staged/swin").tensors.keys()
    assert written("head", 3) == (expected, ["SwinForImageClassification"])


def test_what_shapes_do_not_say_goes_into_the_config(tmp_path):
    for name, changes in (
        ("vit/classifier", {"heads": 3, "norm_eps": 1e-3}),
        ("staged/convnext", {"norm_eps": 1e-3}),
    ):
        model = models.load(ASSETS / name, **changes)
        models.export(model, tmp_path / name, like=ASSETS / name)
        assert models.load(tmp_path / name).config == model.config
    small = swin.SwinConfig(4, (2, 4, 2), (2, 2, 4), 3, image_size=48, num_classes=3)
    model = swin.Swin(small, rngs=nnx.Rngs(0))
    models.export(model, tmp_path / "swin", like=ASSETS / "staged/swin")
    said = json.loads((tmp_path / "swin" / "config.json").read_text("utf-8"))
    assert said["num_heads"] == [2, 2, 4] and said["image_size"] == 48


def test_large_models_are_written_in_shards(tmp_path):
    model = vit.load(VIT / "classifier")
    models.export(
        model, tmp_path / "out", like=VIT / "classifier", max_shard_bytes=4000
    )
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads(
        (tmp_path / "out/model.safetensors.index.json").read_text("utf-8")
    )
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    sizes = [sum(t.nbytes for t in read(path).tensors.values()) for path in shards]
    largest = max(t.nbytes for t in read(tmp_path / "out").tensors.values())
    assert max(sizes) <= max(4000, largest)
    assert index["metadata"]["total_size"] == sum(sizes)
    same(vit.load(tmp_path / "out"), model)


@pytest.mark.parametrize("name", ["vit/original.npz", "vit/classifier"])
def test_bfloat16_is_written_as_it_is(name, tmp_path, caplog):
    out, _ = SOURCES[name]
    model = adapted(vit.load(ASSETS / name, param_dtype=jnp.bfloat16))
    snella.export(model, tmp_path / out, like=ASSETS / name)
    assert "of its moved weights to rounding" in caplog.text
    again = vit.load(tmp_path / out, param_dtype=jnp.bfloat16)
    same(again, snella.merge(model))
    tensors = read(tmp_path / out).tensors
    assert {str(t.dtype) for t in tensors.values()} <= {"bfloat16", "float32"}


def test_an_npz_holds_the_weights_alone(tmp_path, monkeypatch):
    """NumPy before 2.2 takes options of `savez` that it lacks for arrays."""
    written = {}
    monkeypatch.setattr(np, "savez", lambda file, **arrays: written.update(arrays))
    original = VIT / "original.npz"
    models.export(vit.load(original), tmp_path / "a.npz", like=original)
    assert written.keys() == np.load(original).keys()


def test_what_never_moved_is_exported_where_one_says_so(tmp_path):
    config = snella.SnellaConfig(rank=4, targets=r"blocks/.*/fc1", trainable="head")
    model = snella.adapt(vit.load(VIT / "classifier"), config, rngs=nnx.Rngs(0))
    with pytest.raises(snella.BudgetsNeverMoved, match="unmoved_budgets=True"):
        snella.export(model, tmp_path / "a", like=VIT / "classifier")
    snella.export(model, tmp_path / "a", like=VIT / "classifier", unmoved_budgets=True)
    same(models.load(tmp_path / "a"), snella.merge(model, unmoved_budgets=True))


def test_what_cannot_be_written_is_said(tmp_path):
    model = vit.load(VIT / "classifier")
    with pytest.raises(snella.CheckpointError, match="cannot be written as ONNX"):
        models.export(model, tmp_path / "a", like=VIT / "dinov2.onnx")
    with pytest.raises(ValueError, match=r"expected \.npz or \.safetensors"):
        models.export(model, tmp_path / "a.pth", like=VIT / "original.npz")
    with pytest.raises(FileNotFoundError):
        models.export(model, tmp_path / "a", like=tmp_path / "nothing")
    for config, message in (
        (vit.ViTConfig(8, 3, 2, image_size=32), r"the model has \[\(1, 1, 8\)\], the"),
        (vit.ViTConfig(12, 1, 2, mlp_dim=24, patch_size=4), "has no blocks/1"),
    ):
        other = vit.ViT(config, rngs=nnx.Rngs(0))
        with pytest.raises(snella.CheckpointError, match=message):
            models.export(other, tmp_path / "a", like=VIT / "classifier")
    deep = vit.load(VIT / "dinov2", heads=2)
    with pytest.raises(snella.CheckpointError, match="it has no place for blocks/0/sc"):
        models.export(deep, tmp_path / "a.npz", like=VIT / "original.npz")
    mean = vit.load(VIT / "classifier", pool="mean", num_classes=2)
    with pytest.raises(ValueError, match="no ViT with a head on the mean"):
        models.export(mean, tmp_path / "a", like=VIT / "classifier")
    staged = models.load(ASSETS / "staged/swin", stacked=False)
    with pytest.raises(snella.CheckpointError, match=r"norm\.bias: there is no place"):
        models.export(model, tmp_path / "a.npz", like=ASSETS / "staged/swin.pth")
    small = models.load(ASSETS / "staged/swin", image_size=32)
    with pytest.raises(ValueError, match="the last grid is 2 x 2, and other programs"):
        models.export(small, tmp_path / "a", like=ASSETS / "staged/swin")
    with pytest.raises(snella.CheckpointError, match="no ConvNeXt of a known format"):
        abstract = nnx.eval_shape(lambda: models.create("convnext_b", rngs=nnx.Rngs(0)))
        models.export(abstract, tmp_path / "a", like=ASSETS / "staged/swin")
    staged.blocks[1] = nnx.List(staged.blocks[1][:1])
    with pytest.raises(snella.CheckpointError, match="has no blocks/1/2/attn/out"):
        models.export(staged, tmp_path / "a", like=ASSETS / "staged/swin")
    with pytest.raises(TypeError, match="Linear is no model of snella_jax"):
        linear: Any = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        models.export(linear, tmp_path / "a", like=VIT / "classifier")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="expected a new folder"):
        models.export(model, tmp_path / "full", like=VIT / "classifier")
    (tmp_path / "there.npz").touch()
    with pytest.raises(FileExistsError, match="expected a new file"):
        models.export(model, tmp_path / "there.npz", like=VIT / "classifier")
    with pytest.raises(TypeError, match="is no model of snella_jax"):
        snella.export(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path / "a", like=VIT)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "there.npz"}


@pytest.mark.reference
@pytest.mark.parametrize(
    ("name", "classes", "pool"),
    [
        *itertools.product(VIT_FOLDERS, [0, 12], ["cls"]),
        ("vit/dinov2", 12, "mean"),
    ],
)
def test_transformers_loads_it(name, classes, pool, tmp_path):
    import torch
    from transformers import AutoModel, AutoModelForImageClassification

    _, options = SOURCES[name]
    base = vit.load(ASSETS / name, num_classes=classes, pool=pool, **options)
    if classes:
        base.head.kernel[...] = jax.random.normal(jax.random.key(0), (12, classes))
        base.head.bias[...] = jnp.arange(1.0 * classes)
    model = adapted(base)
    snella.export(model, tmp_path / "out", like=ASSETS / name, max_shard_bytes=9000)
    kind = AutoModelForImageClassification if classes else AutoModel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, said = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    missing = [key for key in said["missing_keys"] if "pooler" not in key]
    assert not missing and not said["unexpected_keys"] and not said["mismatched_keys"]
    pixels = images(name)
    with torch.no_grad():
        outputs = theirs.eval()(torch.tensor(pixels).permute(0, 3, 1, 2))
    if classes:
        found, expected = outputs.logits, model(pixels)
        assert theirs.config.num_labels == classes
    else:
        found, expected = outputs.last_hidden_state, model.features(pixels)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("staged/swin", {}),
        ("staged/swin", {"window": 5}),
        ("staged/convnext", {}),
    ],
)
@pytest.mark.parametrize("classes", [0, 7])
def test_transformers_loads_models_with_stages(name, options, classes, tmp_path):
    """With an image size of which the last grid is a window at least."""
    import torch
    from transformers import AutoModel, AutoModelForImageClassification

    size = (90, 84)
    base = models.load(ASSETS / name, num_classes=classes, image_size=size, **options)
    if classes:
        key = jax.random.key(0)
        base.head.kernel[...] = jax.random.normal(key, base.head.kernel.shape)
    model = adapted(base)
    snella.export(model, tmp_path / "out", like=ASSETS / name)
    kind = AutoModelForImageClassification if classes else AutoModel
    theirs, said = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    # Until 5.15 it saves a buffer that ours does not have.
    assert all("relative_position_index" in name for name in said["missing_keys"])
    assert not said["unexpected_keys"] and not said["mismatched_keys"]
    assert type(theirs).__name__ == kind_of(base)
    pixels = np.asarray(jax.random.normal(jax.random.key(1), (2, *size, 3)))
    with torch.no_grad():
        outputs = theirs.eval()(torch.tensor(pixels).permute(0, 3, 1, 2))
    found = outputs.logits if classes else outputs.pooler_output
    np.testing.assert_allclose(found.numpy(), called(model, pixels), rtol=0, atol=1e-5)
