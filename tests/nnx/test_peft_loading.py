"""PEFT's files are read as its formulas say, and what does not fit is named."""

import json
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peft_files import CONFIG, NAMES, TENSORS, Net, delta
from safetensors.numpy import load_file, save_file

import snella_jax as snella
from snella_jax.adapters.peft_file import Lora
from snella_jax.models.checkpoints.torch_tensor import Row
from snella_jax.nnx import peft_loading, torch_modules


@pytest.fixture
def small(tmp_path):
    """A file of PEFT's for `Net`, and the function that writes it with changes."""
    rng = np.random.default_rng(0)
    tensors = {
        "body.1.fc.lora_A.weight": rng.normal(size=(2, 4)),
        "body.1.fc.lora_B.weight": rng.normal(size=(6, 2)),
        "body.2.fc.lora_A.weight": rng.normal(size=(3, 4)),
        "body.2.fc.lora_B.weight": rng.normal(size=(6, 3)),
        "head.out.weight": rng.normal(size=(2, 4)),
        "head.out.bias": rng.normal(size=2),
    }
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 8,
        "rank_pattern": {r"body\.2.*": 3},
        "alpha_pattern": {"2.fc": 5},
        "target_modules": ["fc"],
        "modules_to_save": ["head.out"],
    }

    def write(changes=None, **fields):
        whole = {f"base_model.model.{n}": x.astype("f4") for n, x in tensors.items()}
        for name, value in (changes or {}).items():
            if value is None:
                del whole[f"base_model.model.{name}"]
            else:
                whole[f"base_model.model.{name}"] = np.asarray(value, "f4")
        save_file(whole, tmp_path / TENSORS)
        (tmp_path / CONFIG).write_text(json.dumps(config | fields), "utf-8")
        return tmp_path, tensors

    return write


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_are_read_as_peft_does(small, rslora):
    folder, tensors = small(use_rslora=rslora)
    model = snella.load_peft(Net(nnx.Rngs(0)), folder, names=NAMES)
    for i, rank, alpha in ((1, 2, 8), (2, 3, 5)):
        down, up = (tensors[f"body.{i}.fc.lora_{ab}.weight"] for ab in "AB")
        expected = alpha / (rank**0.5 if rslora else rank) * up @ down
        got = delta(model.blocks.adapter, i)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert not delta(model.blocks.adapter, 0).any()
    np.testing.assert_allclose(model.out.kernel[...].T, tensors["head.out.weight"])
    trained = {
        "/".join(map(str, p[:-1]))
        for p in nnx.to_flat_state(nnx.state(model, nnx.Param)).paths
    }
    assert trained == {"blocks/adapter", "out"}


def test_what_is_0_in_both_factors_stays_so(small):
    """Rows and columns that the file does not have get no gradient."""
    folder, _ = small()
    model = snella.load_peft(Net(nnx.Rngs(0)), folder, names=NAMES)
    x = jnp.ones((3, 2, 4))

    def loss(model):
        run = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, 0))
        return (run(model.blocks, x) ** 2).sum()

    grads = nnx.grad(loss)(model)["blocks"]["adapter"]
    for name in "ab":
        rows = np.asarray(grads[name][...])[:, 0]
        assert not rows[0].any() and not rows[1, :, 2].any()
        assert rows[1, :, :2].all() and rows[2].all()


