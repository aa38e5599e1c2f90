"""Damaged and mixed-up SAMs: each ends in an error that names the file."""

import json
import shutil

import numpy as np
import pytest
from places import ASSETS
from safetensors.numpy import load_file, save_file

from snella_jax import models
from snella_jax.files.errors import CheckpointError
from snella_jax.models import sam
from snella_jax.models.checkpoints.read import read

DATA = ASSETS / "sam"
V, P, D = "vision_config", "prompt_encoder_config", "mask_decoder_config"
SIZES = [(V, "hidden_size"), (V, "num_hidden_layers"), (V, "num_attention_heads")]
SIZES += [(V, "image_size"), (V, "mlp_dim"), (V, "window_size"), (D, "mlp_dim")]
SIZES += [(D, "num_hidden_layers"), (D, "num_multimask_outputs")]
CONFIGS = [
    *((*field, value) for field in SIZES for value in (0, 7, "4")),
    (V, "output_channels", 8),
    (V, "patch_size", 8),
    (V, "num_channels", 1),
    (V, "num_pos_feats", 4),
    (V, "global_attn_indexes", [0]),
    (V, "global_attn_indexes", "1"),
    (V, "layer_norm_eps", -1e-6),
    (V, "layer_norm_eps", float("inf")),
    (V, "hidden_act", "relu"),
    (V, "qkv_bias", False),
    (V, "use_rel_pos", False),
    (V, "use_abs_pos", False),
    (P, "hidden_size", 32),
    (P, "image_size", 1024),
    (P, "patch_size", 8),
    (P, "mask_input_channels", 12),
    (P, "num_point_embeddings", 3),
    (P, "layer_norm_eps", 1e-5),
    (D, "hidden_act", "gelu"),
    (D, "hidden_size", 256),
    (D, "num_attention_heads", 3),
    (D, "attention_downsample_rate", 1),
    (D, "iou_head_depth", 4),
    (D, "iou_head_hidden_dim", 13),
    (D, "layer_norm_eps", float("nan")),
    (V, None, []),
    (D, None, 3),
    ("model_type", None, "sam_hq"),
    ("quantization_config", None, {"bits": 8}),
]
QKV = "vision_encoder.layers.1.attn.qkv.weight"
TABLE = "vision_encoder.layers.0.attn.rel_pos_h"
UPSCALE = "mask_decoder.upscale_conv1.weight"
TENSORS = {  # changes of one tensor; None takes it away
    "missing": (QKV, None),
    "no mark": ("mask_decoder.transformer.layers.0.layer_norm1.weight", None),
    "no positions": ("vision_encoder.pos_embed", None),
    "no matrix": ("shared_image_embedding.positional_embedding", None),
    "no mask prompts": ("prompt_encoder.mask_embed.conv1.weight", None),
    "surplus": ("mask_decoder.hf_token.weight", np.ones((1, 16), "f4")),
    "another layer": ("vision_encoder.layers.3.layer_norm1.weight", np.ones(16, "f4")),
    "a fifth point": ("prompt_encoder.point_embed.4.weight", np.ones((1, 16), "f4")),
    "a number": (QKV, np.float32(1)),
    "two rows": ("prompt_encoder.no_mask_embed.weight", np.ones((2, 16), "f4")),
    "narrow": (QKV, np.ones((48, 15), "f4")),
    "no thirds": (QKV, np.ones((47, 16), "f4")),
    "a longer table": (TABLE, np.ones((9, 8), "f4")),
    "flat positions": ("vision_encoder.pos_embed", np.ones((1, 25, 16), "f4")),
    "another grid": ("vision_encoder.pos_embed", np.ones((1, 6, 6, 16), "f4")),
    "transposed": (UPSCALE, np.ones((4, 16, 2, 2), "f4")),
    "integers": (QKV, np.ones((48, 16), np.int32)),
}
META = {  # the same of Meta's file, whose shapes alone say what it is
    "no positions": ("image_encoder.pos_embed", None),
    "no patches": ("image_encoder.patch_embed.proj.weight", None),
    "no first block": ("image_encoder.blocks.0.mlp.lin1.weight", None),
    "no tables": ("image_encoder.blocks.0.attn.rel_pos_h", None),
    "no mask tokens": ("mask_decoder.mask_tokens.weight", None),
    "flat positions": ("image_encoder.pos_embed", np.ones((1, 25, 16), "f4")),
    "an even table": ("image_encoder.blocks.0.attn.rel_pos_h", np.ones((6, 8), "f4")),
    "a wide table": ("image_encoder.blocks.0.attn.rel_pos_h", np.ones((5, 32), "f4")),
    "a flat table": ("image_encoder.blocks.0.attn.rel_pos_h", np.ones(5, "f4")),
    "a number": ("mask_decoder.mask_tokens.weight", np.float32(1)),
    "a small neck": ("image_encoder.neck.0.weight", np.ones((4, 16, 1, 1), "f4")),
    "thin patches": ("image_encoder.patch_embed.proj.weight", np.ones((16, 768), "f4")),
    "an older name": ("image_encoder.blocks.0.attn.q.weight", np.ones((16, 16), "f4")),
}
CUTS = [0, 1, 8, 100, 9000, -1000, -1]  # bytes that are left


