"""Published formats of ViT weights: parity with transformers, strictness, bad files.

`tests/data/vit/make.py` made the files and says what is in them.
"""

import importlib.util
import json
import os
import pickle
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from snella_jax.models import grid, torch_file, vit
from snella_jax.models.checkpoint_error import CheckpointError

DATA = Path(__file__).parent / "data" / "vit"
EXPECTED = dict(np.load(DATA / "expected.npz"))
# The files of one set of weights; a width of 12 does not say how many heads there are.
HEADS = {"heads": 2}
SAME = {
    "classifier": {},
    "classifier/model.safetensors": {"norm_eps": 1e-6, **HEADS},
    "pooled": {},
    "mae.pth": HEADS,
    "moco.pth.tar": HEADS,
    "original.npz": {},
}


@pytest.fixture(
    scope="module",
    params=["committed", pytest.param("fresh", marks=pytest.mark.reference)],
)
def folder(request, tmp_path_factory):
    """The files and numbers beside this test, or others that transformers makes now."""
    if request.param == "committed":
        return DATA
    spec = importlib.util.spec_from_file_location("make", DATA / "make.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    folder = tmp_path_factory.mktemp("vit")
    with warnings.catch_warnings():  # of torch and transformers, not ours
        warnings.simplefilter("ignore")
        make.main(folder, seed=1)
    return folder


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", SAME)
def test_every_format_gives_the_tokens_of_transformers(name, stacked, folder):
    model = vit.load(folder / name, stacked=stacked, **SAME[name])
    expected = np.load(folder / "expected.npz")
    images = expected["images"]
    close(model.features(images), expected["tokens"])
    close(model.features(images, layers=(2, 1))[1], expected["layer_1"])
    maps = model.attention_maps(images, layers=(2, 0))
    close(maps[0], expected["attention_2"])
    close(maps[1], expected["attention_0"])
    has_head = name not in ("pooled", "mae.pth")
    assert model.config.num_classes == 3 * has_head
    if has_head:
        close(model(images), expected["logits"])
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}
    assert dtypes == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["dinov2", "dinov2.onnx"])
def test_dinov2_also_at_another_size(name, folder):
    expected = np.load(folder / "expected.npz")
    model = vit.load(folder / name, **HEADS)
    close(model.features(expected["images"]), expected["dinov2_tokens"])
    model = vit.load(folder / name, image_size=(28, 24), **HEADS)
    assert model.config.grid == (7, 6) and model.config.layer_scale == 1
    close(model.features(expected["large"]), expected["dinov2_large"])


@pytest.mark.parametrize(
    ("name", "modules"), [("classifier", "vit"), ("dinov2", "dinov2")]
)
def test_every_module_is_that_of_transformers(name, modules, folder):
    """Each alone: the module's own input goes in."""
    model = vit.load(folder / name, stacked=False)
    block = model.blocks[1]
    ours = {
        "embed": model._embed,
        "norm1": block.norm1,
        "attn": block.attn,
        "norm2": block.norm2,
        "mlp": block.mlp,
        "block": block,
        "norm": model.norm,
    }
    seen = np.load(folder / f"modules_{modules}.npz")
    for module, run in ours.items():
        close(run(jnp.asarray(seen[f"{module}/in"])), seen[f"{module}/out"])


