"""CLIP's published formats: the same numbers from each, and what is refused."""

import dataclasses

import clip_files
import clip_oracle as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from snella_jax.files.errors import CheckpointError
from snella_jax.models.sd3 import clip

PREFIX = "text_encoders.clip_{}.transformer."
IMAGE = dataclasses.replace(
    oracle.IMAGE, image_size=(4, 4), patch_size=(2, 2), activation="gelu"
)


@pytest.fixture(scope="module")
def text():
    return oracle.text()


@pytest.fixture(scope="module")
def image():
    return oracle.image(IMAGE)


@pytest.fixture(scope="module")
def named(text, image):
    """Tensors of a whole `CLIPModel`."""
    made = clip_files.transformers(text) | clip_files.transformers(image, image=True)
    extra = {
        "logit_scale": np.float32([4.6]),
        "text_model.embeddings.position_ids": np.arange(7)[None],
        "vision_model.embeddings.position_ids": np.arange(5)[None],
    }
    return made | extra


@pytest.fixture(scope="module")
def alone(text):
    """Tensors of a `CLIPTextModelWithProjection`."""
    return clip_files.transformers(text)


def config(text, image, **fields):
    return {
        "model_type": "clip",
        "projection_dim": 6,
        "text_config": clip_files.text_config(text.config),
        "vision_config": clip_files.image_config(image.config),
        **fields,
    }


def text_config(text, **fields):
    said = {"model_type": "clip_text_model", **clip_files.text_config(text.config)}
    return said | fields


def same(found, expected, **fields):
    assert found.config == dataclasses.replace(expected.config, **fields)
    numbers = oracle.parameters(found)
    for path, array in oracle.parameters(expected).items():
        np.testing.assert_array_equal(numbers.pop(path), array)
    assert not numbers


def test_a_whole_model(named, text, image, tmp_path):
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    folder = clip_files.folder(
        tmp_path / "clip", named, config(text, image), preprocessor_config=pixels
    )
    same(clip.load(folder), text)
    found = clip.load_image(folder)
    same(found, image, pixel_mean=(0.5,) * 3, pixel_std=(0.25,) * 3)
    half = clip.load(folder, param_dtype=jnp.bfloat16, stacked=False, eos=3)
    assert half.config.eos == 3 and half.config.dtype == jnp.float32
    kernel = half.blocks[2].mlp.fc1.kernel[...]
    expected = text.blocks.mlp.fc1.kernel[2].astype(jnp.bfloat16)
    assert kernel.dtype == jnp.bfloat16 and (kernel == expected).all()


def test_old_configs_of_a_whole_model(named, text, image, tmp_path):
    """There `text_config_dict` counts, and what it does not say is the default."""
    said = clip_files.text_config(text.config)
    old = config(text, image, text_config={"num_attention_heads": 1})
    old["text_config_dict"] = {k: v for k, v in said.items() if k != "hidden_act"}
    folder = clip_files.folder(tmp_path / "clip", named, old)
    same(clip.load(folder), text)


@pytest.mark.parametrize("start", ["text_model.", ""])
def test_a_tower_of_texts(start, alone, text, tmp_path):
    """With a projection, and without one; of old and new versions of transformers."""
    tensors = {n.replace("text_model.", start): t for n, t in alone.items()}
    eos = text_config(text, eos_token_id=49, hidden_act="gelu", layer_norm_eps=1e-6)
    folder = clip_files.folder(tmp_path / "a", tensors, eos)
    same(clip.load(folder), text, eos=49, activation="gelu", norm_eps=1e-6)
    del tensors["text_projection.weight"]
    folder = clip_files.folder(tmp_path / "b", tensors, text_config(text))
    found = clip.load(folder)
    assert found.config.projection is None
    tokens = jnp.array([[1, 49, 3]])
    hidden, pooled = found(tokens)
    np.testing.assert_array_equal(hidden, text(tokens)[0])
    assert pooled.shape == (1, 8)


