"""Files that are no ViT, in parts, changed or damaged: refused by name, or read."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
import pytest
from flax import nnx
from places import ASSETS
from safetensors.numpy import load_file, save_file

from snella_jax.files.errors import CheckpointError
from snella_jax.models import vit
from snella_jax.models.checkpoints import position_grid

DATA = ASSETS / "vit"
EXPECTED = dict(np.load(DATA / "expected.npz"))
# A width of 12 does not say how many heads there are.
HEADS = {"heads": 2}


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_every_problem_is_listed_at_once(tmp_path):
    arrays = dict(np.load(DATA / "original.npz"))
    block = "Transformer/encoderblock_1"
    del arrays[f"{block}/LayerNorm_0/scale"]
    arrays["extra"] = np.ones(3)
    arrays[f"{block}/MlpBlock_3/Dense_1/bias"] = np.ones(5)
    arrays["head/bias"] = np.arange(3)  # integers
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(CheckpointError) as error:
        vit.load(tmp_path / "bad.npz")
    for line in (
        f"{tmp_path / 'bad.npz'}: it does not fit the model",
        "extra [3]: there is no place for it",
        "blocks/1/norm1/scale [12]: there is no tensor for it",
        "blocks/1/mlp/fc2/bias [12]: the tensor for it is [5]",
        "head/bias [3]: expected floating-point numbers, not int64",
    ):
        assert line in str(error.value)


def rewritten(tmp_path, name, tensors):
    np.savez(tmp_path / name, **tensors)
    return tmp_path / name


def test_what_is_no_vit(tmp_path):
    other = rewritten(tmp_path, "other.npz", {"conv1/kernel": np.ones((3, 3))})
    with pytest.raises(
        CheckpointError, match=r"no ViT of a known format.*conv1/kernel"
    ):
        vit.load(other)
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"unknown kind of file '\.h5'"):
        vit.load(tmp_path / "weights.h5")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        vit.load(tmp_path / "nothing.npz")
    with pytest.raises(
        FileNotFoundError, match=r"has none of model\.safetensors, .*pytorch_model\.bin"
    ):
        vit.load(tmp_path)
    with pytest.raises(CheckpointError, match="give heads"):
        vit.load(DATA / "mae.pth")
    with pytest.raises(ValueError, match="image_size=30 is not a multiple"):
        vit.load(DATA / "classifier", image_size=30)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("head/bias", np.float32(1), r"head/bias \[1\]: the tensor for it is \[\]"),
        ("{0}/query/kernel", np.ones((12, 7, 1)), r"different numbers of heads: \{.*7"),
        ("{0}/out/kernel", np.float32(1), r"out/kernel \[\]: tuple index out of range"),
        ("cls", np.ones(5), r"cls_token \[1, 1, 12\]: the tensor for it is \[5\]"),
        ("embedding/kernel", np.ones((4, 4)), "unexpected shapes"),
        ("Transformer/encoderblock_99999999/LayerNorm_0/bias", np.ones(12), "99999999"),
    ],
)
def test_shapes_of_another_rank(name, array, message, tmp_path):
    arrays = dict(np.load(DATA / "original.npz"))
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    arrays[name.format(attention)] = array
    with pytest.raises(CheckpointError, match=message) as error:
        vit.load(rewritten(tmp_path, "rank.npz", arrays))
    assert "rank.npz" in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r'"snella-jax\[demo\]"'):
        vit.load(DATA / "dinov2.onnx")


def changed_folder(tmp_path, file="config.json", **changes):
    folder = shutil.copytree(DATA / "classifier", tmp_path / "changed")
    path = folder / file
    config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(config | changes), "utf-8")
    return folder


def test_a_grid_that_is_no_square_is_taken_from_the_config(tmp_path):
    folder = changed_folder(tmp_path, image_size=[8, 32])
    tensors = load_file(folder / "model.safetensors")
    name = "vit.embeddings.position_embeddings"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :17])
    save_file(tensors, folder / "model.safetensors")
    model = vit.load(folder)
    assert model.config.grid == (2, 8)
    resized = vit.load(folder, image_size=(16, 32)).pos_embed[...][0, 1:]
    expected = position_grid.resize(tensors[name][0, 1:].reshape(2, 8, 12), (4, 8))
    np.testing.assert_allclose(resized, expected.reshape(32, 12), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "exact GELU"),
        ({"image_size": 24}, "25 positions of patches, expected a grid of 6 x 6"),
        ({"num_attention_heads": "2"}, "heads='2': expected numbers"),
        ({"num_attention_heads": -2}, "heads=-2: expected at least 1"),
        ({"layer_norm_eps": None}, "norm_eps=None: expected numbers"),
        ({"file": "preprocessor_config.json", "image_mean": "abc"}, "pixel_mean='abc'"),
        (
            {"file": "preprocessor_config.json", "image_std": [1, 1]},
            "expected 3 numbers",
        ),
    ],
)
def test_a_config_that_cannot_be(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as error:
        vit.load(changed_folder(tmp_path, **changes))
    assert "changed" in str(error.value)


def test_pixels_that_are_not_normalised_and_integers(tmp_path):
    folder = changed_folder(tmp_path, "preprocessor_config.json", do_normalize=False)
    model, half = vit.load(folder), jnp.full((1, 1, 1, 3), 0.5)
    np.testing.assert_array_equal(model.normalise(half), half)
    with pytest.raises(TypeError, match="divide by 255"):
        model.normalise(jnp.ones((1, 1, 1, 3), jnp.uint8))


def test_folders_of_shards_and_of_pytorch_files(tmp_path):
    folder = shutil.copytree(DATA / "classifier", tmp_path / "shards")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for part in set(files.values()):
        own = {name: tensors[name] for name, file in files.items() if file == part}
        save_file(own, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}), "utf-8")
    close(vit.load(folder).features(EXPECTED["images"]), EXPECTED["tokens"])
    name = next(name for name, file in files.items() if file == "part-0.safetensors")
    other = load_file(folder / "part-1.safetensors")  # with an old copy of a tensor
    save_file(other | {name: tensors[name] + 7}, folder / "part-1.safetensors")
    close(vit.load(folder).features(EXPECTED["images"]), EXPECTED["tokens"])
    save_file(other, folder / "part-1.safetensors")
    index.write_text(
        json.dumps({"weight_map": files | {name: "part-1.safetensors"}}), "utf-8"
    )
    with pytest.raises(
        CheckpointError, match=rf"{name} in part-1.*but it is in part-0"
    ):
        vit.load(folder)
    tied = files | {"tied.weight": "part-0.safetensors"}  # which converters drop
    index.write_text(json.dumps({"weight_map": tied}), "utf-8")
    close(vit.load(folder).features(EXPECTED["images"]), EXPECTED["tokens"])
    for bad in ([], None, {"x": 3}, {"x": "../x"}, {"x": "nowhere.safetensors"}):
        index.write_text(json.dumps({"weight_map": bad}), "utf-8")
        with pytest.raises(CheckpointError, match=r"weight_map|it names"):
            vit.load(folder)
    index.write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match=r"index\.json: damaged"):
        vit.load(folder)
    index.unlink()
    shutil.copy(DATA / "mae.pth", folder / "pytorch_model.bin")
    (folder / "config.json").unlink()
    close(vit.load(folder, **HEADS).features(EXPECTED["images"]), EXPECTED["tokens"])


def test_a_folder_of_half_precision_alone(tmp_path):
    """Diffusers' names of files; with others beside them those are taken."""
    folder = shutil.copytree(DATA / "classifier", tmp_path / "half")
    tensors = load_file(folder / "model.safetensors")
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    save_file(half, folder / "model.fp16.safetensors")
    close(vit.load(folder).features(EXPECTED["images"]), EXPECTED["tokens"])
    (folder / "model.safetensors").unlink()
    found = vit.load(folder).features(EXPECTED["images"])
    assert 0 < np.abs(found - EXPECTED["tokens"]).max() < 0.02
    shutil.move(folder / "model.fp16.safetensors", folder / "part.safetensors")
    index = folder / "model.safetensors.index.fp16.json"
    files = dict.fromkeys(half, "part.safetensors")
    index.write_text(json.dumps({"weight_map": files}), "utf-8")
    np.testing.assert_array_equal(vit.load(folder).features(EXPECTED["images"]), found)


