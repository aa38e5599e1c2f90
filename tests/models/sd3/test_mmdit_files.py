"""Files of MMDiTs: both formats, export, and over fifty that are refused."""

import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from mmdit_files import SIZES, single_of, tensors
from safetensors.numpy import load_file, save_file

from snella_jax import models
from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.sd3 import mmdit

THEIRS = tensors()
CONFIG = {"_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.42.1"}
CONFIG |= SIZES | {"qk_norm": None, "dual_attention_layers": []}
PREFIX = "model.diffusion_model."
WEIGHTS = "diffusion_pytorch_model.safetensors"
QUERY = "transformer_blocks.0.attn.to_q.weight"
SWAPPED = {  # by path here: shift and scale stand the other way round
    "last/context/modulation/bias": "transformer_blocks.1.norm1_context.linear.bias",
    "modulation/bias": "norm_out.linear.bias",
}


def folder(path, changed=None, config=None):
    path.mkdir()
    own = THEIRS | (changed or {})
    save_file({n: t for n, t in own.items() if t is not None}, path / WEIGHTS)
    (path / "config.json").write_text(json.dumps(CONFIG | (config or {})), "utf-8")
    return path


def single(path, prefix=PREFIX, **others):
    own = {f"{prefix}{name}": tensor for name, tensor in single_of(THEIRS).items()}
    save_file({**own, **others}, path)
    return path


def leaves(model):
    flat = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): np.array(value[...]) for path, value in flat}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return leaves(mmdit.load(folder(tmp_path_factory.mktemp("own") / "transformer")))


def same(model, expected):
    got = leaves(model)
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(got[path], value, path)


def test_a_folders_tensors_go_to_their_places(loaded):
    block = "transformer_blocks.0."
    np.testing.assert_array_equal(
        loaded["blocks/context/attn/k/kernel"][0],
        THEIRS[f"{block}attn.add_k_proj.weight"].T,
    )
    np.testing.assert_array_equal(
        loaded["last/image/modulation/bias"],
        THEIRS["transformer_blocks.1.norm1.linear.bias"],
    )
    np.testing.assert_array_equal(
        loaded["positions"][3, 5], THEIRS["pos_embed.pos_embed"][0, 3 * 12 + 5]
    )
    np.testing.assert_array_equal(
        loaded["patch/kernel"][1, 0, 3], THEIRS["pos_embed.proj.weight"][:, 3, 1, 0]
    )
    for path, name in SWAPPED.items():
        scale, shift = np.split(THEIRS[name], 2)
        np.testing.assert_array_equal(loaded[path], np.concatenate([shift, scale]))


