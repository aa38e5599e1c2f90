"""Published formats of SAM: what transformers computes, and back again.

`tests/assets/sam/make.py` made the files and says what is in them.
"""

import dataclasses
import importlib.util
import json
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from places import ASSETS
from safetensors.numpy import load_file, save_file

import snella_jax as snella
from snella_jax import models
from snella_jax.files.errors import CheckpointError
from snella_jax.models import sam
from snella_jax.models.checkpoints import position_grid
from snella_jax.models.sam import formats

DATA = ASSETS / "sam"
FOLDER, META = DATA / "transformers", DATA / "sam_vit.pth"
EXPECTED = dict(np.load(DATA / "expected.npz"))
CASES = {  # prompts by case, and if three masks are asked for
    "nothing": ([], False),
    "points": (["points", "labels"], False),
    "boxes": (["boxes"], True),
    "all": (["points", "labels", "boxes", "mask"], True),
}


def close(got, expected, share=1e-5):
    got = np.asarray(got)
    assert got.shape == expected.shape
    assert abs(got - expected).max() <= share * abs(expected).max()


def predicted(model, case, expected=EXPECTED):
    names, multimask = CASES[case]
    prompts = {name: expected[name] for name in names}
    run = nnx.jit(lambda model, images, p: model(images, multimask=multimask, **p))
    return run(model, expected["images"], prompts)


def is_that_of_transformers(model, case, key=None, expected=EXPECTED):
    masks, iou = predicted(model, case, expected)
    assert masks.dtype == iou.dtype == jnp.float32
    close(masks, expected[f"{key or case}/masks"])
    close(iou, expected[f"{key or case}/iou"])


def same(one, other):
    one, other = (dict(nnx.to_flat_state(nnx.state(model))) for model in (one, other))
    assert one.keys() == other.keys()
    for path, variable in one.items():
        np.testing.assert_array_equal(variable[...], other[path][...], str(path))
        assert variable.dtype == other[path].dtype


