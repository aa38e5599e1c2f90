"""Damaged LLaMAs, over a hundred: each ends in an error that names the file."""

import json
import shutil
import struct

import numpy as np
import pytest
from places import ASSETS
from safetensors.numpy import load_file, save_file

from snella_jax import models
from snella_jax.files import gguf_file
from snella_jax.files.errors import CheckpointError

DATA = ASSETS / "llama"
SIZES = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
SIZES += ["intermediate_size", "num_key_value_heads", "head_dim"]
CONFIGS = [
    *((name, value) for name in SIZES for value in (0, -1, 3, 2**40, "4", True, 2.0)),
    ("model_type", "mistral"),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("mlp_bias", True),
    ("rms_norm_eps", "small"),
    ("rms_norm_eps", -1.0),
    ("rms_norm_eps", float("nan")),
    ("tie_word_embeddings", "yes"),
    ("tie_word_embeddings", True),
    ("eos_token_id", ["a"]),
    ("bos_token_id", -2),
    ("quantization_config", {"bits": 4}),
    ("rope_parameters", []),
    ("rope_parameters", {"rope_type": "llama3"}),
    *(("rope_parameters", {"rope_type": kind}) for kind in ("yarn", "dynamic", 3)),
    ("rope_parameters", {"rope_theta": 0}),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("max_position_embeddings", "long"),
]
QUERY = "model.layers.1.self_attn.q_proj.weight"
TENSORS = {  # changes of one tensor; None takes it away
    "missing": (QUERY, None),
    "no norm": ("model.norm.weight", None),
    "no head": ("lm_head.weight", None),
    "no embedding": ("model.embed_tokens.weight", None),
    "surplus": ("model.layers.1.self_attn.q_proj.bias", np.ones(32, np.float32)),
    "another layer": ("model.layers.7.mlp.up_proj.weight", np.ones((48, 32), "f4")),
    "a number": (QUERY, np.float32(1)),
    "narrow": (QUERY, np.ones((32, 31), np.float32)),
    "transposed": ("model.layers.0.mlp.up_proj.weight", np.ones((32, 48), "f4")),
    "integers": (QUERY, np.ones((32, 32), np.int32)),
    "whole embedding": ("model.embed_tokens.weight", np.ones((40, 32), np.int8)),
}
KEYS = ["block_count", "embedding_length", "feed_forward_length"]
KEYS += ["attention.head_count", "attention.head_count_kv", "attention.key_length"]
KEYS += ["rope.dimension_count"]
META = [("dim", 31), ("n_layers", 3), ("n_heads", 0), ("multiple_of", 7)]
META += [("n_kv_heads", 3), ("norm_eps", None), ("vocab_size", 39), ("moe", {})]
CUTS = [0, 1, 7, 8, 100, 900, 4000, -5000, -100, -1]  # bytes that are left


def refused(path, said=""):
    with pytest.raises(CheckpointError) as error:
        models.load(path)
    assert str(path) in str(error.value) and said in str(error.value)


def folder(tmp_path, name="own"):
    return shutil.copytree(DATA / name, tmp_path / "damaged")


@pytest.mark.parametrize(("name", "value"), CONFIGS)
def test_a_config_that_cannot_be(name, value, tmp_path):
    path = folder(tmp_path)
    config = json.loads((path / "config.json").read_text("utf-8")) | {name: value}
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


@pytest.mark.parametrize("left", CUTS)
@pytest.mark.parametrize(
    "name", ["own/model.safetensors", "own/config.json", "meta/consolidated.01.pth"]
)
def test_files_that_are_cut_short(name, left, tmp_path):
    path = folder(tmp_path, name.split("/")[0])
    file = path / name.split("/")[1]
    file.write_bytes(file.read_bytes()[:left].rstrip(b"\n}"))
    refused(path)


@pytest.mark.parametrize(("name", "value"), META)
def test_params_of_meta_that_cannot_be(name, value, tmp_path):
    path = folder(tmp_path, "meta")
    params = json.loads((path / "params.json").read_text("utf-8")) | {name: value}
    (path / "params.json").write_text(json.dumps(params), "utf-8")
    refused(path)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json"])
def test_files_of_meta_that_are_missing(name, tmp_path):
    path = folder(tmp_path, "meta")
    (path / name).unlink()
    refused(path)


def test_one_of_metas_parts_is_missing(tmp_path):
    path = folder(tmp_path, "meta")
    (path / "consolidated.01.pth").unlink()
    refused(path)


def gguf(tmp_path, change, name="tied.gguf"):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(change((DATA / name).read_bytes()))
    return path


@pytest.mark.parametrize("left", CUTS)
def test_gguf_that_is_cut_short(left, tmp_path):
    refused(gguf(tmp_path, lambda data: data[:left]))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [0, 3, 2**31])
def test_gguf_with_other_numbers(key, value, tmp_path):
    def change(data):
        start = data.index(f"llama.{key}".encode() + b"\x04\0\0\0") + 10 + len(key)
        return data[:start] + value.to_bytes(4, "little") + data[start + 4 :]

    refused(gguf(tmp_path, change))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"GGUF", b"GGUG"),
        (b"llama.block_count", b"llama.block_counX"),
        (b"\0llama", b"\0qwen2"),
        (b"blk.0.attn_q", b"blk.0.attn_x"),
        (b"blk.1.ffn_up", b"blk.0.ffn_up"),
        (b"blk.1.ffn_up", b"blk.9.ffn_up"),
        (b"token_embd.weight", b"token_embX.weight"),
        (b"output_norm.weight", b"output_norM.weight"),
    ],
)
def test_gguf_with_other_names(old, new, tmp_path):
    def change(data):
        assert old in data
        return data.replace(old, new, 1)

    refused(gguf(tmp_path, change))


@pytest.mark.parametrize("name", ["rope.scale_linear", "rope.scaling.factor"])
@pytest.mark.parametrize("value", [0.0, 1.0, 2.0])
def test_gguf_with_a_scale_and_no_type_of_it(name, value, tmp_path):
    """One field more, and another that fills up to 32 bytes, as tensors are aligned."""

    def change(data):
        key = f"llama.{name}".encode()
        own = struct.pack("<Q", len(key)) + key + struct.pack("<If", 6, value)
        rest = 18 + -(len(own) + 31) % 32
        own += struct.pack("<Q", rest) + b"x" * rest + struct.pack("<IB", 0, 0)
        (fields,) = struct.unpack_from("<Q", data, 16)
        return data[:16] + struct.pack("<Q", fields + 2) + own + data[24:]

    path = gguf(tmp_path, change)
    if value == 2:
        refused(path, f"llama.{name}=2.0: expected 1")
    else:
        models.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda old: old[::-1], "not those of LLaMA 3"),
        (lambda old: 0 * old, "expected a positive number"),
        (lambda old: np.where(old > 1, np.nan, old), "expected 8 finite numbers"),
    ],
)
def test_gguf_with_other_divisors_of_frequencies(change, said, tmp_path):
    file = gguf_file.open(DATA / "llama3.gguf")
    old = file.tensors["rope_freqs.weight"].read()

    def changed(data):
        assert data.count(old.tobytes()) == 1
        return data.replace(old.tobytes(), np.float32(change(old)).tobytes())

    refused(gguf(tmp_path, changed, "llama3.gguf"), said)
