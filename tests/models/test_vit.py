"""The ViT against a NumPy float64 forward pass, its shapes, and its bad inputs."""

import dataclasses
import math
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import called
from flax import nnx

import snella_jax as snella
from snella_jax.models import vit
from snella_jax.models.vit import ViT, ViTConfig

TINY = ViTConfig(
    width=12, depth=3, heads=2, patch_size=2, image_size=6, channels=2, num_classes=5
)


def build(**changes):
    model = ViT(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0))
    # Zero biases, unit scales and a zero head would hide mistakes.
    for path, value in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("bias", "scale", "scale1", "scale2") or path[0] == "head":
            key = jax.random.key(zlib.crc32("/".join(map(str, path)).encode()))
            value[...] += 0.3 * jax.random.normal(key, value.shape, value.dtype)
    return model


def numpy_forward(model, images):
    """The same network written out in float64."""
    c = model.config
    p = jax.tree.map(
        lambda v: np.asarray(v, np.float64), nnx.to_pure_dict(nnx.state(model))
    )
    (ph, pw), (gh, gw) = c.patch_hw, c.grid
    x = np.asarray(images, np.float64)
    x = x.reshape(len(x), gh, ph, gw, pw, c.channels).transpose(0, 1, 3, 2, 4, 5)
    kernel = p["patch_embed"]["kernel"].reshape(-1, c.width)
    x = x.reshape(len(x), gh * gw, -1) @ kernel + p["patch_embed"]["bias"]
    if c.class_token:
        x = np.concatenate([np.tile(p["cls_token"], (len(x), 1, 1)), x], 1)
    x = x + p["pos_embed"]

    def norm(x, q):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * q["scale"] + q["bias"]

    def dense(x, q):
        return x @ q["kernel"] + q["bias"]

    for i in range(c.depth):
        b = jax.tree.map(lambda v, i=i: v[i], p["blocks"])
        h = norm(x, b["norm1"])
        heads = [
            dense(h, b["attn"][name]).reshape(*x.shape[:2], c.heads, -1)
            for name in ("query", "key", "value")
        ]
        scores = np.einsum("bthd,bshd->bhts", *heads[:2])
        scores = np.exp(scores / math.sqrt(c.width / c.heads))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("bhts,bshd->bthd", scores, heads[2]).reshape(x.shape)
        x = x + dense(mixed, b["attn"]["out"]) * b.get("scale1", 1)
        h = dense(norm(x, b["norm2"]), b["mlp"]["fc1"])
        h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        x = x + dense(h, b["mlp"]["fc2"]) * b.get("scale2", 1)
    x = norm(x, p["norm"])
    pooled = x[:, 0] if c.pool == "cls" else x[:, int(c.class_token) :].mean(1)
    return dense(pooled, p["head"]) if c.num_classes else pooled


VARIANTS = {
    "cls": {},
    "mean_without_token": {"class_token": False, "pool": "mean"},
    "mean_with_token": {"pool": "mean"},
    "layer_scale": {"layer_scale": 0.5},
    "not_square": {"image_size": (4, 8), "patch_size": (2, 4)},
    "no_head": {"num_classes": 0},
    "narrow_mlp": {"mlp_dim": 7},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_the_network_written_out(variant):
    model = build(**VARIANTS[variant])
    shape = (3, *model.config.image_hw, 2)
    images = jax.random.normal(jax.random.key(1), shape)
    outputs = jax.jit(lambda x: model(x))(images)
    assert outputs.shape == (3, model.config.num_classes or 12)
    np.testing.assert_allclose(
        outputs, numpy_forward(model, images), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as published, with a head of 1000 classes
        ("vit_ti16", 5_717_416),
        ("vit_s16", 22_050_664),
        ("vit_b16", 86_567_656),
        ("vit_l16", 304_326_632),
        ("vit_h14", 632_045_800),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, parameters):
    model = nnx.eval_shape(lambda: vit.create(name, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters


def test_stochastic_depth_needs_a_key_and_changes_with_it():
    model = build(drop_path=0.9)
    images = jax.random.normal(jax.random.key(1), (8, 6, 6, 2))
    plain = called(build(), images)
    np.testing.assert_array_equal(called(model, images), plain)
    first, again, second = (called(model, images, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second) and not np.allclose(first, plain)


def test_dtype_is_for_compute_and_param_dtype_for_weights():
    model = build(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    images = jnp.ones((2, 6, 6, 2))
    assert jax.eval_shape(model, images).dtype == jnp.bfloat16
    assert {v.dtype for v in jax.tree.leaves(nnx.state(model))} == {
        jnp.dtype("float32")
    }
    frozen = build(param_dtype=jnp.bfloat16)
    dtypes = {v.dtype for v in jax.tree.leaves(nnx.state(frozen))}
    assert dtypes == {jnp.dtype("bfloat16")}
    assert jax.eval_shape(frozen, images).dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 7}, "image_size=7 is not a multiple of patch_size=2"),
        ({"heads": 5}, "heads=5 does not divide width=12"),
        ({"pool": "max"}, 'expected "cls" or "mean"'),
        ({"class_token": False}, 'use pool="mean"'),
        ({"drop_path": 1.0}, "expected 0 <= rate < 1"),
        ({"remat": "all"}, 'remat=\'all\': expected "none" or "blocks"'),
        ({"attention": "flash"}, "'flash': expected auto, xla, cudnn"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0: expected a positive number"),
        ({"norm_eps": math.nan}, "norm_eps=nan: expected a positive number"),
        ({"pixel_std": (0.0,)}, "expected finite numbers, std above 0"),
        ({"pixel_mean": (math.inf,)}, "expected finite numbers, std above 0"),
    ],
)
def test_a_bad_config_says_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("shape", [(2, 8, 8, 2), (2, 6, 6, 3), (6, 6, 2)])
def test_an_image_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"this model takes \[B, 6, 6, 2\]"):
        build()(jnp.zeros(shape))


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"'vit_x'\. Did you mean vit_s16 or vit_l16 or vit_h14\?"
    ):
        vit.create("vit_x", rngs=nnx.Rngs(0))


