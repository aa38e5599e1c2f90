"""Published formats of ViT weights: parity with transformers, strictness, bad files.

`tests/data/vit/make.py` made the files and says what is in them.
"""

import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snella_jax.models import grid, torch_file, vit
from snella_jax.models.checkpoint_error import CheckpointError

DATA = Path(__file__).parent / "data" / "vit"
EXPECTED = dict(np.load(DATA / "expected.npz"))
# The files of one set of weights; a width of 12 does not say how many heads there are.
SAME = {
    "classifier": {},
    "classifier/model.safetensors": {"heads": 2, "norm_eps": 1e-6},
    "pooled": {},
    "mae.pth": {"heads": 2},
    "moco.pth.tar": {"heads": 2},
    "original.npz": {},
}


HEADS = {"heads": 2}


def close(got, name):
    np.testing.assert_allclose(got, EXPECTED[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", SAME)
def test_every_format_gives_the_tokens_of_transformers(name, stacked):
    model = vit.load(DATA / name, stacked=stacked, **SAME[name])
    images = EXPECTED["images"]
    close(model.features(images), "tokens")
    close(model.features(images, layers=(2, 1))[1], "layer_1")
    has_head = name not in ("pooled", "mae.pth")
    assert model.config.num_classes == 3 * has_head
    if has_head:
        close(model(images), "logits")
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}
    assert dtypes == {jnp.dtype("float32")}


def test_dinov2_also_at_another_size():
    images, large = EXPECTED["images"], EXPECTED["large"]
    close(vit.load(DATA / "dinov2").features(images), "dinov2_tokens")
    model = vit.load(DATA / "dinov2", image_size=(28, 24))
    assert model.config.grid == (7, 6) and model.config.layer_scale == 1
    close(model.features(large), "dinov2_large")


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
    close(model.features(EXPECTED["images"]), "tokens")


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
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        vit.load(tmp_path)
    with pytest.raises(CheckpointError, match="give heads"):
        vit.load(DATA / "mae.pth")
    with pytest.raises(ValueError, match="image_size=30 is not a multiple"):
        vit.load(DATA / "classifier", image_size=30)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("head/bias", np.float32(1), r"head/bias \[1\]: the tensor for it is \[\]"),
        ("{0}/query/kernel", np.ones((12, 7, 1)), "heads=7 does not divide width=12"),
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
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ModuleNotFoundError, match=r'"snella-jax\[checkpoints\]"'):
        vit.load(DATA / "dinov2")


def test_a_layer_that_does_not_exist():
    with pytest.raises(ValueError, match=r"layers=\(3,\): there are 0 to 2"):
        vit.load(DATA / "dinov2").features(EXPECTED["images"], layers=(3,))


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
        torch_file._tensor(np.ones(4, np.float32), offset, size, stride)


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
    "name", ["mae.pth", "original.npz", "pooled/model.safetensors"]
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
