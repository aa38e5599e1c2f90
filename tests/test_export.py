"""Merged weights in the format of the base: read again by us, and by transformers."""

import itertools
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snella_jax as snella
from snella_jax.models import vit
from snella_jax.models.loading import read

DATA = Path(__file__).parent / "data" / "vit"
IMAGES = np.load(DATA / "expected.npz")["images"]
HEADS = {"heads": 2}
SOURCES = {
    "original.npz": ("out.npz", {}),
    "classifier": ("out", {}),
    "pooled": ("out", {}),
    "dinov2": ("out", HEADS),
    "mae.pth": ("out.safetensors", HEADS),
    "moco.pth.tar": ("out.safetensors", HEADS),
}


def adapted(base, **changes):
    config = snella.SnellaConfig(
        **({"rank": 4, "allocation": "fixed", "trainable": ""} | changes)
    )
    return snella.adapt(base, config, rngs=nnx.Rngs(1))


def same(one, other):
    one, other = (dict(nnx.to_flat_state(nnx.state(model))) for model in (one, other))
    assert one.keys() == other.keys()
    for path, variable in one.items():
        np.testing.assert_array_equal(variable[...], other[path][...], str(path))
        assert variable.dtype == other[path].dtype


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", SOURCES)
def test_what_is_written_is_what_was_merged(name, stacked, tmp_path):
    out, options = SOURCES[name]
    options = options | {"stacked": stacked}
    model = adapted(vit.load(DATA / name, **options))
    snella.export(model, tmp_path / out, like=DATA / name)
    again = vit.load(tmp_path / out, **options)
    same(again, snella.merge(model))
    np.testing.assert_allclose(again(IMAGES), model(IMAGES), rtol=0, atol=1e-5)
    base = vit.load(DATA / name, **options)
    assert np.abs(np.asarray(again(IMAGES) - base(IMAGES))).max() > 1e-3


@pytest.mark.parametrize("name", SOURCES)
def test_a_model_that_did_not_change_is_the_file_that_it_was(name, tmp_path):
    out, options = SOURCES[name]
    vit.export(vit.load(DATA / name, **options), tmp_path / out, like=DATA / name)
    found, expected = (dict(read(p).tensors) for p in (tmp_path / out, DATA / name))
    for tensors in (found, expected):
        for dropped in ("pooler", "vit.pooler"):
            for end in ("weight", "bias"):
                tensors.pop(f"{dropped}.dense.{end}", None)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_array_equal(found[tensor], value, tensor)