def test_single_files(alone, text, tmp_path):
    """CLIP-L's projection is the identity there; bigG has its own, and another GELU."""
    other = oracle.text(dataclasses.replace(oracle.TEXT, activation="gelu"), seed=5)
    both = {PREFIX.format("l") + n: t for n, t in alone.items()}
    named = clip_files.transformers(other)
    both |= {PREFIX.format("g") + n: t for n, t in named.items()}
    both["model.diffusion_model.pos_embed"] = np.zeros((1, 4, 2), np.float32)
    whole = tmp_path / "sd3.safetensors"
    save_file(both, whole)
    heads = {"heads": 2}
    plain = oracle.text(dataclasses.replace(oracle.TEXT, projection=None))
    for path in (whole, save(tmp_path / "clip_l.safetensors", alone)):
        found = clip.load(path, part="clip_l", **heads)
        assert found.config == plain.config
        tokens = jnp.array([[48, 2, 49, 49]])
        hidden, pooled = found(tokens)
        expected, _ = text(tokens)
        np.testing.assert_array_equal(hidden, expected)
        _, last = oracle.text_states(text, np.array([48, 2, 49, 49]))
        np.testing.assert_allclose(pooled[0], last[2], atol=1e-5)
    same(clip.load(whole, part="clip_g", **heads), other)
    same(clip.load(save(tmp_path / "g.safetensors", named), part="clip_g", **heads),
         other)  # fmt: skip


def save(path, tensors):
    save_file(tensors, path)
    return path