def test_dora_is_merged_as_its_formula_says(small):
    magnitude = np.linspace(0.5, 2, 6)
    vectors = {f"body.{i}.fc.lora_magnitude_vector": magnitude for i in (1, 2)}
    folder, tensors = small(vectors, use_dora=True)
    base = Net(nnx.Rngs(0))
    merged = snella.merge_peft(base, folder, names=NAMES)
    for i, scale in ((1, 8 / 2), (2, 5 / 3)):
        down, up = (tensors[f"body.{i}.fc.lora_{ab}.weight"] for ab in "AB")
        moved = np.asarray(base.blocks.kernel[...])[i].T + scale * up @ down
        norms = np.linalg.norm(moved, axis=1)
        expected = (magnitude / norms)[:, None] * moved
        np.testing.assert_allclose(merged.blocks.kernel[...][i].T, expected, rtol=1e-5)
    np.testing.assert_array_equal(
        merged.blocks.kernel[...][0], base.blocks.kernel[...][0]
    )
    with pytest.raises(snella.CheckpointError, match=r"snella\.merge_peft"):
        snella.load_peft(base, folder, names=NAMES)


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({"body.1.fc.lora_B.weight": None}, {}, "lora_B is missing of body.1.fc"),
        (
            {"body.1.fc.lora_A.weight": np.ones((5, 4))},
            {},
            "body.1.fc has lora_A [5, 4]",
        ),
        ({}, {"r": 4}, "says rank 4"),
        (
            {"body.1.fc.lora_A.weight": np.ones((2, 9))},
            {},
            "body.1.fc: [9, 6] in the file, blocks[1] is [4, 6] in the model",
        ),
        ({"head.out.bias": np.ones(3)}, {}, "head.out.bias: [3] in the file, out/bias"),
        (
            {
                "other.lora_A.weight": np.ones((2, 4)),
                "other.lora_B.weight": np.ones((6, 2)),
            },
            {},
            "no weights for \n  other.weight",
        ),
        ({"norm.weight": np.ones(3)}, {}, "no weights for \n  norm.weight"),
        ({"x.lora_embedding_A": np.ones(3)}, {}, "x.lora_embedding_A: expected lora_A"),
        ({}, {"peft_type": "LOHA"}, "peft_type is 'LOHA': expected 'LORA'"),
        ({}, {"peft_type": "SNELLA"}, "load it with snella.load"),
        ({}, {"use_dora": True}, "has 0 vectors of magnitudes"),
        ({}, {"init_lora_weights": "pissa"}, "'pissa' changed the base's weights"),
        ({}, {"trainable_token_indices": [1]}, "single tokens that train"),
        ({}, {"lora_alpha": None}, "damaged (TypeError"),
        ({}, {"rank_pattern": 3}, "damaged (AttributeError"),
        ({}, {"rank_pattern": {"(": 3}}, "unterminated subpattern"),
        (
            {
                "body.1.fc.lora_A.weight": np.ones((0, 4)),
                "body.1.fc.lora_B.weight": np.ones((6, 0)),
            },
            {"r": 0},
            "body.1.fc has lora_A [0, 4]",
        ),
    ],
)
def test_what_does_not_fit_is_named(small, changes, fields, message):
    folder, _ = small(changes, **fields)
    base = Net(nnx.Rngs(0))
    with pytest.raises(snella.CheckpointError, match=re.escape(message)):
        snella.load_peft(base, folder, names=NAMES)


def test_factors_of_what_is_no_layer_are_named():
    """Of a norm, and of a head that is tied to the embedding."""
    norm, lora = Row("norm/scale", ()), Lora(np.ones((2, 3)), np.ones((4, 2)), 1.0)
    with pytest.raises(ValueError, match="norm/scale is no weight that can be adapted"):
        torch_modules.matrix_path(norm, {})
    with pytest.raises(ValueError, match="no weight of its own for it"):
        peft_loading._matrices(SimpleNamespace(rows=[]), lora)


def test_tensors_that_trained_and_are_lost_are_named(small):
    folder, _ = small()
    tensors = load_file(folder / TENSORS)
    save_file(tensors, folder / TENSORS, {"snella_trained": '["head.out.scale"]'})
    with pytest.raises(snella.CheckpointError, match=r"no tensor head\.out\.scale"):
        snella.load_peft(Net(nnx.Rngs(0)), folder, names=NAMES)


@pytest.mark.parametrize("field", [{"rank": 8}, {"kernel": "l2"}, {"split": 2}])
def test_what_the_file_says_is_no_option(small, field):
    folder, _ = small()
    with pytest.raises(ValueError, match="which the file says"):
        snella.load_peft(Net(nnx.Rngs(0)), folder, names=NAMES, **field)


def test_half_a_folder_is_no_adapter(small):
    folder, _ = small()
    (folder / TENSORS).rename(folder / "kept")
    with pytest.raises(FileNotFoundError, match=TENSORS):
        snella.load_peft(Net(nnx.Rngs(0)), folder, names=NAMES)
    (folder / TENSORS).write_bytes((folder / "kept").read_bytes()[:-8])
    with pytest.raises(snella.CheckpointError, match=TENSORS):
        snella.load_peft(Net(nnx.Rngs(0)), folder, names=NAMES)


def test_the_other_format_is_named(small):
    folder, _ = small()
    with pytest.raises(snella.CheckpointError, match=r"'LORA'.*snella\.load_peft"):
        snella.load(Net(nnx.Rngs(0)), folder)
