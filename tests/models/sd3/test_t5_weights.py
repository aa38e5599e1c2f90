"""Published formats of T5's encoder: what transformers computes.

`tests/assets/sd3_parts/make.py` made the files and says what is in them.
"""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import loading
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from places import ASSETS
from safetensors.numpy import load_file, save_file
from single_files import T5, VAE, prefixed

from snella_jax.files.errors import CheckpointError
from snella_jax.models.sd3 import t5

DATA = ASSETS / "sd3_parts"
FOLDER = DATA / "t5"
EXPECTED = dict(np.load(DATA / "expected.npz"))
SHARED, COPY = "shared.weight", "encoder.embed_tokens.weight"
FIRST = "encoder.block.0.layer.0.SelfAttention."
OWN = {"distance": 20}  # which no single file says


def tensors():
    shards = map(load_file, sorted(FOLDER.glob("*.safetensors")))
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def file(tmp_path, own, prefix="", **others):
    path = tmp_path / "single.safetensors"
    save_file({**prefixed(own, prefix), **others}, path)
    return path


def encoded(model):
    return nnx.jit(lambda model, tokens: model(tokens))(model, EXPECTED["tokens"])


def close(got, expected):
    got = np.asarray(got)
    assert got.shape == expected.shape
    assert abs(got - expected).max() <= 1e-5 * abs(expected).max()


def same(one, other):
    one, other = (dict(nnx.to_flat_state(nnx.state(model))) for model in (one, other))
    assert one.keys() == other.keys()
    for path, variable in one.items():
        np.testing.assert_array_equal(variable[...], other[path][...], str(path))


def test_a_folder_in_shards_gives_what_transformers_computes():
    model = t5.load(FOLDER)
    close(encoded(model), EXPECTED["hidden"])
    assert len(list(FOLDER.glob("*.safetensors"))) == 2
    assert model.config.dtype == model.config.param_dtype == jnp.float32
    assert (model.config.distance, model.config.norm_eps) == (20, 1e-6)


def test_blocks_may_be_a_list():
    close(encoded(t5.load(FOLDER, stacked=False)), EXPECTED["hidden"])


def test_single_files_give_the_same_model(tmp_path):
    expected = t5.load(FOLDER)
    other = prefixed({"decoder.conv_in.weight": np.ones((2, 2, 1, 1), "f4")}, VAE)
    for prefix in ("", T5):
        model = t5.load(
            file(tmp_path, tensors(), prefix, **(other if prefix else {})), **OWN
        )
        same(model, expected)
        assert model.config == expected.config
    assert t5.load(file(tmp_path, tensors())).config.distance == 128


def test_the_embedding_may_be_there_twice_or_by_its_other_name(tmp_path):
    expected, own = t5.load(FOLDER), tensors()
    own[COPY] = own[SHARED].copy()
    same(t5.load(file(tmp_path, own)), expected)
    own[COPY][29, 15] += 1
    with pytest.raises(CheckpointError, match=f"{SHARED} and {COPY} differ"):
        t5.load(file(tmp_path, own))
    own[COPY] = own.pop(SHARED)
    same(t5.load(file(tmp_path, own)), expected)


def test_of_a_whole_t5_the_encoder_is_taken(tmp_path):
    own = tensors() | {
        "lm_head.weight": np.ones((30, 16), "f4"),
        "decoder.embed_tokens.weight": np.ones((30, 16), "f4"),
        f"decoder.{FIRST[8:]}q.weight": np.ones((12, 16), "f4"),
    }
    same(t5.load(file(tmp_path, own)), t5.load(FOLDER))


@pytest.mark.parametrize(
    ("kind", "into"),
    [
        (np.float16, "float32"),
        (np.float16, "float16"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (ml_dtypes.float8_e4m3fn, "bfloat16"),
        (ml_dtypes.float8_e4m3fn, "float32"),
        (ml_dtypes.float8_e5m2, "float32"),
    ],
)
def test_weights_of_fewer_bits(kind, into, tmp_path):
    small = {name: tensor.astype(kind) for name, tensor in tensors().items()}
    model = t5.load(file(tmp_path, small), param_dtype=into)
    leaves = jax.tree.leaves(nnx.state(model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(into)}
    np.testing.assert_array_equal(
        model.blocks.attn.k.kernel[0].astype("float32"),
        small[f"{FIRST}k.weight"].astype("f4").T,
    )


def test_computing_in_float16_is_refused_with_the_reason(tmp_path):
    half = {name: tensor.astype("f2") for name, tensor in tensors().items()}
    path = file(tmp_path, half)
    with pytest.raises(ValueError, match="beyond float16's largest number, 65504"):
        t5.load(path, dtype="float16")
    model = t5.load(path, dtype="bfloat16", param_dtype="float16", **OWN)
    got, expected = encoded(model), EXPECTED["hidden"]
    assert got.dtype == jnp.bfloat16
    assert abs(np.float32(got) - expected).mean() < 0.06 * abs(expected).mean()


def test_relatives_are_refused_by_name(tmp_path):
    first = {name: t for name, t in tensors().items() if "wi_1" not in name}
    old = {name.replace("wi_0", "wi"): tensor for name, tensor in first.items()}
    with pytest.raises(CheckpointError, match=r"T5 1\.0, whose MLP has no gate"):
        t5.load(file(tmp_path, old))
    bias = "relative_attention_bias.weight"
    own = {f"{FIRST.replace('.0.', '.1.', 1)}{bias}": np.ones((8, 2), "f4")}
    with pytest.raises(CheckpointError, match="umT5, whose blocks"):
        t5.load(file(tmp_path, tensors() | own))
    for fields, message in (
        ({"model_type": "umt5"}, "model_type='umt5': expected 't5'"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu'"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu'"),
    ):
        path = shutil.copytree(FOLDER, tmp_path / "t5", dirs_exist_ok=True)
        config = json.loads((FOLDER / "config.json").read_text("utf-8"))
        (path / "config.json").write_text(json.dumps(config | fields), "utf-8")
        with pytest.raises(CheckpointError, match=message):
            t5.load(path)


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match="T5Config has no layers"):
        t5.load(FOLDER, layers=2)
    with pytest.raises(ValueError, match="remat='all'"):
        t5.load(FOLDER, remat="all")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_the_memory_of_the_weights(dtype, tmp_path):
    """Beside 94 million weights in half precision, the embedding twice in the file."""
    sizes = {"q": (1024, 1024), "k": (1024, 1024), "v": (1024, 1024), "o": (1024, 1024)}
    gated = {"wi_0": (2816, 1024), "wi_1": (2816, 1024), "wo": (1024, 2816)}
    shapes = {SHARED: (16000, 1024), COPY: (16000, 1024)}
    shapes |= {"encoder.final_layer_norm.weight": (1024,)}
    shapes |= {f"{FIRST}relative_attention_bias.weight": (32, 16)}
    for block in (f"encoder.block.{index}.layer" for index in range(6)):
        shapes |= {f"{block}.0.SelfAttention.{n}.weight": s for n, s in sizes.items()}
        shapes |= {f"{block}.1.DenseReluDense.{n}.weight": s for n, s in gated.items()}
        shapes |= {f"{block}.{part}.layer_norm.weight": (1024,) for part in (0, 1)}
    weights = {name: np.ones(shape, np.float16) for name, shape in shapes.items()}
    path = file(tmp_path, weights, T5)
    assert 0.9 < loading.peak("snella_jax.models.sd3.t5", path, dtype) <= 1.25