# Stacked or not, recomputed or not


def unstacked(model):
    """The same weights in a list of blocks."""
    twin = ViT(dataclasses.replace(model.config, stacked=False), rngs=nnx.Rngs(1))
    values = dict(nnx.to_flat_state(nnx.state(model)))
    for path, variable in nnx.to_flat_state(nnx.state(twin)):
        if path[0] == "blocks":
            _, index, *rest = path
            variable[...] = values["blocks", *rest][...][index]
        else:
            variable[...] = values[path][...]
    return twin


def test_a_list_of_blocks_computes_what_the_stack_does():
    """Deterministic, and with stochastic depth from the same key."""
    model = build(drop_path=0.5)
    twin, images = unstacked(model), jnp.ones((4, 6, 6, 2))
    for key in (None, jax.random.key(3)):
        np.testing.assert_allclose(
            called(twin, images, key),
            called(model, images, key),
            rtol=1e-5,
            atol=1e-5,
        )
    outputs = called(model, images), called(model, images, jax.random.key(3))
    assert not np.allclose(*outputs)


@pytest.mark.parametrize("stacked", [True, False])
def test_recomputed_blocks_give_the_same_gradients(stacked):
    images = jax.random.normal(jax.random.key(1), (2, 6, 6, 2))

    def gradients(remat):
        model = build(remat=remat, stacked=stacked)
        graphdef, state = nnx.split(model)

        def loss(state):
            return jnp.sin(nnx.merge(graphdef, state)(images)).sum()

        return jax.jit(jax.grad(loss))(state), str(jax.make_jaxpr(loss)(state))

    (plain, code), (again, remat_code) = gradients("none"), gradients("blocks")
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert remat_code.count("policy=") > code.count("policy=")


def test_recomputed_blocks_do_not_search_for_tau_again():
    """Two scans, in one of them two searches, and the gradients of no remat."""
    config = snella.SnellaConfig(targets=r"blocks/mlp/fc\d", trainable="head")

    def compiled(remat):
        model = snella.adapt(build(remat=remat), config, rngs=nnx.Rngs(1))
        graphdef, trainable, budgets, frozen = snella.partition(model)
        budgets = jax.tree.map(lambda b: b // 3, budgets)

        def loss(trainable):
            model = nnx.merge(graphdef, trainable, budgets, frozen)
            return jnp.sin(model(jnp.ones((2, 6, 6, 2)))).sum()

        gradient = jax.jit(jax.grad(loss)).lower(trainable).compile()
        loops = [x for x in gradient.as_text().split("\n") if " while(" in x]
        searches = [x for x in loops if re.search("while/body.*snella_threshold", x)]
        scans = [x for x in loops if "snella_threshold" not in x]
        return (len(scans), len(searches)), gradient(trainable)

    (loops, gradients), (again, remat_gradients) = compiled("none"), compiled("blocks")
    assert loops == again == (2, 2)
    leaves = [jax.tree.leaves(tree) for tree in (gradients, remat_gradients)]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_every_parameter_is_an_array_of_its_own():
    """Or a step could not donate them."""
    config = dataclasses.replace(TINY, layer_scale=0.5, stacked=False)
    leaves = jax.tree.leaves(nnx.state(ViT(config, rngs=nnx.Rngs(0))))
    arrays = [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)
