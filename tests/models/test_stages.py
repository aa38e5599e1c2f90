"""Swin and ConvNeXt: parity with transformers, stacks against lists, windows.

`tests/assets/staged/make.py` made the files and says what is in them.
"""

import dataclasses
import importlib.util
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import called
from flax import nnx
from places import ASSETS
from safetensors.numpy import load_file, save_file
from staged import BOTH, PIXELS, close, logits, run, small

from snella_jax import models
from snella_jax.files.errors import CheckpointError
from snella_jax.models import convnext, swin, vit
from snella_jax.models.layers import stack
from snella_jax.models.swin.model import WindowAttention
from snella_jax.models.swin.weights import resized_tables

DATA = ASSETS / "staged"
ORIGINAL = {"image_size": (50, 38)}  # which these files do not say
FILES = {
    "swin": {},
    "swin.pth": ORIGINAL,
    "swin/model.safetensors": ORIGINAL,
    "convnext": {},
    # The numbers are of transformers, whose last norm has another epsilon.
    "convnext.pth": ORIGINAL | {"norm_eps": 1e-12},
    "convnext/model.safetensors": ORIGINAL,
}


@pytest.fixture(
    scope="module",
    params=["committed", pytest.param("fresh", marks=pytest.mark.reference)],
)
def folder(request, tmp_path_factory):
    """The files and numbers beside this test, or others that transformers makes now."""
    if request.param == "committed":
        return DATA
    spec = importlib.util.spec_from_file_location("make_staged", DATA / "make.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    folder = tmp_path_factory.mktemp("staged")
    with warnings.catch_warnings():  # of torch and transformers, not ours
        warnings.simplefilter("ignore")
        make.main(folder, seed=1)
    return folder


def load(name, **options):
    return models.load(DATA / name, **options)


IMAGES = jax.random.normal(jax.random.key(5), (2, 50, 38, 3))


# Against transformers


@pytest.mark.parametrize(
    ("name", "stacked"),
    [*((name, True) for name in FILES), *((n, False) for n in BOTH)],
)
def test_every_stage_is_that_of_transformers(name, stacked, folder):
    """On images that patches, windows and merging do not divide."""
    model = models.load(folder / name, stacked=stacked, **FILES[name])
    family, expected = (
        name.split("/")[0].split(".")[0],
        np.load(folder / "expected.npz"),
    )
    stages, pooled, logits = run(model, expected["images"])
    assert len(stages) == 3
    for index, grid in enumerate(stages):
        close(grid, expected[f"{family}/stage_{index}"])
    close(pooled, expected[f"{family}/pooled"])
    close(logits, expected[f"{family}/logits"])


def test_what_the_files_say_of_the_config():
    model = load("swin")
    expected = swin.SwinConfig(
        width=4,
        depths=(2, 4, 2),
        heads=(1, 2, 4),
        window=3,
        patch_size=(4, 4),
        image_size=(50, 38),
        num_classes=3,
    )
    assert model.config == expected
    # As large as the last stage's one window, where the file does not say.
    assert load("swin.pth").config.image_hw == (3 * 4 * 4, 3 * 4 * 4)
    model = load("convnext")
    assert model.config == convnext.ConvNeXtConfig(
        widths=(4, 6, 8),
        depths=(1, 3, 2),
        patch_size=(4, 4),
        image_size=(50, 38),
        layer_scale=1.0,
        norm_eps=1e-12,
        num_classes=3,
    )
    assert load("convnext.pth").config.image_hw == (224, 224)
    assert load("convnext.pth").config.norm_eps == 1e-6


def test_a_model_without_head_and_one_with_a_new_head(tmp_path):
    for name in BOTH:
        tensors = load_file(DATA / name / "model.safetensors")
        bare = {
            path.removeprefix(f"{name}."): tensor
            for path, tensor in tensors.items()
            if not path.startswith("classifier")
        }
        shutil.copytree(DATA / name, tmp_path / name)
        save_file(bare, tmp_path / name / "model.safetensors")
        model = models.load(tmp_path / name)
        assert model.config.num_classes == 0 and not hasattr(model, "head")
        close(run(model, IMAGES)[1], run(load(name), IMAGES)[1])
        new = load(name, num_classes=7, param_dtype=jnp.bfloat16)
        assert new.head.kernel.shape == (model.config.widths[-1], 7)
        assert not np.any(run(new, IMAGES)[-1])
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(nnx.state(new)))


