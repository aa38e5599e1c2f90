"""Published formats of ViT weights: parity with transformers, strictness, bad files.

`tests/assets/vit/make.py` made the files and says what is in them.
"""

import functools
import importlib.util
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from places import ASSETS
from safetensors.numpy import load_file, save_file

from snella_jax.files.errors import CheckpointError
from snella_jax.models import vit
from snella_jax.models.checkpoints import position_grid

DATA = ASSETS / "vit"
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


@functools.partial(jax.jit, static_argnums=0)
def outputs(graphdef, state, images):
    """Tokens, those of two layers, maps of two layers, logits: one program for all."""
    model = nnx.merge(graphdef, state)
    layers = model.features(images, layers=(2, 1))
    maps = model.attention_maps(images, layers=(2, 0))
    return model.features(images), layers, maps, model(images)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", SAME)
def test_every_format_gives_the_tokens_of_transformers(name, stacked, folder):
    model = vit.load(folder / name, stacked=stacked, **SAME[name])
    expected = np.load(folder / "expected.npz")
    images = expected["images"]
    tokens, layers, maps, logits = outputs(*nnx.split(model), images)
    close(tokens, expected["tokens"])
    close(layers[1], expected["layer_1"])
    close(maps[0], expected["attention_2"])
    close(maps[1], expected["attention_0"])
    has_head = name not in ("pooled", "mae.pth")
    assert model.config.num_classes == 3 * has_head
    if has_head:
        close(logits, expected["logits"])
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
    (folder / "preprocessor_config.json").write_text(json.dumps(own), "utf-8")
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


def test_a_layer_that_does_not_exist():
    model = vit.load(DATA / "dinov2")
    for run in (model.features, model.attention_maps):
        for layer in (3, -1):
            with pytest.raises(ValueError, match=rf"\({layer},\): there are 0 to 2"):
                run(EXPECTED["images"], layers=(layer,))


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
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    config = vit.load(tmp_path).config
    assert tuple(config.pixel_mean) == (0.5, 0.5, 0.5)
    assert tuple(config.pixel_std) == (0.25, 0.25, 0.25)


def test_maes_decoder_is_left_out(tmp_path):
    tensors = load_file(DATA / "pooled" / "model.safetensors")
    renamed = {f"vit.{name}": tensor for name, tensor in tensors.items()}
    renamed |= {"decoder.mask_token": np.zeros((1, 1, 8), np.float32)}
    save_file(renamed, tmp_path / "model.safetensors")
    shape = {"model_type": "vit_mae", "num_attention_heads": 2, "layer_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(shape), "utf-8")
    model = vit.load(tmp_path)
    close(model.features(EXPECTED["images"]), EXPECTED["tokens"])
    assert model.config.pixel_std == (0.229, 0.224, 0.225)


def test_only_the_layers_that_are_asked_for_are_kept():
    """Not the tokens of every block, though they are scanned."""
    model = vit.load(DATA / "original.npz")
    images = EXPECTED["images"]
    kept = jax.make_jaxpr(lambda x: model.features(x, layers=(1,)))(images)
    scans = [e for e in kept.jaxpr.eqns if e.primitive.name == "scan"]
    shapes = [v.aval.shape for scan in scans for v in scan.outvars]
    assert (1, 2, 26, 12) in shapes and (3, 2, 26, 12) not in shapes


# Position grids


def test_grid_equals_torchs_interpolate():
    """Numbers of torch 2.13's bicubic `interpolate` of `arange(6) ** 2`, 2 x 3."""
    values = (np.arange(6.0) ** 2).reshape(2, 3, 1)
    np.testing.assert_array_equal(position_grid.resize(values, (2, 3)), values)
    got = position_grid.resize(values, (3, 4))[..., 0]
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
