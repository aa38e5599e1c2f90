"""LoRA in PEFT's files, by products in NumPy: `alpha / r * B A` is our update."""

import json

import numpy as np
import pytest
from flax import nnx
from peft_files import CONFIG, NAMES, TENSORS, Net, adapted, delta
from places import ASSETS
from safetensors import safe_open
from safetensors.numpy import load_file

import snella_jax as snella
from snella_jax import models

VIT = ASSETS / "vit/classifier"


def updates(folder):
    """`alpha / r * B A` of every module, and all other tensors."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    tensors = load_file(folder / TENSORS)
    tensors = {k.removeprefix("base_model.model."): x for k, x in tensors.items()}
    found = {}
    for name in config["target_modules"]:
        down, up = (tensors.pop(f"{name}.lora_{ab}.weight") for ab in "AB")
        rank = config["rank_pattern"].get(name, config["r"])
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        assert down.shape[0] == up.shape[1] == rank
        product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        found[name] = (alpha / rank * product).reshape(len(up), *down.shape[1:])
    assert not [key for key in tensors if "lora" in key]
    return config, found, tensors


def test_a_vit_is_written_with_the_names_of_modules(tmp_path):
    model = adapted(
        models.load(VIT), overrides={".*/fc1": {"rank": 3}}, trainable="head|cls_token"
    )
    snella.save(model, tmp_path / "lora", format="peft", like=VIT)
    config, found, rest = updates(tmp_path / "lora")
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == str(VIT)
    depth, blocks = model.config.depth, model.blocks
    assert len(found) == 6 * depth
    for i in range(depth):
        start = f"vit.layers.{i}."
        for name, layer in {
            "attention.q_proj": blocks.attn.query,
            "attention.k_proj": blocks.attn.key,
            "attention.v_proj": blocks.attn.value,
            "attention.o_proj": blocks.attn.out,
            "mlp.fc1": blocks.mlp.fc1,
            "mlp.fc2": blocks.mlp.fc2,
        }.items():
            expected = delta(layer.adapter, i)
            np.testing.assert_allclose(found[start + name], expected, atol=1e-6)
            rank = 3 if name == "mlp.fc1" else 2
            assert config["rank_pattern"][start + name] == rank
    assert config["modules_to_save"] == ["classifier", "vit.embeddings"]
    np.testing.assert_array_equal(rest["classifier.weight"], model.head.kernel[...].T)
    np.testing.assert_array_equal(rest["classifier.bias"], model.head.bias[...])
    np.testing.assert_array_equal(
        rest["vit.embeddings.cls_token"], model.cls_token[...]
    )
    np.testing.assert_array_equal(  # PEFT takes modules whole
        rest["vit.embeddings.position_embeddings"], model.pos_embed[...]
    )
    assert len(rest) == 6

    again = snella.load_peft(models.load(VIT), tmp_path / "lora")
    same_variables(again, model)


def same_variables(one, other):
    """Both train the same, with the same numbers."""
    one, other = (
        dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (one, other)
    )
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value[...], other[path][...], err_msg=path)


def test_fused_and_swapped_rows_are_those_of_the_module(tmp_path):
    """q and v of SAM's qkv; halves of two norms of SD3; a Swin's second block."""
    folder = ASSETS / "sam/transformers"
    model = adapted(models.load(folder), targets="encoder/.*/(q|v)", trainable="")
    snella.save(model, tmp_path / "sam", format="peft", like=folder)
    config, found, rest = updates(tmp_path / "sam")
    assert config["r"] == 4 and config["rank_pattern"] == {} and not rest
    whole = [
        i for i, (kind, _) in enumerate(model.config.encoder.places) if kind == "whole"
    ]
    attn = model.encoder.blocks["whole"].attn
    q, v = delta(attn.q.adapter, 0), delta(attn.v.adapter, 0)
    expected = np.concatenate([q, 0 * q, v])
    name = f"vision_encoder.layers.{whole[0]}.attn.qkv"
    np.testing.assert_allclose(found[name], expected, atol=1e-6)
    again = snella.load_peft(models.load(folder), tmp_path / "sam")
    same_variables(again, model)

    folder = ASSETS / "sd3/pipeline/transformer"
    targets = r"modulation|last/context/modulation|blocks/image/modulation"
    model = adapted(models.load(folder), targets=targets, trainable="")
    snella.save(model, tmp_path / "sd3", format="peft", like=folder)
    _, found, _ = updates(tmp_path / "sd3")
    shift, scale = np.split(delta(model.modulation.adapter), 2)
    swapped = np.concatenate([scale, shift])
    np.testing.assert_allclose(found["norm_out.linear"], swapped, atol=1e-6)
    np.testing.assert_allclose(
        found["transformer_blocks.0.norm1.linear"],
        delta(model.blocks.image.modulation.adapter, 0),
        atol=1e-6,
    )
    with safe_open(tmp_path / "sd3/pytorch_lora_weights.safetensors", "np") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
        assert said["transformer.lora_alpha"] == said["transformer.r"] == 2
        name = "norm_out.linear.lora_{}.weight"
        down, up = (file.get_tensor("transformer." + name.format(ab)) for ab in "AB")
    np.testing.assert_allclose(up @ down, swapped, atol=1e-6)
    same_variables(snella.load_peft(models.load(folder), tmp_path / "sd3"), model)

    folder = ASSETS / "staged/swin"
    model = adapted(models.load(folder), targets="blocks/1/.*/fc2", trainable="")
    snella.save(model, tmp_path / "swin", format="peft", like=folder)
    _, found, _ = updates(tmp_path / "swin")
    np.testing.assert_allclose(
        found["swin.encoder.layers.1.blocks.3.mlp.fc2"],
        delta(model.blocks[1].shifted.mlp.fc2.adapter, 1),
        atol=1e-6,
    )


def test_a_llama_of_any_file_is_written_with_the_rows_of_hugging_face(tmp_path):
    """Meta's files have the rows of q and k in another order; a list has no stack."""
    base = models.load(ASSETS / "llama/meta", stacked=False)
    model = adapted(base, targets="blocks/1/attn/(q|k)|head", trainable="norm")
    like = ASSETS / "llama/own"
    snella.save(model, tmp_path / "lora", format="peft", like=like, base="our/llama")
    config, found, rest = updates(tmp_path / "lora")
    assert config["base_model_name_or_path"] == "our/llama"
    block = model.blocks[1].attn
    names = {"model.layers.1.self_attn.q_proj": block.q, "lm_head": model.head}
    for name, layer in names.items():
        np.testing.assert_allclose(found[name], delta(layer.adapter), atol=1e-6)
    assert len(found) == 3 and config["modules_to_save"] == ["model.norm"]
    np.testing.assert_array_equal(rest["model.norm.weight"], model.norm.scale[...])
    stacked = models.load(ASSETS / "llama/meta")
    again = snella.load_peft(stacked, tmp_path / "lora")
    adapter = again.blocks.attn.q.adapter
    np.testing.assert_allclose(delta(adapter, 1), delta(block.q.adapter), atol=1e-6)
    assert not delta(adapter, 0).any()


