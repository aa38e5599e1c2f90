"""Another base than the one an adapter was trained on is refused, and named.

Whatever of it differs: weights that have no adapter, or a config that changes outputs.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snella_jax as snella
from snella_jax import models
from snella_jax.models import convnext, swin, vit
from snella_jax.nnx.selection import weights_of
from snella_jax.nnx.variables import variables_of

SMALL = vit.ViTConfig(
    width=8, depth=2, heads=2, patch_size=4, image_size=8, channels=3, num_classes=3
)
CONFIG = snella.SnellaConfig(
    rank=4, allocation="fixed", targets=".*/(query|fc1)", trainable="(body/)?head"
)
UNSTACK = {r"blocks/(.*)\[(\d+)\]": r"blocks/\2/\1"}


def drawn(make, seed=0):
    """With numbers of its own in every weight, those that start at 0 or 1 too."""
    model, rng = nnx.eval_shape(make), np.random.default_rng(seed)
    for _, value in variables_of(model, nnx.Param):
        numbers = rng.normal(size=value.shape)
        value.set_value(jnp.asarray(numbers, value.dtype))
    return model


def small(**changes):
    """The same weights whatever the config, where its shapes are the same."""
    config = dataclasses.replace(SMALL, **changes)
    return drawn(lambda: vit.ViT(config, rngs=nnx.Rngs(0)))


def nudged(model, path, index=-1):
    """A copy with one number of one variable moved to the next that there is."""
    model = nnx.clone(model)
    variable = dict(variables_of(model, nnx.Variable))[path]
    value = np.array(variable[...])
    flat = value.reshape(-1)
    flat[index] = np.nextafter(flat[index], np.float32(9))
    variable[...] = jnp.asarray(value)
    return model


def refused(load, message):
    with pytest.raises(snella.CheckpointError, match=message):
        load()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "a"
    snella.save(snella.adapt(small(), CONFIG, rngs=nnx.Rngs(1)), folder)
    return folder


@pytest.mark.parametrize(
    "path",
    [
        "norm/scale",
        "norm/bias",
        "blocks/norm1/scale",
        "blocks/attn/query/bias",  # of an adapted layer
        "blocks/attn/value/kernel",
        "blocks/mlp/fc2/bias",
        "pos_embed",
        "patch_embed/kernel",
    ],
)
def test_any_number_of_the_rest_counts(path, saved, caplog):
    other = nudged(small(), path)
    refused(lambda: snella.load(other, saved), rf"\n  {path}: its numbers are not")
    loaded = snella.load(other, saved, allow_base_mismatch=True)
    assert f"has another base:\n  {path}: its numbers" in caplog.text
    for name, value in variables_of(other, nnx.Variable):
        if name == path:
            own = dict(variables_of(loaded, nnx.Variable))[path]
            np.testing.assert_array_equal(own[...], value[...])
    trained = nudged(small(), "head/kernel")  # which the file brings
    snella.load(trained, saved)


def test_an_adapted_weight_may_be_let_through_too(saved, caplog):
    other = nudged(small(), "blocks/attn/query/kernel")
    message = r"query: the weight \(rows \[1\]\), float32, is not(.|\n)*allow_base_mis"
    refused(lambda: snella.load(other, saved), message)
    loaded = snella.load(other, saved, allow_base_mismatch=True)
    assert "blocks/attn/query: the weight (rows [1])" in caplog.text
    merged = snella.merge(loaded).blocks.attn.query.kernel[...]
    base = other.blocks.attn.query.kernel[...]
    moved = snella.adapt(small(), CONFIG, rngs=nnx.Rngs(1))
    delta = {w.path: w for w in weights_of(moved)}["blocks/attn/query"]
    np.testing.assert_array_equal(merged, base + delta.delta())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 4}, "heads: 2 in the file and 4 in the model"),
        ({"norm_eps": 1e-5}, "norm_eps: 1e-06 in the file and 1e-05 in the model"),
        ({"pool": "mean"}, "pool: cls in the file and mean in the model"),
        ({"pixel_mean": (0.4,)}, r"pixel_mean: \[0.5, 0.5, 0.5\] in the file"),
        ({"pixel_std": (0.5, 0.5, 0.2)}, r"pixel_std: .* \[0.5, 0.5, 0.2\] in the m"),
    ],
)
def test_configs_that_change_outputs_are_compared(changes, message, saved, caplog):
    other = small(**changes)
    refused(lambda: snella.load(other, saved), rf"\n  {message}")
    snella.load(other, saved, allow_base_mismatch=True)
    assert message.split(":")[0] in caplog.text


def test_a_model_that_is_part_of_another_is_compared(tmp_path):
    class Whole(nnx.Module):
        def __init__(self, **changes):
            self.body, self.more = small(**changes), nnx.Param(jnp.ones(3))

    adapted = snella.adapt(Whole(), CONFIG, rngs=nnx.Rngs(1))
    snella.save(adapted, tmp_path / "a")
    snella.load(Whole(), tmp_path / "a")
    message = r"\n  body/heads: 2 in the file and 4 in the model\n  allow"
    refused(lambda: snella.load(Whole(heads=4), tmp_path / "a"), message)
    refused(lambda: snella.load(nudged(Whole(), "more"), tmp_path / "a"), "more: its n")


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "blocks", "attention": "xla", "drop_path": 0.1},
        {"dtype": jnp.bfloat16},
        {"pixel_mean": (0.5, 0.5, 0.5), "norm_eps": float(np.float32(1e-6))},
        {"mlp_dim": 32, "image_size": (8, 8), "patch_size": (4, 4)},
    ],
)
def test_configs_that_do_not_are_not(changes, saved):
    snella.load(small(**changes), saved)


def swin_of(**changes):
    config = swin.SwinConfig(4, depths=(2, 2), heads=(2, 4), image_size=32)
    config = dataclasses.replace(config, **changes)
    return drawn(lambda: swin.Swin(config, rngs=nnx.Rngs(0)))


def convnext_of(**changes):
    config = convnext.ConvNeXtConfig((4, 8), depths=(1, 2), image_size=32)
    config = dataclasses.replace(config, **changes)
    return drawn(lambda: convnext.ConvNeXt(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("make", "changes"),
    [(swin_of, {"heads": (4, 2)}), (convnext_of, {"norm_eps": 1e-5})],
)
def test_models_of_stages_are_compared_and_take_any_size(make, changes, tmp_path):
    own = dataclasses.replace(CONFIG, targets=".*fc1", trainable="head")
    snella.save(snella.adapt(make(), own, rngs=nnx.Rngs(1)), tmp_path / "a")
    snella.load(make(image_size=64), tmp_path / "a")
    message = rf"\n  {next(iter(changes))}: .* in the file"
    refused(lambda: snella.load(make(**changes), tmp_path / "a"), message)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("names", [None, UNSTACK])
def test_a_base_is_known_by_its_rounding(dtype, names, tmp_path):
    def narrow(model):
        model = nnx.clone(model)
        for _, value in variables_of(model, nnx.Param):
            value.set_value(value[...].astype(dtype))
        return model

    def load(base, folder):
        base = base if names is None else models.unstack(base)
        snella.load(base, tmp_path / folder, rename=names)

    one, near, far = small(), small(), small()
    scale = np.array(one.blocks.norm1.scale[...])
    near.blocks.norm1.scale[...] = jnp.asarray(np.nextafter(scale, 9, dtype="f4"))
    far.blocks.norm1.scale[...] = jnp.asarray(scale * 1.1)
    for folder, base in (("wide", one), ("narrow", narrow(one))):
        snella.save(snella.adapt(base, CONFIG, rngs=nnx.Rngs(1)), tmp_path / folder)
        load(one, folder)
        load(narrow(one), folder)
        for other in (far, narrow(far)):
            refused(lambda o=other, f=folder: load(o, f), "numbers")
    load(near, "narrow")  # it rounds to the same
    refused(lambda: load(near, "wide"), "numbers")


def swapped(model, path):
    """The rows of a stack in the other order, or those of two blocks exchanged."""
    model = nnx.clone(model)
    variables = dict(variables_of(model, nnx.Variable))
    if path in variables:
        variables[path][...] = variables[path][::-1]
        return model
    one, other = (variables[path.replace("blocks", f"blocks/{i}")] for i in (0, 1))
    one[...], other[...] = other[...], one[...]
    return model


@pytest.mark.parametrize("stacked", [False, True], ids=["unstacked", "stacked"])
def test_rows_of_stacks_are_compared_with_blocks_of_their_own(stacked, tmp_path):
    """An adapter of a stacked base, for one that is not; and the other way round."""
    one, other = small(), models.unstack(small())
    rename, rows = UNSTACK, "blocks/1"
    if stacked:
        one, other = other, one
        rename, rows = {r"blocks/(\d+)/(.*)": r"blocks/\2[\1]"}, "blocks"
    snella.save(snella.adapt(one, CONFIG, rngs=nnx.Rngs(1)), tmp_path / "a")
    snella.load(other, tmp_path / "a", rename=rename)
    wrong = {
        name: nudged(other, f"{rows}/{name}")
        for name in ("mlp/fc2/bias", "norm2/scale")
    } | {name: swapped(other, f"blocks/{name}") for name in ("norm1/bias",)}
    for name, model in wrong.items():
        with pytest.raises(snella.CheckpointError, match=f"blocks/{name}: its numbers"):
            snella.load(model, tmp_path / "a", rename=rename)


@pytest.mark.parametrize("shapes", [((8, 12), (4, 16)), ((16, 8), (8, 16))])
def test_positions_of_another_size_are_no_other_base(shapes, tmp_path, caplog):
    """Frozen, they follow from the base's at any size; trained, from the file's."""
    one, other = (small(image_size=(4 * h, 4 * w)) for h, w in shapes)
    same = dict(variables_of(one, nnx.Param))
    for path, value in variables_of(other, nnx.Param):
        value[...] = value[...] + 1 if path == "pos_embed" else same[path][...]
    for folder, trainable in (("frozen", "head"), ("trained", "head|pos_embed")):
        own = dataclasses.replace(CONFIG, trainable=trainable)
        model = snella.adapt(one, own, rngs=nnx.Rngs(1))
        snella.save(model, tmp_path / folder)
        again = snella.load(one, tmp_path / folder)
        np.testing.assert_array_equal(again.pos_embed[...], model.pos_embed[...])
        assert again.config.grid == shapes[0]
    snella.load(other, tmp_path / "frozen")
    assert "pos_embed is that of another grid: it was not compared" in caplog.text
    message = "pos_embed: .* in the file|grid: .* in the file and .* in the model"
    refused(lambda: snella.load(other, tmp_path / "trained"), message)


def test_the_same_positions_on_another_grid_are_another_base(tmp_path):
    one, other = small(image_size=(8, 32)), small(image_size=(16, 16))
    assert one.pos_embed.shape == other.pos_embed.shape
    snella.save(snella.adapt(one, CONFIG, rngs=nnx.Rngs(1)), tmp_path / "a")
    message = r"grid: \[2, 8\] in the file and \[4, 4\] in the model"
    refused(lambda: snella.load(other, tmp_path / "a"), message)


class Held(nnx.Module):
    """Numbers in no variable, in a list, and several in one parameter."""

    def __init__(self, **changes):
        numbers = {"jax": 2.0, "numpy": 2.0, "listed": 2.0, "tree": 2.0} | changes
        self.fc = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.scale = jnp.full(6, numbers["jax"])
        self.offset = np.full(6, numbers["numpy"])
        self.parts = nnx.List([jnp.full(2, numbers["listed"])])
        self.tree = nnx.Param({"one": jnp.full(3, numbers["tree"])})


@pytest.mark.parametrize("which", ["jax", "numpy", "listed", "tree"])
def test_numbers_outside_of_plain_variables_are_compared(which, tmp_path):
    config = snella.SnellaConfig(rank=4, targets="fc", trainable="", allocation="fixed")
    model = snella.adapt(Held(), config, rngs=nnx.Rngs(1))
    snella.save(model, tmp_path / "a")
    snella.load(Held(), tmp_path / "a")
    refused(lambda: snella.load(Held(**{which: 5.0}), tmp_path / "a"), "numbers")


def test_a_tree_that_would_be_saved_is_named(tmp_path):
    config = snella.SnellaConfig(
        rank=4, targets="fc", trainable="tree", allocation="fixed"
    )
    model = snella.adapt(Held(), config, rngs=nnx.Rngs(1))
    with pytest.raises(TypeError, match="tree holds a dict: expected one array"):
        snella.save(model, tmp_path / "a")
    with pytest.raises(TypeError, match="tree holds a dict: expected one array"):
        snella.save_delta(Held(), snella.merge(model), tmp_path / "d.safetensors")
