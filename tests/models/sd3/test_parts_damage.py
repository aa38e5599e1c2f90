"""Damaged autoencoders and T5s, over a hundred: each ends in an error that names it."""

import json
import math
import shutil

import numpy as np
import pytest
from places import ASSETS
from safetensors.numpy import load_file, save_file
from single_files import T5, VAE, of_stability, prefixed

from snella_jax.files.errors import CheckpointError
from snella_jax.models.sd3 import t5, vae

DATA = ASSETS / "sd3_parts"
LOAD = {"vae": vae.load, "t5": t5.load}
WEIGHTS = {
    "vae": "diffusion_pytorch_model.safetensors",
    "t5": "model-00001-of-00002.safetensors",
}
INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00002.safetensors"
WRONG = (0, -1, 3.5, 2**40, "4", True, [])
COUNTS = {
    "vae": ["layers_per_block", "latent_channels", "in_channels", "norm_num_groups"],
    "t5": ["vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff"],
}
CONFIGS = [
    *((kind, name, x) for kind in COUNTS for name in COUNTS[kind] for x in WRONG),
    ("vae", "_class_name", "AsymmetricAutoencoderKL"),
    ("vae", "_class_name", "SD3Transformer2DModel"),
    ("vae", "act_fn", "gelu"),
    ("vae", "temporal_compression_ratio", 4),
    ("vae", "use_quant_conv", True),
    ("vae", "use_post_quant_conv", True),
    ("vae", "mid_block_add_attention", False),
    ("vae", "latents_mean", [0.0, 0.0, 0.0]),
    ("vae", "latents_std", [1.0, 1.0, 1.0]),
    ("vae", "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
    ("vae", "up_block_types", "UpDecoderBlock2D"),
    ("vae", "block_out_channels", [4, 8]),
    ("vae", "block_out_channels", [4, 8, 16]),
    ("vae", "block_out_channels", None),
    ("vae", "out_channels", 1),
    ("vae", "norm_num_groups", 3),
    ("vae", "scaling_factor", None),
    ("vae", "scaling_factor", 0),
    ("vae", "scaling_factor", "1.5"),
    ("vae", "shift_factor", math.nan),
    ("vae", "shift_factor", [0.25]),
    ("t5", "model_type", "umt5"),
    ("t5", "model_type", "clip_text_model"),
    ("t5", "feed_forward_proj", "relu"),
    ("t5", "is_gated_act", False),
    ("t5", "dense_act_fn", "silu"),
    ("t5", "quantization_config", {"bits": 4}),
    ("t5", "relative_attention_num_buckets", 32),
    ("t5", "relative_attention_max_distance", 1),
    ("t5", "layer_norm_epsilon", -1e-6),
]
CONV = "decoder.up_blocks.1.resnets.0.conv1"
QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
KERNEL = np.ones((8, 8, 3, 3), "f4")
TENSORS = [  # changes of one tensor; None takes it away
    ("vae", f"{CONV}.weight", None),
    ("vae", f"{CONV}.bias", None),
    ("vae", "encoder.conv_in.weight", None),
    ("vae", "decoder.conv_in.weight", None),
    ("vae", "encoder.mid_block.resnets.0.norm1.weight", None),
    ("vae", "encoder.down_blocks.1.resnets.0.conv1.weight", None),
    ("vae", f"{CONV}.weight", KERNEL[:7]),
    ("vae", f"{CONV}.weight", KERNEL[..., 1:]),
    ("vae", f"{CONV}.weight", KERNEL[0]),
    ("vae", f"{CONV}.weight", np.float32(1)),
    ("vae", f"{CONV}.weight", KERNEL.astype(np.int8)),
    ("vae", "encoder.conv_in.weight", np.ones(4, "f4")),
    ("vae", "encoder.mid_block.attentions.0.to_q.weight", np.ones((8, 8, 3, 3), "f4")),
    ("vae", "encoder.mid_block.attentions.0.to_k.weight", np.ones((8, 7), "f4")),
    ("vae", "decoder.up_blocks.3.resnets.0.conv1.weight", KERNEL),
    ("vae", "decoder.up_blocks.2.upsamplers.0.conv.weight", KERNEL),
    ("vae", "encoder.down_blocks.0.resnets.1.conv1.weight", KERNEL),
    ("vae", "quant_conv.weight", np.ones((6, 6, 1, 1), "f4")),
    ("t5", QUERY, None),
    ("t5", "shared.weight", None),
    ("t5", BIAS, None),
    ("t5", "encoder.final_layer_norm.weight", None),
    ("t5", QUERY, np.ones((12, 15), "f4")),
    ("t5", QUERY, np.ones(12, "f4")),
    ("t5", QUERY, np.ones((12, 16), np.int32)),
    ("t5", BIAS, np.ones((8, 3), "f4")),
    ("t5", BIAS, np.ones((8, 0), "f4")),
    ("t5", BIAS, np.ones((7, 2), "f4")),
    ("t5", "shared.weight", np.ones((29, 16), "f4")),
    ("t5", "shared.weight", np.float32(1)),
    ("t5", "encoder.embed_tokens.weight", np.ones((30, 16), "f4")),
    ("t5", "encoder.block.5.layer.0.layer_norm.weight", np.ones(16, "f4")),
    ("t5", f"{QUERY[:-6]}bias", np.ones(12, "f4")),
    ("t5", "scaled_fp8", np.ones(1, "f4")),
]
CUTS = [0, 1, 7, 8, 100, 900, 4000, -5000, -100, -1]  # bytes that are left
PAGE = b"<!DOCTYPE html><html><head><title>Access to model is restricted"


def folder(kind, tmp_path):
    return shutil.copytree(DATA / kind, tmp_path / "damaged")


def refused(kind, path, match="."):
    with pytest.raises(CheckpointError, match=match) as error:
        LOAD[kind](path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("kind", "name", "value"), CONFIGS)
def test_a_config_that_cannot_be(kind, name, value, tmp_path):
    path = folder(kind, tmp_path)
    config = json.loads((path / "config.json").read_text("utf-8")) | {name: value}
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    refused(kind, path)


@pytest.mark.parametrize(("kind", "name", "value"), TENSORS)
def test_other_tensors(kind, name, value, tmp_path):
    path = folder(kind, tmp_path)
    shards = list(path.glob("*.safetensors"))
    tensors = {n: t for shard in shards for n, t in load_file(shard).items()}
    for shard in [*shards, path / INDEX]:
        shard.unlink(missing_ok=True)
    tensors.pop(name, None)
    tensors |= {} if value is None else {name: np.ascontiguousarray(value)}
    file = WEIGHTS["vae"] if kind == "vae" else "model.safetensors"
    save_file(tensors, path / file)
    refused(kind, path)


@pytest.mark.parametrize("left", CUTS)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("vae", WEIGHTS["vae"]),
        ("vae", "config.json"),
        ("t5", WEIGHTS["t5"]),
        ("t5", SHARD),
        ("t5", INDEX),
    ],
)
def test_files_that_are_cut_short(kind, name, left, tmp_path):
    file = folder(kind, tmp_path) / name
    file.write_bytes(file.read_bytes()[:left].rstrip(b"\n}"))
    refused(kind, file.parent)