def test_other_sizes_change_no_weight():
    for name in BOTH:
        model, other = load(name), load(name, image_size=(36, 64))
        pixels = jax.random.normal(jax.random.key(1), (1, 36, 64, 3))
        (first, *_, last), _, _ = run(other, pixels)
        assert first.shape == (1, 9, 16, 4)
        assert last.shape[1:3] == ((3, 4) if name == "swin" else (2, 4))
        same = nnx.state(model), nnx.state(other)
        jax.tree.map(np.testing.assert_array_equal, *same)
        with pytest.raises(ValueError, match=r"this model takes \[B, 36, 64, 3\]"):
            other(IMAGES)


def test_normalisation_is_that_of_imagenet_or_of_the_folder(tmp_path):
    half = jnp.full((1, 1, 1, 3), 0.5)
    for name in BOTH:
        expected = (0.5 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
        close(load(name).normalise(half)[0, 0, 0], expected)
        own = shutil.copytree(DATA / name, tmp_path / name)
        said = {"image_mean": [0.5, 0.25, 0.0], "image_std": [1.0, 2.0, 0.5]}
        (own / "preprocessor_config.json").write_text(json.dumps(said), "utf-8")
        model = models.load(own)
        close(model.normalise(half)[0, 0, 0], [0, 0.125, 1])
        assert hash(model.config) and model.config.pixel_mean == (0.5, 0.25, 0.0)


def test_what_does_not_fit_is_said(tmp_path):
    def wrong(name, message, change=None, config=None, images=None):
        tensors = load_file(DATA / name / "model.safetensors")
        new = shutil.copytree(DATA / name, tmp_path / "new", dirs_exist_ok=True)
        save_file((change or (lambda t: t))(tensors), new / "model.safetensors")
        said = json.loads((new / "config.json").read_text("utf-8")) | (config or {})
        (new / "config.json").write_text(json.dumps(said), "utf-8")
        if images:
            (new / "preprocessor_config.json").write_text(json.dumps(images), "utf-8")
        with pytest.raises(CheckpointError, match=message):
            models.load(new)
        (new / "preprocessor_config.json").unlink(missing_ok=True)

    def without(name):
        return lambda tensors: {n: t for n, t in tensors.items() if n != name}

    merging = "swin.encoder.layers.0.downsample.norm.weight"
    wrong("swin", "down/0/norm/scale .*no tensor for it", without(merging))
    last = "swin.encoder.layers.2.blocks.1.layernorm_before.weight"
    wrong("swin", "blocks/2/0/shifted/norm1/scale .*no tensor", without(last))
    extra = {"swin.embeddings.position_embeddings": np.zeros((1, 9, 4), np.float32)}
    wrong("swin", "position_embeddings .*there is no place", lambda t: t | extra)
    wrong("swin", "expected layer_norm_eps=1e-05", config={"layer_norm_eps": 1e-6})
    wrong("swin", "exact GELU", config={"hidden_act": "relu"})

    def smaller(tensors):
        small = {
            n: t[:9] for n, t in tensors.items() if "bias_table" in n and ".2." in n
        }
        return tensors | small

    wrong("swin", r"\(25, 25, 9\) biases: expected one window for all", smaller)
    first = "swin.embeddings.patch_embeddings.projection.weight"
    wrong("swin", "there is no tensor for patch_embed/kernel", without(first))
    wrong("swin", "pixel_mean='abc': expected numbers", images={"image_mean": "abc"})
    wrong("convnext", "norm_eps=None: expected", config={"layer_norm_eps": None})
    with pytest.raises(ValueError, match=r"^image_size=2: expected at least"):
        load("convnext", image_size=2)
    with pytest.raises(ValueError, match="stackd"):
        load("swin", stackd=True)
    gamma = "convnext.encoder.stages.1.layers.2.layer_scale_parameter"
    wrong("convnext", "blocks/1/2/scale .*no tensor", without(gamma))
    with pytest.raises(CheckpointError, match="no Swin of a known format"):
        swin.load(DATA / "convnext")
    with pytest.raises(CheckpointError, match="no ConvNeXt of a known format"):
        convnext.load(DATA / "swin.pth")
    with pytest.raises(
        CheckpointError, match="no ViT, Swin, ConvNeXt, SAM, LLaMA or MMDiT"
    ):
        models.load(DATA / "expected.npz")
    extra = "swin.encoder.layers.0.blocks.1.attention.foo"
    wrong("swin", f"\\n  {extra.removeprefix('swin.')} .*no place", lambda t: t | {
        extra: np.zeros(3, np.float32)
    })  # fmt: skip


def test_a_vit_is_loaded_by_the_same_function():
    path = DATA.parent / "vit" / "classifier"
    assert isinstance(models.load(path), vit.ViT)


# Windows


def numpy_attention(attn, x, window):
    """Full attention over the grid, token by token, in float64."""
    p = jax.tree.map(
        lambda v: np.asarray(v, np.float64), nnx.to_pure_dict(nnx.state(attn))
    )
    batch, height, width, features = x.shape
    places = [(r, c) for r in range(height) for c in range(width)]
    tokens = np.asarray(x, np.float64).reshape(batch, -1, features)
    q, k, v = (
        (tokens @ p[n]["kernel"] + p[n]["bias"]).reshape(
            batch, len(places), attn.heads, -1
        )
        for n in ("query", "key", "value")
    )
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    side = 2 * window - 1
    for t, (row, column) in enumerate(places):
        for s, (other_row, other_column) in enumerate(places):
            down, right = (
                row - other_row + window - 1,
                column - other_column + window - 1,
            )
            logits[:, :, t, s] += p["bias_table"][down * side + right]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bhts,bshd->bthd", weights, v).reshape(tokens.shape)
    return (y @ p["out"]["kernel"] + p["out"]["bias"]).reshape(x.shape)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("side", [3, 5])
def test_a_small_grid_is_one_window_with_the_biases_of_its_offsets(side, shifted):
    config = swin.SwinConfig(6, (2,), (2,), window=5)
    attn = WindowAttention(6, 2, config, shifted, rngs=nnx.Rngs(0))
    attn.bias_table[...] += jax.random.normal(jax.random.key(1), (81, 2))
    x = jax.random.normal(jax.random.key(2), (2, side, side, 6))
    close(called(attn, x), numpy_attention(attn, x, window=5))


def test_another_window_has_resized_tables():
    """A table that is a plane nearly stays one (a = -0.75), but at its border."""
    plane = np.stack(np.mgrid[-5:6.0, -5:6.0], -1).reshape(121, 2)
    config = swin.SwinConfig(8, (2,), (2,), window=12)
    fitted = resized_tables({"blocks/0/0/plain/attn/bias_table": plane}, config)
    wide = fitted["blocks/0/0/plain/attn/bias_table"].reshape(23, 23, 2)
    expected = np.stack(np.mgrid[-11:12.0, -11:12.0], -1) * 11 / 23
    close(wide[4:-4, 4:-4], expected[4:-4, 4:-4], atol=0.06)
    model = load("swin", window=5, image_size=80)
    assert model.config.window == 5 and model.blocks[0].plain.attn.window == 5
    assert model.blocks[1].plain.attn.bias_table.shape == (2, 81, 2)
    old = load("swin").blocks[1].plain.attn.bias_table[...].reshape(2, 5, 5, 2)
    new = model.blocks[1].plain.attn.bias_table[...].reshape(2, 9, 9, 2)
    close(new[:, 4, 4], old[:, 2, 2])
    assert np.isfinite(run(model, jnp.ones((1, 80, 80, 3)))[-1]).all()
    same = load("swin", window=3)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(same), nnx.state(load("swin"))
    )


