"""The config files of a folder are obeyed, or refused by name."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from compiled import called
from places import ASSETS
from safetensors.numpy import load_file, save_file

from snella_jax import models
from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.read import read

IMAGES = np.load(ASSETS / "vit/expected.npz")["images"]
CONSTANTS = {"mean": [0.5, 0.25, 0.125], "std": [0.25, 0.5, 1.0]}
FOLDERS = ["vit/classifier", "vit/dinov2", "staged/swin", "staged/convnext"]


@pytest.fixture
def timm(tmp_path):
    """Loads weights under timm's names, 12 wide, with a config of timm's."""

    def load(name="vit/mae.pth", change=lambda tensors: tensors, images=None, **config):
        tensors = change(dict(read(ASSETS / name).tensors))
        tensors = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        said = {"architecture": "vit_tiny_patch16_224"} | config
        (tmp_path / "config.json").write_text(json.dumps(said), "utf-8")
        if images:
            (tmp_path / "preprocessor_config.json").write_text(
                json.dumps(images), "utf-8"
            )
        return models.load(tmp_path)

    return load


TWO = {"num_heads": 2}


def test_heads_of_timms_arguments(timm):
    for said in ({"model_args": {"num_heads": 3}}, {"num_heads": 3}):
        assert timm(**said).config.heads == 3
    for heads in (5, 0, "2", None):
        with pytest.raises(CheckpointError, match=r"heads"):
            timm(model_args={"num_heads": heads})
    model = timm(model_args=TWO, pretrained_cfg=CONSTANTS)
    expected = np.load(ASSETS / "vit/expected.npz")["tokens"]
    np.testing.assert_allclose(model.features(IMAGES), expected, rtol=0, atol=1e-5)


def test_constants_of_both_forms_of_timms_config(timm):
    """Files before `pretrained_cfg` have its fields at the top."""
    pixels = np.full((1, 1, 1, 3), 0.5, np.float32)
    for config in ({"pretrained_cfg": CONSTANTS}, CONSTANTS):
        model = timm(model_args=TWO, **config)
        np.testing.assert_allclose(model.normalise(pixels)[0, 0, 0], [0, 0.5, 0.375])
    assert timm(model_args=TWO, mean=0.5, std=0.5).normalise(pixels)[0, 0, 0, 2] == 0
    nulls = {"mean": None, "std": None}
    model = timm(model_args=TWO, pretrained_cfg=nulls, **CONSTANTS)
    assert model.config.pixel_mean == (0.5, 0.25, 0.125)
    other = {"mean": [0.1] * 3, "std": [0.2] * 3}
    model = timm(model_args=TWO, pretrained_cfg=CONSTANTS, **other)  # as timm does
    assert model.config.pixel_mean == (0.5, 0.25, 0.125)
    for name in ("staged/swin.pth", "staged/convnext.pth"):
        assert timm(name, **CONSTANTS).config.pixel_std == (0.25, 0.5, 1.0)


def test_two_files_with_different_constants(timm):
    images = {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.25, 0.5, 0.5]}
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json differ: std="):
        timm(model_args=TWO, pretrained_cfg=CONSTANTS, images=images)
    images["image_std"] = [0.25, 0.5, 1.0]
    model = timm(model_args=TWO, pretrained_cfg=CONSTANTS, images=images)
    assert model.config.pixel_std == (0.25, 0.5, 1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"act_layer": "quick_gelu"},
        {"act_layer": "gelu_tanh"},
        {"norm_layer": "rmsnorm"},
        {"qk_norm": True},
        {"qkv_bias": None},
        {"proj_bias": False},
        {"pre_norm": True},
        {"final_norm": False},
        {"fc_norm": True},
        {"reg_tokens": 4},
        {"no_embed_class": True},
        {"class_token": False},
        {"pos_embed": "none"},
        {"init_values": 1e-5},
        {"pool_include_prefix": True},
        {"embed_dim": 24},
        {"depth": 2},
        {"mlp_ratio": 4},
        {"patch_size": 8},
        {"in_chans": 1},
        {"img_size": 24},
        {"rope_theta": 100.0},
    ],
)
def test_arguments_of_timm_that_are_not_obeyed_are_named(arguments, timm):
    (name,) = arguments
    message = "25 positions .* grid of 6 x 6" if name == "img_size" else name
    with pytest.raises(CheckpointError, match=message):
        timm(model_args=TWO | arguments)


def test_arguments_of_timm_that_say_what_is(timm):
    arguments = {
        "act_layer": "gelu",
        "norm_layer": None,
        "qkv_bias": True,
        "reg_tokens": 0,
        "class_token": True,
        "embed_dim": 12,
        "depth": 3,
        "mlp_ratio": 2,
        "patch_size": 4,
        "img_size": 20,
        "init_values": None,
        "in_chans": 3,
        "drop_path_rate": 0.1,
        "dynamic_img_size": True,
        "block_fn": None,
    }
    assert timm(model_args=TWO | arguments).config.image_hw == (20, 20)


def test_pooling_of_timm(timm):
    patches = np.load(ASSETS / "vit/expected.npz")["tokens"][:, 1:]
    for said in ({"global_pool": "avg"}, {"model_args": {"global_pool": "avg"}}):
        said["model_args"] = TWO | said.get("model_args", {})
        model = timm(**said)
        assert model.config.pool == "mean"
        logits = called(model, IMAGES)
        np.testing.assert_allclose(logits, patches.mean(1), rtol=0, atol=1e-5)
    arguments = TWO | {"global_pool": "token"}
    model = timm(model_args=arguments, global_pool="avg")  # which only informs
    assert model.config.pool == "cls"
    for name in ("max", "map", "avgmax"):
        with pytest.raises(CheckpointError, match=f"pool='{name}'"):
            timm(model_args=TWO, global_pool=name)
    with pytest.raises(CheckpointError, match="pool=''"):
        timm("vit/moco.pth.tar", model_args=TWO, global_pool="")
    assert timm(model_args=TWO, global_pool="").config.pool == "cls"  # no head
    for name in ("staged/swin.pth", "staged/convnext.pth"):
        timm(name, global_pool="avg")
        with pytest.raises(CheckpointError, match="global_pool='max'"):
            timm(name, global_pool="max")


def rows(count):
    """The first of the positions."""
    return lambda tensors: tensors | {"pos_embed": tensors["pos_embed"][:, : 1 + count]}


def test_image_sizes_of_timm(timm):
    for said in (
        {"model_args": TWO | {"img_size": [8, 24]}},
        {"model_args": TWO, "pretrained_cfg": {"input_size": [3, 8, 24]}},
        {"model_args": TWO, "input_size": [3, 8, 24]},
    ):
        model = timm(change=rows(12), **said)
        assert model.config.grid == (2, 6)
    default = {"model_args": TWO, "input_size": [3, 24, 24]}
    with pytest.raises(CheckpointError, match=r"25 positions .* grid of 6 x 6"):
        timm(**default)
    assert timm(**default, fixed_input_size=False).config.image_hw == (20, 20)
    with pytest.raises(CheckpointError, match="in_chans=1, and its weights 3"):
        timm(model_args=TWO, input_size=[1, 20, 20])
    with pytest.raises(CheckpointError, match=r"input_size=224: expected \[channels"):
        timm(model_args=TWO, input_size=224)
    assert timm("staged/convnext.pth", input_size=[3, 64, 32]).config.image_hw == (
        64,
        32,
    )


def test_an_image_size_of_the_callers_own(timm, tmp_path):
    with pytest.raises(CheckpointError):
        timm(model_args=TWO, input_size=[3, 24, 24])
    assert models.load(tmp_path, image_size=24).config.grid == (6, 6)


def test_classes_of_timm(timm, tmp_path):
    for said in ({"num_classes": 5}, {"pretrained_cfg": {"num_classes": 5}}):
        with pytest.raises(CheckpointError, match="num_classes=5, and its weights 3"):
            timm("vit/moco.pth.tar", model_args=TWO, **said)
        assert models.load(tmp_path, num_classes=4).config.num_classes == 4
    said = {"num_classes": 3, "pretrained_cfg": {"num_classes": 1000}}  # as of timm
    assert timm("vit/moco.pth.tar", model_args=TWO, **said).config.num_classes == 3
    with pytest.raises(CheckpointError, match="num_classes=5, and its weights 3"):
        timm("staged/swin.pth", num_classes=5)


@pytest.fixture
def folder(tmp_path):
    """Loads a folder of transformers with changes to its two configs."""

    def load(name, images=None, **config):
        new = shutil.copytree(ASSETS / name, tmp_path / "new", dirs_exist_ok=True)
        said = json.loads((ASSETS / name / "config.json").read_text("utf-8")) | config
        (new / "config.json").write_text(json.dumps(said), "utf-8")
        (new / "preprocessor_config.json").write_text(json.dumps(images or {}), "utf-8")
        return models.load(new)

    return load


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vit/classifier", {"num_hidden_layers": 2}),
        ("vit/classifier", {"hidden_size": 24}),
        ("vit/classifier", {"intermediate_size": 48}),
        ("vit/classifier", {"patch_size": 5}),
        ("vit/classifier", {"num_channels": 1}),
        ("vit/classifier", {"qkv_bias": False}),
        ("vit/classifier", {"use_mean_pooling": True}),
        ("vit/classifier", {"hidden_act": "gelu_new"}),
        ("vit/dinov2", {"mlp_ratio": 4}),
        ("vit/dinov2", {"use_swiglu_ffn": True}),
        ("vit/dinov2", {"num_register_tokens": 4}),
        ("staged/swin", {"depths": [2, 2, 2]}),
        ("staged/swin", {"num_heads": [1, 1, 1]}),
        ("staged/swin", {"window_size": 7}),
        ("staged/swin", {"embed_dim": 8}),
        ("staged/swin", {"mlp_ratio": 2.0}),
        ("staged/swin", {"use_absolute_embeddings": True}),
        ("staged/swin", {"hidden_act": "quick_gelu"}),
        ("staged/convnext", {"hidden_sizes": [4, 6, 9]}),
        ("staged/convnext", {"depths": [1, 3, 1]}),
        ("staged/convnext", {"num_stages": 4}),
        ("staged/convnext", {"patch_size": 2}),
    ],
)
def test_configs_of_transformers_that_are_not_obeyed_are_named(name, config, folder):
    (field,) = config
    with pytest.raises(CheckpointError, match=rf"{field}="):
        folder(name, **config)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize(
    "images",
    [
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"rescale_factor": 0.00392156862745098},
        {"do_normalize": False, "do_rescale": False},
        {"do_normalize": False, "rescale_factor": 1 / 128},
        {"do_rescale": True, "do_normalize": True},
    ],
)
def test_pixels_are_scaled_as_the_folder_says(name, images, folder):
    """The expected values start from integers, like the checkpoint's own program."""
    mean, std = np.array([0.5, 0.25, 0.125]), np.array([0.25, 0.5, 2.0])
    said = {"image_mean": mean.tolist(), "image_std": std.tolist()} | images
    model = folder(name, said)
    integers = np.arange(12, dtype=np.float64).reshape(1, 2, 2, 3) * 20
    expected = integers
    if said.get("do_rescale", True):
        expected = expected * said.get("rescale_factor", 1 / 255)
    if said.get("do_normalize", True):
        expected = (expected - mean) / std
    found = model.normalise(jnp.asarray(integers / 255, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"do_rescale": None}, "do_rescale=None: expected true or false"),
        ({"do_normalize": "no"}, "do_normalize='no': expected true or false"),
        ({"rescale_factor": 0}, "rescale_factor=0: expected a positive number"),
        ({"rescale_factor": "1/255"}, "expected a positive number"),
        ({"do_rescale": False}, "expected image_mean and image_std beside"),
        ({"rescale_offset": True}, "rescale_offset=True: expected False"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order=True: expected"),
    ],
)
def test_scaling_that_cannot_be(images, message, folder):
    with pytest.raises(CheckpointError, match=message):
        folder("vit/classifier", images)