def changed(tmp_path, change=None, **sections):
    """A folder whose tensors or whose config are changed; None drops a field."""
    folder = shutil.copytree(FOLDER, tmp_path / "changed")
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for name, fields in sections.items():
        section = config[name] | fields
        config[name] = {k: v for k, v in section.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.fixture(scope="module")
def model():
    return models.load(FOLDER)


# Loading


@pytest.mark.parametrize("case", CASES)
def test_masks_are_those_of_transformers(case, model):
    is_that_of_transformers(model, case)


def test_what_no_shape_says_is_read(tmp_path):
    """Heads and epsilons of the config, which change the masks."""
    other = {
        "vision_config": {"layer_norm_eps": 0.05},
        "mask_decoder_config": {"layer_norm_eps": 0.1, "num_attention_heads": 4},
    }
    own = models.load(changed(tmp_path, **other))
    is_that_of_transformers(own, "points", "other")


def test_metas_file_holds_the_same_model(model):
    """All but the epsilon of the decoder's norms, which differs in the two codes."""
    meta = models.load(META)
    same(meta, model)
    assert meta.config.decoder_norm_eps == 1e-5
    assert dataclasses.replace(meta.config, decoder_norm_eps=1e-6) == model.config


def test_names_that_stand_before_all_others(model, tmp_path):
    tensors = load_file(FOLDER / "model.safetensors")
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    folder = changed(tmp_path)
    save_file(wrapped, folder / "model.safetensors")
    same(models.load(folder), model)


def test_a_copy_of_the_position_matrix(model, tmp_path):
    """Some folders have one; another one is an error."""

    def copied(change):
        def change_(tensors):
            own = tensors["shared_image_embedding.positional_embedding"]
            tensors[formats.TIED] = own + change

        return change_

    same(models.load(changed(tmp_path, copied(0))), model)
    with pytest.raises(CheckpointError, match="expected a copy of shared_image_embed"):
        models.load(changed(tmp_path / "b", copied(1)))


def test_constants_of_the_pixels_are_read(tmp_path):
    folder = changed(tmp_path)
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    text = json.dumps(said)
    (folder / "preprocessor_config.json").write_text(text, "utf-8")
    config = models.load(folder).config
    assert (config.pixel_mean, config.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_stacked_or_not_and_in_any_dtype(model):
    listed = sam.load(FOLDER, stacked=False, remat="blocks")
    assert listed.config.remat == "blocks"
    is_that_of_transformers(listed, "points")
    same(models.unstack(model), listed)
    half = sam.load(FOLDER, dtype="bfloat16", param_dtype="bfloat16")
    kept = {str(v.dtype) for v in jax.tree.leaves(nnx.state(half, nnx.Param))}
    assert kept == {"bfloat16"}
    matrix = half.prompts.position_matrix
    assert matrix.dtype == jnp.float32  # at 16 bits points would be pixels off
    masks, iou = predicted(half, "boxes")
    assert masks.dtype == iou.dtype == jnp.float32
    close(masks, EXPECTED["boxes/masks"], 0.1)


@pytest.mark.parametrize("size", [48, (96, 64)])
def test_another_size_resizes_the_positions(size, model):
    """Those of the grid bicubically, of whole blocks linearly, of windows not."""
    own = sam.load(META, image_size=size)
    height, width = own.config.grid
    old, new = model.encoder, own.encoder
    grid = position_grid.resize(np.asarray(old.pos_embed[0]), (height, width))
    np.testing.assert_allclose(new.pos_embed[0], grid, rtol=1e-6, atol=1e-6)
    for table, side in (("rel_pos_h", height), ("rel_pos_w", width)):
        before, after = (getattr(x.blocks["whole"].attn, table)[0] for x in (old, new))
        expected = jax.image.resize(
            before, (2 * side - 1, 8), "linear", antialias=False
        )
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(
            *(getattr(x.blocks["windowed"].attn, table)[...] for x in (old, new))
        )
    shape = jax.eval_shape(lambda: own(jnp.zeros((1, *own.config.image_hw, 3))))
    assert shape[0].shape == (1, 1, 4 * height, 4 * width)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 3}, ValueError, "is a SAM, which has no num_classes"),
        ({"image_size": 50}, ValueError, "image_size=50 is not a multiple"),
        ({"decoder_heads": 3}, ValueError, "decoder_heads=3 divides"),
        ({"weights": "teacher"}, CheckpointError, "no weights='teacher'"),
    ],
)
def test_options_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        models.load(META, **options)


# Writing


@pytest.mark.parametrize("source", [FOLDER, META])
def test_what_is_exported_is_the_folder_that_was_read(source, model, tmp_path):
    models.export(models.load(source), tmp_path / "out")
    found, expected = (
        load_file(path / "model.safetensors") for path in (tmp_path / "out", FOLDER)
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, name)
    again = models.load(tmp_path / "out")
    same(again, model)
    assert again.config.decoder_norm_eps == (1e-5 if source == META else 1e-6)


def test_another_size_and_like(tmp_path):
    """Lists of blocks, in shards; fields and files of `like` are kept."""
    source = changed(tmp_path, vision_config={"initializer_range": 0.5})
    (source / "processor.json").write_text("{}", "utf-8")
    model = sam.load(FOLDER, image_size=48, stacked=False, pixel_std=(0.5,))
    models.export(model, tmp_path / "out", like=source, max_shard_bytes=50_000)
    said = json.loads((tmp_path / "out/config.json").read_text("utf-8"))
    assert said["vision_config"]["initializer_range"] == 0.5
    sizes = {said[name].get("image_size") for name in said if name.endswith("config")}
    assert sizes == {48, None}
    assert (tmp_path / "out/processor.json").exists()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = sam.load(tmp_path / "out", stacked=False)
    same(again, model)
    assert again.config == dataclasses.replace(model.config, pixel_std=(0.5,) * 3)


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("out.pth", {}, ValueError, "a Sam is written as a folder"),
        ("out", {"class_names": ["a"]}, ValueError, "a Sam has no classes"),
        ("out", {"like": META}, CheckpointError, "leave like= out"),
        ("out", {"like": ASSETS / "llama/own"}, CheckpointError, "leave like= out"),
    ],
)
def test_exports_that_cannot_be(path, options, error, message, model, tmp_path):
    with pytest.raises(error, match=message):
        models.export(model, tmp_path / path, **options)
    assert not list(tmp_path.iterdir())