# Stacked or not, recomputed or not


@pytest.mark.parametrize("name", BOTH)
def test_a_list_of_blocks_computes_what_the_stack_does(name):
    """Deterministic, and with stochastic depth from the same key."""
    model = small(name, drop_path=0.5)
    twin = models.unstack(model)
    assert twin.config == dataclasses.replace(model.config, stacked=False)
    for key in (None, jax.random.key(3)):
        close(logits(twin, key), logits(model, key))
    assert not np.allclose(logits(model), logits(model, jax.random.key(3)))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("stacked", [True, False])
def test_recomputed_blocks_give_the_same_gradients(name, stacked):
    def gradients(remat):
        model = small(name, remat=remat)
        graphdef, state = nnx.split(model if stacked else models.unstack(model))

        def loss(state):
            return jnp.sum(nnx.merge(graphdef, state)(PIXELS) ** 2)

        return jax.jit(jax.grad(loss))(state)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradients("none"),
        gradients("blocks"),
    )


def test_rates_rise_over_all_stages():
    """From 0 in the first block to the rate in the last, by pairs in a Swin."""
    drops = stack.drops(jax.random.key(0), 0.7, [(1, 2), (3, 2)])
    rates = np.concatenate([rates.ravel() for _, rates in drops])
    close(rates, np.linspace(0, 0.7, 8))
    keys = np.concatenate([jax.random.key_data(k).reshape(-1, 2) for k, _ in drops])
    assert len(np.unique(keys, axis=0)) == 8
    raw = stack.drops(jax.random.PRNGKey(0), 0.7, [(1, 2), (3, 2)])
    for (one, _), (other, _) in zip(drops, raw, strict=True):
        np.testing.assert_array_equal(jax.random.key_data(one), other)
    assert stack.drops(None, 0.7, [(1, 2)]) == [None]
    assert stack.drops(jax.random.key(0), 0.0, [(2,), (3,)]) == [None, None]