# Positions


def test_positions_that_make_no_square_ask_for_the_grid(tmp_path):
    tensors = load_file(ASSETS / "vit/classifier/model.safetensors")
    name = "vit.embeddings.position_embeddings"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :13])
    path = tmp_path / "wide.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"12 positions .* give image_size=\(hei"):
        models.load(path, heads=2)
    with pytest.raises(CheckpointError, match="12 positions"):
        models.load(path, heads=2, image_size=20)
    for size in ((8, 24), (12, 16)):
        model = models.load(path, heads=2, image_size=size)
        assert model.config.image_hw == size
        np.testing.assert_array_equal(model.pos_embed[...], tensors[name])


def test_recorded_fields_that_cannot_be(tmp_path):
    tensors = load_file(ASSETS / "vit/classifier/model.safetensors")
    path = tmp_path / "a.safetensors"
    for recorded, message in (
        ("{", "damaged"),
        ("[]", "expected an object in its metadata"),
        ('{"heads": 2, "image_size": [8, 24]}', "25 positions .* a grid of 2 x 6"),
        ('{"heads": "2"}', "heads='2': expected numbers"),
        ('{"heads": 2, "hats": 2}', "unexpected keyword argument 'hats'"),
    ):
        save_file(tensors, path, {"format": "pt", "snella_jax": recorded})
        with pytest.raises(CheckpointError, match=message):
            models.load(path)
