"""The autoencoder and T5 next to diffusers and transformers, on models made here."""

import importlib.util

import numpy as np
import pytest
from flax import nnx
from places import ASSETS
from safetensors.numpy import load_file, save_file
from single_files import T5, VAE, of_stability, prefixed

from snella_jax.models.sd3 import t5, vae
from snella_jax.models.sd3.t5.model import buckets

pytestmark = pytest.mark.reference
FILE = "diffusion_pytorch_model.safetensors"


def close(got, expected):
    got = np.asarray(got)
    assert got.shape == expected.shape
    assert abs(got - expected).max() <= 1e-5 * abs(expected).max()


def same(one, other):
    one, other = (dict(nnx.to_flat_state(nnx.state(model))) for model in (one, other))
    assert one.keys() == other.keys()
    for path, variable in one.items():
        np.testing.assert_array_equal(variable[...], other[path][...], str(path))


def maker():
    """The script that made the tiny files, whose random models are drawn here, too."""
    script = ASSETS / "sd3_parts" / "make.py"
    spec = importlib.util.spec_from_file_location("make_sd3_parts", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def last(tensor):
    """Channels last, as an array."""
    return tensor.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """Four levels, as in Stable Diffusion 3: diffusers' model, and its folder."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    model = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    folder = tmp_path_factory.mktemp("autoencoder")
    maker().redrawn(model).save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("size", [(32, 40), (37, 45)])
def test_the_autoencoder_is_that_of_diffusers(autoencoder, size):
    import torch

    theirs, folder = autoencoder
    ours = vae.load(folder)
    torch.manual_seed(2)
    images, z = 2 * torch.rand(2, 3, *size) - 1, torch.randn(2, 4, 4, 5)
    with torch.no_grad():
        moments, decoded = theirs.encode(images).latent_dist, theirs.decode(z).sample
    mean, logvar = nnx.jit(lambda m, x: m.encode(x))(ours, last(images))
    close(mean, last(moments.mean))
    close(logvar, last(moments.logvar))
    close(nnx.jit(lambda m, z: m.decode(z))(ours, last(z)), last(decoded))


def test_a_single_file_of_the_same_numbers(autoencoder, tmp_path):
    """Diffusers reads it back as its own, so the file is as Stability's are."""
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    theirs, folder = autoencoder
    own = prefixed(of_stability(load_file(folder / FILE), levels=4), VAE)
    save_file(own, tmp_path / "single.safetensors")
    ours = vae.load(tmp_path / "single.safetensors", groups=4)
    same(ours, vae.load(folder))
    assert ours.config == vae.load(folder).config
    state = theirs.state_dict()
    tensors = {name: torch.from_numpy(tensor) for name, tensor in own.items()}
    read = convert_ldm_vae_checkpoint(tensors, theirs.config)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        ({"d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}, 45),
        ({"d_kv": 5, "d_ff": 30, "num_heads": 3, "num_layers": 3}, 77),
    ],
)
def test_t5_is_that_of_transformers(sizes, length, tmp_path):
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    config = T5Config(
        vocab_size=50,
        d_model=32,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu",
        **sizes,
    )
    theirs = maker().redrawn(T5EncoderModel(config))
    theirs.save_pretrained(tmp_path / "folder")
    ours = t5.load(tmp_path / "folder")
    tokens = torch.randint(0, 50, (2, length))
    with torch.no_grad():
        expected = theirs.double()(tokens).last_hidden_state.numpy()
    encode = nnx.jit(lambda model, tokens: model(tokens))
    close(encode(ours, tokens.numpy()), expected)
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    save_file(prefixed(tensors, T5), tmp_path / "single.safetensors")
    same(t5.load(tmp_path / "single.safetensors", distance=20), ours)


def test_of_a_whole_t5_of_transformers_the_encoder_is_taken(tmp_path):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=20,
        d_model=12,
        d_kv=4,
        d_ff=10,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    theirs = maker().redrawn(T5ForConditionalGeneration(config))
    theirs.save_pretrained(tmp_path / "folder")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = theirs.double().encoder(tokens).last_hidden_state.numpy()
    close(t5.load(tmp_path / "folder")(tokens.numpy()), expected)


@pytest.mark.parametrize(("count", "distance"), [(32, 128), (8, 20), (16, 77)])
def test_buckets_are_those_of_transformers(count, distance):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    places = torch.arange(512)
    offsets = places[None] - places[:, None]
    expected = T5Attention._relative_position_bucket(offsets, True, count, distance)
    np.testing.assert_array_equal(buckets(512, count, distance), expected.numpy())


def test_the_tiny_files_are_what_their_script_makes(tmp_path, monkeypatch):
    made, folder = maker(), ASSETS / "sd3_parts"
    monkeypatch.setattr(made, "HERE", tmp_path)
    made.main()
    old, new = (dict(np.load(path / "expected.npz")) for path in (folder, tmp_path))
    assert old.keys() == new.keys()
    for name, value in old.items():
        np.testing.assert_allclose(new[name], value, rtol=1e-5, atol=1e-5)
    for file in folder.glob("*/*.safetensors"):
        again = load_file(tmp_path / file.relative_to(folder))
        for name, tensor in load_file(file).items():
            np.testing.assert_array_equal(again[name], tensor)