def refused(path, load=models.load):
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert str(path) in str(error.value)
    return str(error.value)


def folder(tmp_path):
    return shutil.copytree(DATA / "transformers", tmp_path / "damaged")


@pytest.mark.parametrize(("section", "name", "value"), CONFIGS)
def test_a_config_that_cannot_be(section, name, value, tmp_path):
    path = folder(tmp_path)
    config = json.loads((path / "config.json").read_text("utf-8"))
    config[section] = value if name is None else config[section] | {name: value}
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    refused(path)


@pytest.mark.parametrize("kind", TENSORS)
def test_other_tensors(kind, tmp_path):
    path, (name, value) = folder(tmp_path), TENSORS[kind]
    tensors = load_file(path / "model.safetensors")
    tensors.pop(name, None)
    tensors |= {} if value is None else {name: np.asarray(value)}
    save_file(tensors, path / "model.safetensors")
    refused(path)


@pytest.mark.parametrize("kind", META)
def test_other_tensors_of_metas(kind, tmp_path):
    name, value = META[kind]
    tensors = dict(read(DATA / "sam_vit.pth").tensors)
    tensors.pop(name, None)
    tensors |= {} if value is None else {name: np.asarray(value)}
    path = tmp_path / "damaged.safetensors"
    save_file({name: np.array(t) for name, t in tensors.items()}, path)
    refused(path)


@pytest.mark.parametrize("left", CUTS)
@pytest.mark.parametrize("name", ["transformers/model.safetensors", "sam_vit.pth"])
def test_files_that_are_cut_short(name, left, tmp_path):
    path = shutil.copytree(DATA, tmp_path / "damaged") / name
    path.write_bytes(path.read_bytes()[:left])
    refused(path.parent if "transformers" in name else path)


def test_every_fault_is_listed(tmp_path):
    path = folder(tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["vision_encoder.neck.bias"] = np.ones(16, "f4")
    tensors["vision_encoder.neck.conv1.weight"] = np.ones((16, 16), "f4")
    del tensors["mask_decoder.iou_token.weight"], tensors[QKV]
    save_file(tensors, path / "model.safetensors")
    message = refused(path)
    for part in (
        "vision_encoder.neck.bias [16]: there is no place for it",
        "vision_encoder.neck.conv1.weight [16, 16]: axes don't match array",
        "decoder/iou_token [1, 16]: there is no tensor for it",
        *(
            f"encoder/blocks/whole/0/attn/{name}/kernel [16, 16]: there is no tensor"
            for name in "qkv"
        ),
    ):
        assert part in message


def test_the_config_is_missing(tmp_path):
    path = folder(tmp_path)
    (path / "config.json").unlink()
    assert "there is no config.json" in refused(path)


@pytest.mark.parametrize("name", ["vit/mae.pth", "staged/swin", "llama/own"])
def test_other_models_are_no_sam(name):
    assert "no SAM of a known format" in refused(ASSETS / name, sam.load)