def test_normalisation_comes_with_the_weights(tmp_path):
    """ImageNet's for DINOv2, MAE, MoCo; 0.5 for the original; a folder's own first."""
    half = jnp.full((1, 1, 1, 3), 0.5)
    for name in ("original.npz", "classifier"):
        np.testing.assert_array_equal(vit.load(DATA / name).normalise(half), 0)
    for name in ("mae.pth", "moco.pth.tar", "dinov2"):
        model = vit.load(DATA / name, heads=2)
        expected = (0.5 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(model.normalise(half)[0, 0, 0], expected, rtol=1e-5)
    folder = shutil.copytree(DATA / "dinov2", tmp_path / "own")
    own = {"image_mean": [0.5, 0.25, 0.0], "image_std": [1.0, 2.0, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    got = vit.load(folder).normalise(half)
    np.testing.assert_allclose(got[0, 0, 0], [0, 0.125, 1])


def test_a_new_head_starts_at_zero_and_dtypes_are_chosen():
    model = vit.load(
        DATA / "classifier", num_classes=7, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
    )
    logits = model(EXPECTED["images"])
    assert logits.shape == (2, 7) and logits.dtype == jnp.bfloat16
    assert not np.any(logits)
    assert model.blocks.mlp.fc1.kernel.dtype == jnp.bfloat16
    without = vit.load(DATA / "original.npz", num_classes=0)
    np.testing.assert_allclose(
        without(EXPECTED["images"]), EXPECTED["tokens"][:, 0], atol=1e-5
    )


def test_pre_logits_go_with_the_old_head(tmp_path):
    arrays = dict(np.load(DATA / "original.npz"))
    arrays |= {"pre_logits/kernel": np.ones((12, 12)), "pre_logits/bias": np.ones(12)}
    # The augreg files have everything under opt/target/.
    np.savez(
        tmp_path / "in21k.npz", **{f"opt/target/{k}": v for k, v in arrays.items()}
    )
    with pytest.raises(CheckpointError, match=r"in21k\.npz: .*give num_classes"):
        vit.load(tmp_path / "in21k.npz")
    model = vit.load(tmp_path / "in21k.npz", num_classes=4)
    close(model.features(EXPECTED["images"]), EXPECTED["tokens"])


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


def test_a_layer_that_does_not_exist():
    model = vit.load(DATA / "dinov2")
    for run in (model.features, model.attention_maps):
        for layer in (3, -1):
            with pytest.raises(ValueError, match=rf"\({layer},\): there are 0 to 2"):
                run(EXPECTED["images"], layers=(layer,))


def test_bfloat16_is_read_from_npz(tmp_path):
    arrays = dict(np.load(DATA / "original.npz"))
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    path = rewritten(tmp_path, "half.npz", half)
    assert np.load(path)["cls"].dtype == np.dtype("V2")  # what NumPy makes of it
    got = vit.load(path).features(EXPECTED["images"])
    np.testing.assert_allclose(got, EXPECTED["tokens"], atol=0.1)


def test_heads_of_the_formats(tmp_path):
    """MoCo v3's ViT-S has twelve heads of 32 numbers, everybody else's six of 64."""
    for prefix, heads in (("", 6), ("module.", 12)):
        tensors = {f"{prefix}{name}": tensor for name, tensor in timm_small().items()}
        save_file(tensors, tmp_path / "small.safetensors")
        model = vit.load(tmp_path / "small.safetensors")
        assert model.config.heads == heads


def timm_small():
    """One block of a ViT-S/16 for images of 16 x 16 under timm's names, all zero."""
    block = {"norm1": (384,), "norm2": (384,), "attn.qkv": (1152, 384)}
    block |= {"attn.proj": (384, 384), "mlp.fc1": (1536, 384), "mlp.fc2": (384, 1536)}
    shapes = {"cls_token": (1, 1, 384), "pos_embed": (1, 2, 384)}
    layers = {f"blocks.0.{name}": shape for name, shape in block.items()}
    layers |= {"patch_embed.proj": (384, 3, 16, 16), "norm": (384,)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def test_a_timm_folder_brings_its_constants(tmp_path):
    tensors = {**timm_small(), "mask_token": np.zeros((1, 384), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    config = vit.load(tmp_path).config
    assert tuple(config.pixel_mean) == (0.5, 0.5, 0.5)
    assert tuple(config.pixel_std) == (0.25, 0.25, 0.25)


def test_maes_decoder_is_left_out(tmp_path):
    tensors = load_file(DATA / "pooled" / "model.safetensors")
    renamed = {f"vit.{name}": tensor for name, tensor in tensors.items()}
    renamed |= {"decoder.mask_token": np.zeros((1, 1, 8), np.float32)}
    save_file(renamed, tmp_path / "model.safetensors")
    shape = {"model_type": "vit_mae", "num_attention_heads": 2, "layer_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    model = vit.load(tmp_path)
    close(model.features(EXPECTED["images"]), EXPECTED["tokens"])
    assert model.config.pixel_std == (0.229, 0.224, 0.225)


def changed_folder(tmp_path, file="config.json", **changes):
    folder = shutil.copytree(DATA / "classifier", tmp_path / "changed")
    path = folder / file
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | changes))
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
    expected = grid.resize(tensors[name][0, 1:].reshape(2, 8, 12), (4, 8))
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
    index.write_text(json.dumps({"weight_map": files}))
    close(vit.load(folder).features(EXPECTED["images"]), EXPECTED["tokens"])
    for bad in ([], None, {"x": 3}, {"x": "../x"}, {"x": "nowhere.safetensors"}):
        index.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(CheckpointError, match=r"weight_map|it names"):
            vit.load(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json: damaged"):
        vit.load(folder)
    index.unlink()
    shutil.copy(DATA / "mae.pth", folder / "pytorch_model.bin")
    (folder / "config.json").unlink()
    close(vit.load(folder, **HEADS).features(EXPECTED["images"]), EXPECTED["tokens"])


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


def test_only_the_layers_that_are_asked_for_are_kept():
    """Not the tokens of every block, though they are scanned."""
    model = vit.load(DATA / "original.npz")
    images = EXPECTED["images"]
    kept = jax.make_jaxpr(lambda x: model.features(x, layers=(1,)))(images)
    scans = [e for e in kept.jaxpr.eqns if e.primitive.name == "scan"]
    shapes = [v.aval.shape for scan in scans for v in scan.outvars]
    assert (1, 2, 26, 12) in shapes and (3, 2, 26, 12) not in shapes


# ONNX


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


# PyTorch's files


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def torch_archive(path, saved):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(saved, protocol=2))
    return path


def test_nothing_in_a_file_is_executed(tmp_path):
    """Neither beside the weights nor deep inside an optimizer's state."""
    for saved in (
        Touch(tmp_path / "made"),
        {"optimizer": [{"x": Touch(tmp_path / "a")}]},
    ):
        path = torch_archive(tmp_path / "evil.pth", saved)
        with pytest.raises(CheckpointError, match=r"evil\.pth: it names \w+\.mkdir"):
            vit.load(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pth"]


def zipped(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", np.ones(4, np.float32).tobytes())
    return path


def test_a_file_cannot_change_what_it_names(tmp_path):
    """The pickle sets `__defaults__` of the function that makes tensors."""
    before = torch_file._tensor.__defaults__
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    pickled += b"N}X\x0c\x00\x00\x00__defaults__K\x07\x85s\x86b."
    function = torch_file.read(zipped(tmp_path / "sets.pth", pickled))
    assert function.__defaults__ == (7,)  # the file did what it could
    assert torch_file._tensor.__defaults__ is before


@pytest.mark.parametrize(
    "size, stride, offset",
    [
        ((5,), (1,), 0),
        ((2, 2), (3, 1), 0),
        ((4,), (1,), 1),
        ((2,), (-1,), 1),
        ((2**40,), (0,), 0),
        ((2, 2), (1,), 0),
    ],
)
def test_a_tensor_stays_in_its_storage(size, stride, offset):
    with pytest.raises(ValueError, match="a tensor of size"):
        storage = torch_file._Storage(np.ones(4, np.float32))
        torch_file._tensor(storage, offset, size, stride)


def test_a_tensor_is_no_storage():
    """A view that repeats one number would promise more than there is behind it."""
    storage = torch_file._Storage(np.ones(64, np.float32))
    repeated = torch_file._tensor(storage, 63, (64,), (0,))
    with pytest.raises(ValueError, match="something else than a storage"):
        torch_file._tensor(repeated, 0, (64,), (1,))


def test_tensors_of_one_storage_share_it(tmp_path):
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    pid += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    view = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"K%c(K\x02t(K\x01tt R"
    views = b"\x80\x02(" + b"".join(view.replace(b" ", b"") % i for i in (0, 1)) + b"t."
    first, second = torch_file.read(zipped(tmp_path / "two.pth", views))
    assert np.shares_memory(first, second)


def test_places_in_the_memo_have_no_gaps(tmp_path):
    """The unpickler would allocate 16 bytes for each place below the highest."""
    pickled = b"\x80\x02}r\x00\x00\x00\x04."
    with pytest.raises(CheckpointError, match="notes something at place 67108864"):
        torch_file.read(zipped(tmp_path / "memo.pth", pickled))


def test_a_file_cannot_change_a_storage_or_hang_methods_on_a_dict(tmp_path):
    kind = b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeK\x01sb."
    with pytest.raises(CheckpointError, match="it sets the state of a storage"):
        torch_file.read(zipped(tmp_path / "kind.pth", kind))
    hung = b"\x80\x02ccollections\nOrderedDict\n)R}X\x03\x00\x00\x00getK\x01sb."
    assert torch_file.read(zipped(tmp_path / "hung.pth", hung)).get("x") is None


def remade_archive(tmp_path, change):
    """`mae.pth` with members changed: `change` gives bytes and kind of compression."""
    source, path = zipfile.ZipFile(DATA / "mae.pth"), tmp_path / "remade.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for member in source.namelist():
            data, compression = change(member, source.read(member))
            archive.writestr(member, data, compression)
    return path


def test_storages_are_little_endian_and_uncompressed(tmp_path):
    stored, deflated = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED

    def big_endian(member, data):
        return (b"big" if member.endswith("byteorder") else data), stored

    def compressed(member, data):
        return data, deflated if "/data/" in member else stored

    for change, message in (
        (big_endian, "little-endian"),
        (compressed, "storage .* is compressed"),
    ):
        with pytest.raises(CheckpointError, match=message):
            vit.load(remade_archive(tmp_path, change), **HEADS)


def test_numbers_strings_and_containers_pass():
    saved = torch_file.read(DATA / "moco.pth.tar")
    assert (saved["epoch"], saved["arch"], saved["best"]) == (300, "vit_base", 1.0)
    assert saved["optimizer"]["param_groups"][0]["lr"] == 0.1


def test_a_file_without_tensors_or_of_the_old_format(tmp_path):
    path = torch_archive(tmp_path / "no.pth", {"model": {"x": 1}})
    with pytest.raises(CheckpointError, match="expected tensors by name"):
        vit.load(path)
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(CheckpointError, match=r"before PyTorch 1\.6"):
        vit.load(tmp_path / "old.pth")


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


def test_a_storage_that_is_too_short(tmp_path):
    """A tensor may not reach beyond its storage, whatever the pickle says."""
    source, path = zipfile.ZipFile(DATA / "mae.pth"), tmp_path / "short.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for member in source.namelist():
            data = source.read(member)
            archive.writestr(member, data[:-4] if member.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match=r"short\.pth: damaged .*does not hold"):
        vit.load(path)


# Position grids


def test_grid_equals_torchs_interpolate():
    """Numbers of torch 2.13's bicubic `interpolate` of `arange(6) ** 2`, 2 x 3."""
    values = (np.arange(6.0) ** 2).reshape(2, 3, 1)
    np.testing.assert_array_equal(grid.resize(values, (2, 3)), values)
    got = grid.resize(values, (3, 4))[..., 0]
    expected = [
        [
            -0.8156433105468733,
            -0.7471211751302058,
            0.6439310709635458,
            2.3550313313802134,
        ],
        [4.212890625, 6.3994140625, 11.1015625, 14.9306640625],
        [9.241424560546877, 13.545949300130214, 21.55919392903646, 27.506296793619796],
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