def test_models_that_transformers_does_not_have(model, tmp_path):
    tiny = models.load(ASSETS / "mobile_sam/mobile_sam.pt", image_size=32)
    with pytest.raises(ValueError, match="transformers has no SAM with a TinyViT"):
        models.export(tiny, tmp_path / "out")
    oblong = sam.load(FOLDER, image_size=(48, 80))
    with pytest.raises(ValueError, match=r"image_size=\(48, 80\): a SamModel of"):
        models.export(oblong, tmp_path / "out")
    other = changed(tmp_path, mask_decoder_config={"mlp_dim": 21})
    with pytest.raises(CheckpointError, match="it has mlp_dim=21, and the model 20"):
        models.export(model, tmp_path / "out", like=other)
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


# Adapters


def test_an_adapted_model_is_saved_loaded_and_exported(model, tmp_path):
    config = snella.SnellaConfig(rank=2, allocation="fixed")
    adapted = snella.adapt(model, config, rngs=nnx.Rngs(1))
    trained = {
        "/".join(map(str, path))
        for path, _ in nnx.to_flat_state(nnx.state(adapted, nnx.Param))
    }
    layers = [path for path in trained if path.endswith("adapter/left")]
    assert all(re.match(r"encoder/blocks/.*/(q|k|v|proj|fc1|fc2)/", p) for p in layers)
    beside = {path for path in trained if "adapter" not in path}
    assert "prompts/no_mask_embed" in beside and "decoder/iou/fc1/bias" in beside
    assert {path.split("/")[0] for path in beside} == {"decoder", "prompts"}
    snella.save(adapted, tmp_path / "adapter")
    again = snella.load(models.load(FOLDER), tmp_path / "adapter")
    merged = snella.merge(again)
    for one, other in zip(
        predicted(adapted, "nothing"), predicted(merged, "nothing"), strict=True
    ):
        close(one, np.asarray(other))
    snella.export(adapted, tmp_path / "out")
    same(models.load(tmp_path / "out"), merged)
    with pytest.raises(ValueError, match="decoder_norm_eps"):
        snella.load(models.load(META), tmp_path / "adapter")
    other = r"encoder/pos_embed: \[1, \d, \d, 16\] in the file and \[1, 2, 2, 16\] in"
    with pytest.raises(ValueError, match=f"{other} the model: is image_size the same"):
        snella.load(models.load(FOLDER, image_size=32), tmp_path / "adapter")


# Against transformers itself


@pytest.mark.reference
def test_transformers_reads_what_is_exported(tmp_path):
    """With the processor, whose pixels are those of `segment`."""
    import torch
    import transformers

    models.export(models.load(META), tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = transformers.SamModel.from_pretrained(tmp_path / "out").eval()
        processor = transformers.SamProcessor.from_pretrained(tmp_path / "out")
        make = script()
        got = make.outputs(read, EXPECTED, *CASES["all"])
        pixels = np.random.default_rng(0).integers(0, 256, (50, 33, 3), np.uint8)
        shown = processor(images=pixels, return_tensors="pt")["pixel_values"]
    close(got[0], EXPECTED["all/masks"])
    close(got[1], EXPECTED["all/iou"])
    assert torch.all(shown[..., 53:] == 0) and shown.shape == (1, 3, 80, 80)


@pytest.mark.reference
def test_other_random_weights(tmp_path):
    """The files of `make.py`, made anew from another seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script().main(tmp_path, seed=1)
    expected = dict(np.load(tmp_path / "expected.npz"))
    for name in ("transformers", "sam_vit.pth"):
        model = sam.load(tmp_path / name, decoder_norm_eps=1e-6)
        for case in CASES:
            is_that_of_transformers(model, case, expected=expected)


def script():
    spec = importlib.util.spec_from_file_location("make_sam", DATA / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