def test_every_way_to_a_single_file_gives_the_same_model(loaded, tmp_path):
    vae = {"first_stage_model.decoder.conv_in.weight": np.ones((4, 4, 3, 3), "f4")}
    clip = "text_encoders.clip_l.transformer.text_model.embeddings."
    vae[f"{clip}position_embedding.weight"] = np.ones((77, 8), "f4")
    same(models.load(single(tmp_path / "sd3.safetensors", **vae), heads=4), loaded)
    same(mmdit.load(single(tmp_path / "bare.safetensors", ""), heads=4), loaded)
    same(models.load(folder(tmp_path / "transformer")), loaded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_what_was_read(dtype, tmp_path):
    path = single(tmp_path / "sd3.safetensors")
    model = mmdit.load(path, heads=4, param_dtype=jnp.dtype(dtype))
    assert model.patch.kernel.dtype == dtype
    models.export(model, tmp_path / "transformer")
    assert json.loads(
        (tmp_path / "transformer" / "config.json").read_text("utf-8")
    ) == ({n: v for n, v in CONFIG.items() if n != "_diffusers_version"})
    written = load_file(tmp_path / "transformer" / WEIGHTS)
    assert written.keys() == THEIRS.keys()
    for name, tensor in THEIRS.items():
        kind = {"float32": "f4", "bfloat16": ml_dtypes.bfloat16}[dtype]
        np.testing.assert_array_equal(written[name], tensor.astype(kind), name)
    again = mmdit.load(tmp_path / "transformer", param_dtype=jnp.dtype(dtype))
    same(again, leaves(model))
    assert again.config == model.config


def test_a_folder_that_it_takes_after_keeps_its_other_fields(tmp_path):
    like = folder(tmp_path / "like", config={"sample_size": 64})
    model = mmdit.load(like, stacked=False)
    models.export(model, tmp_path / "new", like=like, max_shard_bytes=50_000)
    said = json.loads((tmp_path / "new" / "config.json").read_text("utf-8"))
    assert said == CONFIG | {"sample_size": 64}
    assert len([*(tmp_path / "new").glob("diffusion_pytorch_model-*-of-*")]) > 2
    same(mmdit.load(tmp_path / "new", stacked=False), leaves(model))
    (
        tmp_path / "new" / sorted(p.name for p in (tmp_path / "new").iterdir())[2]
    ).unlink()
    with pytest.raises(CheckpointError, match="which is not beside it"):
        mmdit.load(tmp_path / "new")


def test_models_that_diffusers_does_not_have_are_not_written(tmp_path):
    path = folder(tmp_path / "own")
    with pytest.raises(ValueError, match=r"norm_eps=1e-05: in diffusers it is always"):
        models.export(mmdit.load(path, norm_eps=1e-5), tmp_path / "new")
    with pytest.raises(ValueError, match="MMDiT is written as a folder"):
        models.export(mmdit.load(path), tmp_path / "new.safetensors")
    other = folder(tmp_path / "other", config={"num_attention_heads": 2})
    with pytest.raises(CheckpointError, match="it has num_attention_heads=2, and the"):
        models.export(mmdit.load(path), tmp_path / "new", like=other)
    file = single(tmp_path / "sd3.safetensors")
    with pytest.raises(CheckpointError, match="expected a diffusers folder"):
        models.export(mmdit.load(path), tmp_path / "new", like=file)
    assert not (tmp_path / "new").exists()


VARIANTS = {  # a tensor that only this model has: what the error calls it
    "joint_blocks.0.x_block.attn.ln_q.weight": "Stable Diffusion 3.5",
    "joint_blocks.0.x_block.attn2.qkv.weight": "Stable Diffusion 3.5 medium",
    "transformer_blocks.0.attn.norm_added_k.weight": "Stable Diffusion 3.5",
    "transformer_blocks.0.attn2.to_q.weight": "Stable Diffusion 3.5 medium",
    "double_blocks.0.img_attn.qkv.weight": "Flux",
    "single_transformer_blocks.0.proj_mlp.weight": "Flux",
    "joint_transformer_blocks.0.attn.to_q.weight": "AuraFlow",
    "controlnet_blocks.0.weight": "a ControlNet",
    "input_blocks.0.0.weight": "a UNet",
    "down_blocks.0.resnets.0.conv1.weight": "a UNet",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_models_are_refused_by_name(name, tmp_path):
    whole = folder(tmp_path / "whole", {name: np.ones((8, 8), "f4")})
    save_file({name: np.ones((8, 8), "f4")}, tmp_path / "alone.safetensors")
    for path in (whole, tmp_path / "alone.safetensors"):
        with pytest.raises(CheckpointError, match=VARIANTS[name]):
            mmdit.load(path)


TENSORS = {  # changes of tensors; None takes one away
    "missing": ({QUERY: None}, "blocks/0/image/attn/q/kernel"),
    "no patches": ({"pos_embed.proj.weight": None}, "pos_embed.proj.weight"),
    "no positions": ({"pos_embed.pos_embed": None}, "pos_embed.pos_embed"),
    "no text": ({"context_embedder.weight": None}, "context_embedder.weight"),
    "surplus": ({"extra.weight": np.ones((2, 2), "f4")}, "there is no place for it"),
    "another block": (
        {"transformer_blocks.7.attn.to_q.weight": np.ones((32, 32), "f4")},
        "num_layers",
    ),
    "narrow": ({QUERY: np.ones((32, 31), "f4")}, r"the tensor for it is \[31, 32\]"),
    "a number": ({QUERY: np.ones((), "f4")}, "the tensor for it is"),
    "integers": ({QUERY: np.ones((32, 32), "i4")}, "floating-point"),
    "no square": (
        {"pos_embed.pos_embed": np.ones((1, 143, 32), "f4")},
        "143 is no square",
    ),
    "odd": ({"norm_out.linear.bias": np.ones(63, "f4")}, "expected two halves"),
    "flat patches": ({"pos_embed.proj.weight": np.ones((32, 16), "f4")}, "4 axes"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_other_tensors(kind, tmp_path):
    changed, message = TENSORS[kind]
    with pytest.raises(CheckpointError, match=message):
        mmdit.load(folder(tmp_path / "damaged", changed))


CONFIGS = [
    *((name, SIZES[name] + 1) for name in SIZES if name != "sample_size"),
    *(("num_attention_heads", value) for value in (0, "4", None, 2.0, True)),
    ("_class_name", "FluxTransformer2DModel"),
    ("qk_norm", "rms_norm"),
    ("dual_attention_layers", [0]),
    ("quantization_config", {"quant_method": "bitsandbytes"}),
    ("guidance_embeds", True),
]


@pytest.mark.parametrize(("name", "value"), CONFIGS)
def test_other_configs(name, value, tmp_path):
    path = folder(tmp_path / "damaged", config={name: value})
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as error:
        mmdit.load(path)
    assert name in str(error.value)


def test_heads_that_nothing_says(tmp_path):
    with pytest.raises(CheckpointError, match="say how many there are with heads="):
        mmdit.load(single(tmp_path / "sd3.safetensors"))
    path = folder(tmp_path / "transformer")
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="expected the whole folder"):
        mmdit.load(path)
    assert mmdit.load(path, heads=2).config.heads == 2
    with pytest.raises(ValueError, match="is an MMDiT, which has no head"):
        mmdit.load(path, head=2)


PAGES = {
    b"<!DOCTYPE html><html><title>Access denied": "a web page: log in",
    b"<html>\n<body>gated": "a web page: log in",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00": "of Git LFS",
}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_download_left_is_named(page, tmp_path):
    path = folder(tmp_path / "transformer")
    (path / WEIGHTS).write_bytes(page)
    with pytest.raises(CheckpointError, match=PAGES[page]):
        mmdit.load(path)


@pytest.mark.parametrize("left", [0, 7, 8, 100, 20_000, -5000, -1])
def test_half_a_file(left, tmp_path):
    path = folder(tmp_path / "transformer")
    whole = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(whole[:left])
    with pytest.raises(CheckpointError, match="damaged"):
        mmdit.load(path)


def test_half_a_folder(tmp_path):
    path = folder(tmp_path / "transformer")
    (path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="its download is not complete"):
        mmdit.load(path)
    (path / "config.json").write_text("<html>", "utf-8")
    with pytest.raises(CheckpointError, match="its download is not complete"):
        mmdit.load(path)
    (tmp_path / "model_index.json").write_text("{}", "utf-8")
    with pytest.raises(CheckpointError, match="expected its folder transformer"):
        mmdit.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        mmdit.load(tmp_path / "nothing")


def test_gguf_is_refused(tmp_path):
    checkpoint = Checkpoint(tmp_path / "sd3.gguf", single_of(THEIRS))
    for loads in (models.load, mmdit.load):
        with pytest.raises(CheckpointError, match=r"GGUF: expected \.safetensors"):
            loads(checkpoint)


def test_a_single_file_without_a_transformer(tmp_path):
    tensor = {"first_stage_model.decoder.conv_in.weight": np.ones((4, 4, 3, 3), "f4")}
    save_file(tensor, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="it holds vae and no mmdit"):
        mmdit.load(tmp_path / "vae.safetensors")
    save_file({"weight": np.ones(3, "f4")}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no MMDiT of a known format"):
        mmdit.load(tmp_path / "other.safetensors")