@pytest.mark.parametrize("name", [n for n in SOURCES if n != "dinov2"])
@pytest.mark.parametrize("size", [(16, 12), (24, 24)])
def test_a_new_head_and_another_size(name, size, tmp_path):
    out, options = SOURCES[name]
    old = vit.load(DATA / name, **options).config
    patch = old.patch_hw
    image = (patch[0] * size[0] // 4, patch[1] * size[1] // 4)
    base = vit.load(DATA / name, num_classes=12, image_size=image, **options)
    assert base.config.width == 12  # a square head: which way round?
    base.head.kernel[...] = jax.random.normal(jax.random.key(0), (12, 12))
    base.head.bias[...] = jnp.arange(12.0)
    snella.export(adapted(base), tmp_path / out, like=DATA / name)
    options = options | {"heads": base.config.heads}
    if image[0] // patch[0] != image[1] // patch[1] and (tmp_path / out).is_file():
        return  # a lone file cannot say that its grid is no square
    again = vit.load(tmp_path / out, **options)
    same(again, snella.merge(adapted(base)))
    assert again.config.num_classes == 12 and again.config.image_hw == image


def test_large_models_are_written_in_shards(tmp_path):
    model = vit.load(DATA / "classifier")
    vit.export(model, tmp_path / "out", like=DATA / "classifier", max_shard_bytes=4000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    sizes = [sum(t.nbytes for t in read(path).tensors.values()) for path in shards]
    largest = max(t.nbytes for t in read(tmp_path / "out").tensors.values())
    assert max(sizes) <= max(4000, largest)
    assert index["metadata"]["total_size"] == sum(sizes)
    same(vit.load(tmp_path / "out"), model)


@pytest.mark.parametrize("name", ["original.npz", "classifier"])
def test_bfloat16_is_written_as_it_is(name, tmp_path, caplog):
    out, _ = SOURCES[name]
    model = adapted(vit.load(DATA / name, param_dtype=jnp.bfloat16))
    snella.export(model, tmp_path / out, like=DATA / name)
    assert "of its moved weights to rounding" in caplog.text
    again = vit.load(tmp_path / out, param_dtype=jnp.bfloat16)
    same(again, snella.merge(model))
    tensors = read(tmp_path / out).tensors
    assert {str(t.dtype) for t in tensors.values()} <= {"bfloat16", "float32"}


def test_what_cannot_be_written_is_said(tmp_path):
    model = vit.load(DATA / "classifier")
    with pytest.raises(snella.CheckpointError, match="cannot be written as ONNX"):
        vit.export(model, tmp_path / "a", like=DATA / "dinov2.onnx")
    with pytest.raises(ValueError, match=r"expected \.npz or \.safetensors"):
        vit.export(model, tmp_path / "a.pth", like=DATA / "original.npz")
    with pytest.raises(FileNotFoundError):
        vit.export(model, tmp_path / "a", like=tmp_path / "nothing")
    for config, message in (
        (vit.ViTConfig(8, 3, 2, image_size=32), r"the model has \[\(1, 1, 8\)\], the"),
        (vit.ViTConfig(12, 1, 2, mlp_dim=24, patch_size=4), "has no blocks/1"),
    ):
        other = vit.ViT(config, rngs=nnx.Rngs(0))
        with pytest.raises(snella.CheckpointError, match=message):
            vit.export(other, tmp_path / "a", like=DATA / "classifier")
    deep = vit.load(DATA / "dinov2", heads=2)
    with pytest.raises(snella.CheckpointError, match="it has no place for blocks/0/sc"):
        vit.export(deep, tmp_path / "a.npz", like=DATA / "original.npz")
    mean = vit.load(DATA / "classifier", pool="mean", num_classes=2)
    with pytest.raises(ValueError, match="no ViT with a head on the mean"):
        vit.export(mean, tmp_path / "a", like=DATA / "classifier")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="expected a new folder"):
        vit.export(model, tmp_path / "full", like=DATA / "classifier")
    (tmp_path / "there.npz").touch()
    with pytest.raises(FileExistsError, match="expected a new file"):
        vit.export(model, tmp_path / "there.npz", like=DATA / "classifier")
    with pytest.raises(TypeError, match="is no ViT of snella_jax"):
        snella.export(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path / "a", like=DATA)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "there.npz"}


@pytest.mark.reference
@pytest.mark.parametrize(
    ("name", "classes", "pool"),
    [
        *itertools.product(["classifier", "pooled", "dinov2"], [0, 12], ["cls"]),
        ("dinov2", 12, "mean"),
    ],
)
def test_transformers_loads_it(name, classes, pool, tmp_path):
    import torch
    from transformers import AutoModel, AutoModelForImageClassification

    _, options = SOURCES[name]
    base = vit.load(DATA / name, num_classes=classes, pool=pool, **options)
    if classes:
        base.head.kernel[...] = jax.random.normal(jax.random.key(0), (12, classes))
        base.head.bias[...] = jnp.arange(1.0 * classes)
    model = adapted(base)
    snella.export(model, tmp_path / "out", like=DATA / name, max_shard_bytes=9000)
    kind = AutoModelForImageClassification if classes else AutoModel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, said = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    missing = [key for key in said["missing_keys"] if "pooler" not in key]
    assert not missing and not said["unexpected_keys"] and not said["mismatched_keys"]
    images = torch.tensor(IMAGES).permute(0, 3, 1, 2)
    with torch.no_grad():
        outputs = theirs.eval()(images)
    if classes:
        found, expected = outputs.logits, model(IMAGES)
        assert theirs.config.num_labels == classes
    else:
        found, expected = outputs.last_hidden_state, model.features(IMAGES)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)