def test_an_option_that_no_config_has_is_no_fault_of_the_file():
    with pytest.raises(ValueError, match=r"^ViTConfig has no hats\.$"):
        vit.load(DATA / "classifier", hats=2)


def test_two_tensors_of_one_name(tmp_path):
    arrays = dict(np.load(DATA / "original.npz"))
    arrays["opt/target/cls"] = arrays["cls"]
    with pytest.raises(CheckpointError, match="differ by the prefix 'opt/target/'"):
        vit.load(rewritten(tmp_path, "twice.npz", arrays))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": -20}, "image_size=-20"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"heads": 0}, "heads=0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        vit.load(DATA / "original.npz", **options)


def test_bfloat16_is_read_from_npz(tmp_path):
    arrays = dict(np.load(DATA / "original.npz"))
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    path = rewritten(tmp_path, "half.npz", half)
    assert np.load(path)["cls"].dtype == np.dtype("V2")  # what NumPy makes of it
    got = vit.load(path).features(EXPECTED["images"])
    np.testing.assert_allclose(got, EXPECTED["tokens"], atol=0.1)


def changed_onnx(tmp_path, change):
    model = onnx.load(DATA / "dinov2.onnx")
    change(model.graph)
    path = tmp_path / "changed.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def initialiser(graph, place):
    """The tensor that a node whose name ends like this uses."""
    (node,) = [node for node in graph.node if node.name.endswith(place)]
    return next(t for t in graph.initializer if t.name == node.input[1])