# Presets and configs


def test_presets_have_the_published_sizes():
    """Backbones of 86.7 and 87.6 million, as the papers' tables say; and the head."""
    for name, count in (("swin_b", 86_743_224), ("convnext_b", 87_566_464)):
        shapes = nnx.eval_shape(
            lambda n=name: models.create(n, num_classes=100, rngs=nnx.Rngs(0))
        )
        size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes)))
        assert size == count + 1024 * 100 + 100
    with pytest.raises(ValueError, match=r"'swin_x'\. Did you mean swin_[bl]"):
        models.create("swin_x", rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="int is the config of no model"):
        models.of(3, nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("swin_b", {"depths": (2, 3, 2, 2)}, "expected even numbers"),
        ("swin_b", {"heads": (4, 8)}, "expected a positive number for each stage"),
        ("swin_b", {"heads": (3, 8, 16, 32)}, "do not divide"),
        ("swin_b", {"window": 0}, "window=0.*expected positive"),
        ("swin_b", {"remat": "all"}, 'expected "none" or "blocks"'),
        ("swin_b", {"drop_path": 1.0}, "expected 0 <= rate < 1"),
        ("convnext_b", {"widths": (1, 2)}, "expected a positive number for each stage"),
        ("convnext_b", {"depths": ()}, "expected a positive number for each stage"),
        ("convnext_b", {"image_size": 28}, "expected at least \\(32, 32\\)"),
        ("convnext_b", {"num_classes": -1}, "expected at least 0"),
        ("convnext_b", {"pixel_mean": (0.5, 0.5)}, "expected 3 numbers"),
    ],
)
def test_a_bad_config_says_what_was_expected(name, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(models.PRESETS[name], **changes)


def test_one_stage_is_enough():
    for config in (
        swin.SwinConfig(8, (2,), (2,), 2, image_size=8, num_classes=3),
        convnext.ConvNeXtConfig((8,), (1,), image_size=8, num_classes=3),
    ):
        model = nnx.eval_shape(lambda c=config: models.of(c, nnx.Rngs(0)))
        graphdef, state = nnx.split(model)
        logits = jax.eval_shape(
            lambda s, g=graphdef: nnx.merge(g, s)(jnp.zeros((2, 8, 8, 3))), state
        )
        assert logits.shape == (2, 3) and not model.down
