"""Published formats of Stable Diffusion 3's autoencoder: what diffusers computes.

`tests/assets/sd3_parts/make.py` made the files and says what is in them.
"""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from places import ASSETS
from safetensors.numpy import load_file, save_file
from single_files import T5, VAE, of_stability, prefixed

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.read import read
from snella_jax.models.sd3 import vae

DATA = ASSETS / "sd3_parts"
FOLDER, FILE = DATA / "vae", "diffusion_pytorch_model.safetensors"
EXPECTED = dict(np.load(DATA / "expected.npz"))
LEVELS = 3
# What no single file says of an autoencoder.
OWN = {"groups": 2, "scale": 1.5, "shift": 0.25}


def close(got, expected):
    got = np.asarray(got)
    assert got.shape == expected.shape
    assert abs(got - expected).max() <= 1e-5 * abs(expected).max()


def same(one, other):
    one, other = (dict(nnx.to_flat_state(nnx.state(model))) for model in (one, other))
    assert one.keys() == other.keys()
    for path, variable in one.items():
        np.testing.assert_array_equal(variable[...], other[path][...], str(path))


@functools.cache
def loaded():
    return vae.load(FOLDER)


def tensors():
    return load_file(FOLDER / FILE)


def single(tmp_path, prefix=VAE, **others):
    """A single file with these numbers, and other components' tensors."""
    path = tmp_path / "single.safetensors"
    own = prefixed(of_stability(tensors(), LEVELS), prefix)
    save_file({**own, **others}, path)
    return path


def changed(tmp_path, **fields):
    """The folder with another config; None takes a field away."""
    path = shutil.copytree(FOLDER, tmp_path / "vae")
    config = json.loads((path / "config.json").read_text("utf-8")) | fields
    config = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return path


def test_a_folder_of_diffusers_gives_what_diffusers_computes():
    """The images' width, 18, is halved to 9 and then to 4."""
    model = loaded()
    mean, logvar = nnx.jit(lambda m, x: m.encode(x))(model, EXPECTED["images"])
    close(mean, EXPECTED["mean"])
    close(logvar, EXPECTED["logvar"])
    decoded = nnx.jit(lambda m, z: m.decode(z))(model, EXPECTED["latents"])
    close(decoded, EXPECTED["decoded"])
    assert (model.scale, model.shift, model.factor) == (1.5, 0.25, 4)
    assert model.config.dtype == model.config.param_dtype == jnp.float32


def test_a_folder_in_shards_whose_config_has_no_shift(tmp_path):
    path, own = changed(tmp_path, shift_factor=None), tensors()
    (path / FILE).unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {name: names[index % 2] for index, name in enumerate(own)}
    for file in names:
        save_file(
            {name: own[name] for name in own if places[name] == file}, path / file
        )
    index = json.dumps({"metadata": {}, "weight_map": places})
    (path / f"{FILE}.index.json").write_text(index, "utf-8")
    model = vae.load(path)
    same(model, loaded())
    assert model.shift == 0


def test_a_single_file_has_the_scale_and_shift_of_stable_diffusion_3(tmp_path):
    others = prefixed({"pos_embed": np.ones((1, 4, 2), "f4")}, "model.diffusion_model.")
    others |= prefixed({"shared.weight": np.ones((3, 2), "f4")}, T5)
    path = single(tmp_path, **others)
    model = vae.load(read(path), groups=2)
    same(model, loaded())
    own = dataclasses.replace(loaded().config, scale=1.5305, shift=0.0609)
    assert model.config == own


def test_without_prefix_and_config_scale_and_shift_have_to_be_said(tmp_path):
    path = single(tmp_path, prefix="")
    with pytest.raises(CheckpointError, match="Flux's autoencoder"):
        vae.load(path, groups=2)
    with pytest.raises(CheckpointError, match="scale= and shift="):
        vae.load(path, groups=2, scale=1.5)
    model = vae.load(FOLDER / FILE, **OWN, remat="blocks")
    same(model, loaded())
    assert model.config == dataclasses.replace(loaded().config, remat="blocks")


def test_levels_the_wrong_way_round_are_seen(tmp_path):
    """The two coarse levels have the same shapes: the pictures alone differ."""
    path = tmp_path / "single.safetensors"
    wrong = {
        name.replace(".up.2.", ".up.x.").replace(".up.1.", ".up.2."): tensor
        for name, tensor in of_stability(tensors(), LEVELS).items()
    }
    wrong = {name.replace(".up.x.", ".up.1."): tensor for name, tensor in wrong.items()}
    save_file(prefixed(wrong, VAE), path)
    other = vae.load(path, **OWN)
    decoded = nnx.jit(lambda m, z: m.decode(z))(other, EXPECTED["latents"])
    assert abs(decoded - EXPECTED["decoded"]).max() > 0.1


@pytest.mark.parametrize(
    ("dtype", "options"), [("float16", {}), ("bfloat16", {"param_dtype": "bfloat16"})]
)
def test_weights_of_16_bits_are_read_as_float32_or_kept(dtype, options, tmp_path):
    half = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors().items()}
    path = changed(tmp_path)
    save_file(half, path / FILE)
    model = vae.load(path, **options)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}
    assert dtypes == {jnp.dtype(options.get("param_dtype", "float32"))}
    np.testing.assert_array_equal(
        model.encoder.conv_in.kernel[...].astype("float32"),
        half["encoder.conv_in.weight"].astype("f4").transpose(2, 3, 1, 0),
    )


def test_autoencoders_of_other_models_are_refused_by_name(tmp_path):
    one = {"quant_conv.weight": np.ones((6, 6, 1, 1), "f4")}
    with pytest.raises(CheckpointError, match="Stable Diffusion 1, 2 or XL"):
        vae.load(single(tmp_path, **prefixed(one, VAE)), groups=2)
    path = changed(tmp_path, use_quant_conv=True)
    with pytest.raises(CheckpointError, match="use_quant_conv=True: expected False"):
        vae.load(path)


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match="VAEConfig has no depth, heads"):
        vae.load(FOLDER, heads=2, depth=3)
    with pytest.raises(ValueError, match="remat='all'"):
        vae.load(FOLDER, remat="all")