@pytest.mark.parametrize(
    ("kind", "name"), [("vae", WEIGHTS["vae"]), ("t5", SHARD), ("t5", WEIGHTS["t5"])]
)
def test_web_pages_in_a_files_place(kind, name, tmp_path):
    file = folder(kind, tmp_path) / name
    file.write_bytes(PAGE)
    refused(kind, file.parent, match="a web page: log in")


@pytest.mark.parametrize("name", [SHARD, WEIGHTS["t5"]])
def test_a_shard_that_is_missing(name, tmp_path):
    file = folder("t5", tmp_path) / name
    file.unlink()
    refused("t5", file.parent, match=f"names '{name}', which is not beside it")


def test_shards_whose_index_names_one_alone(tmp_path):
    file = folder("t5", tmp_path) / INDEX
    index = json.loads(file.read_text("utf-8"))
    index["weight_map"] = dict.fromkeys(index["weight_map"], WEIGHTS["t5"])
    file.write_text(json.dumps(index), "utf-8")
    refused("t5", file.parent)


@pytest.mark.parametrize("kind", LOAD)
def test_a_config_without_weights(kind, tmp_path):
    path = folder(kind, tmp_path)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    refused(kind, path, match="no weights beside it")


@pytest.mark.parametrize(("kind", "other"), [("vae", "t5"), ("t5", "vae")])
def test_another_components_folder(kind, other, tmp_path):
    refused(kind, folder(other, tmp_path), match="no (autoencoder|encoder) of")


@pytest.mark.parametrize(("kind", "other"), [("vae", "t5"), ("t5", "vae")])
def test_another_components_config(kind, other, tmp_path):
    path = folder(kind, tmp_path)
    shutil.copy(DATA / other / "config.json", path)
    refused(kind, path, match="there is no|expected")


@pytest.mark.parametrize("kind", LOAD)
def test_single_files_without_the_component(kind, tmp_path):
    tensors = load_file(DATA / "vae" / WEIGHTS["vae"])
    own = {
        "vae": prefixed({"shared.weight": np.ones((3, 2), "f4")}, T5),
        "t5": prefixed(of_stability(tensors, levels=3), VAE),
    }
    path = tmp_path / "single.safetensors"
    save_file(own[kind], path)
    refused(kind, path, match=f"and no {kind}")


@pytest.mark.parametrize("left", CUTS)
def test_single_files_that_are_cut_short(left, tmp_path):
    tensors = load_file(DATA / "vae" / WEIGHTS["vae"])
    path = tmp_path / "single.safetensors"
    save_file(prefixed(of_stability(tensors, levels=3), VAE), path)
    path.write_bytes(path.read_bytes()[:left])
    refused("vae", path)


@pytest.mark.parametrize("kind", LOAD)
def test_there_is_nothing(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        LOAD[kind](tmp_path / "missing.safetensors")