def test_an_onnx_file_is_read_strictly(tmp_path):
    def transposed(graph):
        tensor = initialiser(graph, "layer.0/mlp/fc1/MatMul")
        tensor.dims[:] = tensor.dims[::-1]

    def without(graph):
        graph.initializer.remove(initialiser(graph, "layer.2/mlp/fc1/MatMul"))

    def twice(graph):
        graph.initializer.append(initialiser(graph, "layer.2/mlp/fc1/MatMul"))

    def unused(graph):
        graph.initializer[3].name = "onnx::Nobody_7"

    def positions(graph):
        initialiser(graph, "embeddings/Concat").dims[:] = [1, 2, 6]

    def elsewhere(graph):
        graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL

    for change, message in (
        (
            transposed,
            r"blocks/1/mlp/fc1/kernel \[12, 12\]: the tensor for it is \[12, 24\]",
        ),
        (without, r"blocks/2/mlp/fc1/kernel \[12, 24\]: there is no tensor for it"),
        (
            twice,
            r"two tensors are called backbone\.encoder\.layer\.2\.mlp\.fc1\.MatMul",
        ),
        (unused, "onnx::Nobody_7, which no node uses"),
        (positions, "its positions do not fit"),
        (elsewhere, "is in another file"),
    ):
        path = changed_onnx(tmp_path, change)
        with pytest.raises(CheckpointError, match=message) as error:
            vit.load(path, **HEADS)
        assert "changed.onnx" in str(error.value)


@pytest.mark.parametrize(
    "name", ["mae.pth", "original.npz", "pooled/model.safetensors", "dinov2.onnx"]
)
def test_damaged_files_are_named(name, tmp_path):
    """100 files cut or with bits flipped: an error with the name, or right shapes."""
    source = (DATA / name).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / Path(name).name
    shapes = jax.tree.map(jnp.shape, nnx.state(vit.load(DATA / name, **HEADS)))
    refused = 0
    for turn in range(100):
        damaged = bytearray(source)
        if turn % 4 == 0:
            del damaged[rng.integers(len(source)) :]
        else:  # where the names and shapes are, more often than not
            end = len(source) if turn % 4 == 1 else 3000
            for at in rng.integers(min(end, len(source)), size=1 + turn % 5):
                damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            model = vit.load(path, **HEADS)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert jax.tree.map(jnp.shape, nnx.state(model)) == shapes
    assert refused > 25


def test_swapped_names_do_not_load(tmp_path):
    arrays = dict(np.load(DATA / "original.npz"))
    a, b = "cls", "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"
    arrays[a], arrays[b] = arrays[b], arrays[a]
    with pytest.raises(CheckpointError):
        vit.load(rewritten(tmp_path, "swapped.npz", arrays))