def test_a_model_of_ones_own_is_written_by_names(tmp_path):
    config = {
        "targets": "blocks|qkv|heads|conv",
        "trainable": "out|table|token",
        "overrides": {"qkv": {"split": 3}},
    }
    model = adapted(Net(nnx.Rngs(0)), **config)
    snella.save(model, tmp_path / "lora", format="peft", names=NAMES)
    config, found, rest = updates(tmp_path / "lora")
    for i in range(3):
        got = found[f"body.{i}.fc"]
        np.testing.assert_allclose(got, delta(model.blocks.adapter, i), atol=1e-6)
    three = np.concatenate([delta(model.qkv.adapter, i) for i in range(3)])
    np.testing.assert_allclose(found["body.attn.qkv"], three, atol=1e-6)
    np.testing.assert_allclose(
        found["body.heads"], delta(model.heads.adapter), atol=1e-6
    )
    window = delta(model.conv.adapter).reshape(5, 3, 2, 2).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found["stem.conv"], window, atol=1e-6)
    assert config["modules_to_save"] == ["head.out", "stem.extra", "stem.table"]
    np.testing.assert_array_equal(rest["head.out.weight"], model.out.kernel[...].T)
    np.testing.assert_array_equal(rest["stem.table.weight"], model.table.embedding[...])
    np.testing.assert_array_equal(rest["stem.extra.token"], model.token[...])

    again = snella.load_peft(Net(nnx.Rngs(0)), tmp_path / "lora", names=NAMES)
    np.testing.assert_array_equal(again.token[...], model.token[...])
    np.testing.assert_allclose(delta(again.qkv.adapter), three, atol=1e-6)
    merged = snella.merge_peft(Net(nnx.Rngs(0)), tmp_path / "lora", names=NAMES)
    np.testing.assert_allclose(
        merged.conv.kernel[...],
        Net(nnx.Rngs(0)).conv.kernel[...] + window.transpose(2, 3, 1, 0),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("make", "how", "message"),
    [
        (
            lambda: adapted(models.load(VIT), kernel="rbf"),
            {"like": VIT},
            r"blocks/attn/key has kernel=rbf.*snella\.export.*snella\.save_delta",
        ),
        (
            lambda: adapted(
                models.load(VIT), kernel=snella.kernels.linear(False), gate="product"
            ),
            {"like": VIT},
            r"gate='product'.*snella\.export.*snella\.save_delta",
        ),
        (
            lambda: adapted(models.load(VIT)),
            {},
            "like=None: a ViT is written like a file or folder",
        ),
        (
            lambda: adapted(models.load(VIT)),
            {"like": ASSETS / "vit/original.npz"},
            "expected a folder of transformers",
        ),
        (
            lambda: adapted(models.load(ASSETS / "vit/dinov2"), trainable="cls_token"),
            {"like": ASSETS / "vit/dinov2"},
            "patch_embeddings, whose name ends so",
        ),
        (
            lambda: adapted(models.load(VIT), trainable=".*bias"),
            {"like": VIT},
            "trains beside the LoRA of vit.layers",
        ),
        (
            lambda: adapted(models.load(ASSETS / "llama/tied"), trainable="embed"),
            {"like": ASSETS / "llama/tied"},
            "embed/embedding trains and is the head, too",
        ),
        (
            lambda: adapted(Net(nnx.Rngs(0)), targets="qkv", trainable=""),
            {},
            "Net is no model of snella_jax.models: expected names=",
        ),
        (
            lambda: adapted(Net(nnx.Rngs(0)), targets="qkv", trainable=""),
            {"names": {r"blocks\[.\]": "fc"}},
            "rows of a stack perhaps",
        ),
        (
            lambda: adapted(Net(nnx.Rngs(0)), targets="qkv", trainable=""),
            {"names": {"qkv": "fc", "block": "x"}},
            r"names: 'block' matches no path.*blocks\[2\]",
        ),
        (
            lambda: adapted(Net(nnx.Rngs(0)), targets="qkv", trainable=""),
            {"names": {"qkv(": "fc"}},
            r"The regex 'qkv\(' with the name 'fc' does not compile: missing \)",
        ),
        (
            lambda: adapted(Net(nnx.Rngs(0)), targets="qkv", trainable=""),
            {"names": {"q(k)v": r"fc\2"}},
            r"'q\(k\)v' with the name 'fc\\\\2' does not compile: invalid group",
        ),
        (
            lambda: adapted(Net(nnx.Rngs(0)), targets="qkv|conv", trainable="token"),
            {"names": {"qkv": "fc"}},
            r"names= says no tensor for conv/kernel \[\], token: expected a name",
        ),
    ],
)
def test_what_cannot_be_written_is_named(make, how, message, tmp_path):
    with pytest.raises((ValueError, snella.CheckpointError), match=f"(?s){message}"):
        snella.save(make(), tmp_path / "lora", format="peft", **how)
    assert not list(tmp_path.iterdir())


def test_options_of_one_format_are_none_of_the_other(tmp_path):
    model = adapted(Net(nnx.Rngs(0)), targets="qkv", trainable="")
    with pytest.raises(ValueError, match="like= and names= are of format='peft'"):
        snella.save(model, tmp_path, names=NAMES)
    with pytest.raises(ValueError, match="format='torch': expected 'snella' or 'peft'"):
        snella.save(model, tmp_path, format="torch")