def test_openai_archives(text, image, tmp_path):
    """Heads are 64 wide there, which tiny ones are not."""
    image = oracle.image(dataclasses.replace(IMAGE, activation="quick_gelu"))
    path = clip_files.archive(tmp_path / "ViT.pt", text, image)
    same(clip.load(path, heads=2), text)
    same(clip.load_image(path, heads=2), image)
    plain = oracle.text(dataclasses.replace(oracle.TEXT, projection=None))
    of_sd3 = clip.load(path, part="clip_l", heads=2)
    assert of_sd3.config == plain.config
    tokens = jnp.array([[48, 2, 49, 49]])
    np.testing.assert_array_equal(of_sd3(tokens)[0], text(tokens)[0])
    with pytest.raises(CheckpointError, match=r"no config.json says its heads: give"):
        clip.load(path)
    tensors = clip_files.openai(text, image)
    del tensors["input_resolution"]  # as OpenCLIP's, whose GELU may be the exact one
    path = save(tmp_path / "open_clip.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"says its activation: .*activation="):
        clip.load(path, heads=2)
    same(clip.load(path, heads=2, activation="gelu"), text, activation="gelu")


def test_heads_follow_from_a_width_of_64(tmp_path):
    wide = dataclasses.replace(oracle.TEXT, width=64, depth=1, heads=1)
    wide = oracle.text(wide)
    path = save(tmp_path / "a.safetensors", clip_files.transformers(wide))
    same(clip.load(path, part="clip_g", activation="quick_gelu"), wide)


def test_the_wrong_part(alone, tmp_path):
    one = save(
        tmp_path / "one.safetensors",
        {PREFIX.format("l") + n: t for n, t in alone.items()},
    )
    with pytest.raises(CheckpointError, match="it holds clip_l and no clip_g"):
        clip.load(one, part="clip_g", heads=2)
    with pytest.raises(CheckpointError, match="holds clip_l: say which with part=clip"):
        clip.load(one)
    with pytest.raises(ValueError, match="part='l': expected clip_l or clip_g"):
        clip.load(one, part="l")
    lone = save(tmp_path / "lone.safetensors", alone)
    with pytest.raises(
        CheckpointError, match=r"no config.json says its activation and"
    ):
        clip.load(lone)
    names = {
        "embeddings.token_embedding.weight": np.zeros((2, 1280), np.float32),
        "embeddings.position_embedding.weight": np.zeros((2, 1280), np.float32),
        "encoder.layers.0.mlp.fc1.weight": np.zeros((2, 1280), np.float32),
    }
    path = save(tmp_path / "big.safetensors", names)
    with pytest.raises(CheckpointError, match="1280 wide, as clip_g: expected clip_l"):
        clip.load(path, part="clip_l")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "siglip"}, "model_type='siglip': expected 'clip'"),
        ({"hidden_act": "gelu_new"}, "activation='gelu_new'"),
        ({"hidden_size": 9}, "config says hidden_size=9, and its weights 8"),
        ({"num_hidden_layers": 4}, "num_hidden_layers=4, and its weights 3"),
        ({"projection_dim": 7}, "projection_dim=7, and its weights 6"),
        ({"eos_token_id": 77}, "eos=77: expected one of the 50 tokens"),
        ({"eos_token_id": [2]}, r"eos_token_id=\[2\]: expected one token"),
        ({"num_attention_heads": 3}, "heads=3 does not divide"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps='x': expected a positive number"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit(fields, message, alone, text, tmp_path):
    folder = clip_files.folder(tmp_path / "a", alone, text_config(text, **fields))
    with pytest.raises(CheckpointError, match=message):
        clip.load(folder)


def test_an_option_that_there_is_not(alone, text, tmp_path):
    folder = clip_files.folder(tmp_path / "a", alone, text_config(text))
    with pytest.raises(ValueError, match="ClipTextConfig has no image_size"):
        clip.load(folder, image_size=3)


@pytest.mark.parametrize(
    ("add", "remove", "message"),
    [
        ({"logit_bias": 1}, "logit_scale", "it holds a SigLIP, .*logit_bias"),
        ({"text_model.head.weight": 1}, "logit_scale", "holds a SigLIP"),
        ({"text_model.embeddings.word_embeddings.weight": 1}, "logit_scale",
         "a Chinese-CLIP or AltCLIP"),
        ({"visual.layer1.0.conv1.weight": 1}, "logit_scale", "a CLIP without a ViT"),
        ({"odd": 1}, "logit_scale", r"odd \[1\]: there is no place for it"),
        ({}, "text_model.encoder.layers.1.mlp.fc1.bias",
         r"blocks/1/mlp/fc1/bias \[20\]: there is no tensor"),
        ({}, "text_model.encoder.layers.0.mlp.fc1.weight",
         "no tensor for blocks/0/mlp/fc1/kernel"),
    ],
)  # fmt: skip
def test_foreign_and_incomplete_tensors(
    add, remove, message, named, text, image, tmp_path
):
    tensors = {n: t for n, t in named.items() if n != remove}
    tensors |= {name: np.zeros(1, np.float32) for name in add}
    folder = clip_files.folder(tmp_path / "a", tensors, config(text, image))
    with pytest.raises(CheckpointError, match=message):
        clip.load(folder)


def test_the_other_tower_alone(alone, text, image, tmp_path):
    path = save(tmp_path / "text.safetensors", alone)
    with pytest.raises(CheckpointError, match=r"tower of texts alone: clip.load loads"):
        clip.load_image(path)
    images = clip_files.transformers(image, image=True)
    path = save(tmp_path / "image.safetensors", images)
    with pytest.raises(
        CheckpointError, match=r"images alone: clip.load_image loads it"
    ):
        clip.load(path)
    path = save(tmp_path / "odd.safetensors", {"a.weight": np.zeros(1, np.float32)})
    with pytest.raises(
        CheckpointError, match=r"no tower of texts of a CLIP: .* found a"
    ):
        clip.load(path)


def test_damaged_files(alone, text, tmp_path):
    path = save(tmp_path / "clip_l.safetensors", alone)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"clip_l\.safetensors: damaged"):
        clip.load(path, part="clip_l")
    path.write_text("<!DOCTYPE html><html>Log in</html>", "utf-8")
    with pytest.raises(CheckpointError, match=r"clip_l\.safetensors: it is a web page"):
        clip.load(path, part="clip_l")
    archive = clip_files.archive(tmp_path / "a.pt", text, oracle.image(IMAGE))
    archive.write_bytes(archive.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=r"a\.pt: no zip archive: it is cut"):
        clip.load(archive)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        clip.load(tmp_path / "none")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}", "utf-8")
    with pytest.raises(CheckpointError, match="its download is not complete"):
        clip.load(tmp_path / "half", part="clip_l")
