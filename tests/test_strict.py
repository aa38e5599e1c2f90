"""JAX's strict settings change no number, and nothing fails under them.

Flax and optax work under each of these. The oracle is the same program without the
setting: bit for bit where XLA compiles the same, to rounding where it compiles nothing.
"""

import contextlib
import functools
import gc
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import called
from flax import nnx
from generic import generic_factors, generic_inputs, run
from places import ASSETS

import snella_jax as snella
from snella_jax import adapted_dense, kernels, linen, models, pytree
from snella_jax.core.gates import GATES


@contextlib.contextmanager
def checking_leaks():
    """Looks for leaked tracers among what is new: not in the heap of all tests."""
    gc.freeze()
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()
        gc.freeze()  # as it was, see conftest.py


SETTINGS = {
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "x64": lambda: jax.enable_x64(True),
    "debug_nans": lambda: jax.debug_nans(True),
    "check_tracer_leaks": checking_leaks,
    "disable_jit": jax.disable_jit,
}
KERNELS = {name: kernels.named(name) for name in kernels.KERNELS} | {
    "mix_k, temperature": kernels.mix_k(temperature=True, learn_piece_coeff=False),
    "mix_k over in": kernels.mix_k(normalize_over="in", pieces=1),
}
# Adam divides by 1 - beta^step, which is no float32 under x64 and fails under strict.
TX = optax.chain(
    snella.track_importance(),
    optax.add_decayed_weights(1e-2, snella.decay_mask),
    optax.sgd(0.1),
)

# Of single operations, which XLA compiles otherwise where indices have 64 bits.
OUTPUTS = "['merged']", "['loaded']"

pytestmark = pytest.mark.slow  # under each setting everything compiles anew
each_setting = pytest.mark.parametrize("setting", SETTINGS)
# One of each implementation, where the rest of a kernel makes no difference.
SOME = "linear", "piecewise_linear", "rbf", "mix_k", "mix_k, temperature"
PAIRS = [
    (name, setting)
    for setting in SETTINGS
    for name in (SOME if setting in ("check_tracer_leaks", "disable_jit") else KERNELS)
]


def assert_same(got, expected, setting):
    """Types, too; a bfloat16 number may be on the other side of where it rounds."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    paths = jax.tree_util.tree_leaves_with_path(got)
    for (path, one), other in zip(paths, jax.tree.leaves(expected), strict=True):
        where = jax.tree_util.keystr(path)
        assert one.dtype == other.dtype, where
        one, other = np.float64(one), np.float64(other)
        part = {"disable_jit": 1e-5, "x64": 1e-6 * (where in OUTPUTS)}.get(setting, 0)
        np.testing.assert_allclose(
            one, other, 0, part * np.abs(other).max(initial=1), err_msg=where
        )


# The matmul


def matmuls(name, dtype):
    """Values and gradients by gate and path, dropping on the parallel one."""
    kernel, key = KERNELS[name], jax.random.key(0)
    gates = (*GATES, "none") if name == "mix_k" else ("product",)
    x, w0 = generic_inputs(dtype=dtype)
    factors = generic_factors(kernel, dtype=dtype)

    def loss(operands, gate, path):
        drop = {"dropout": 0.2, "drop_path": 0.2, "key": key}
        settings = {"gate": gate, "path": path, **(drop if path == "parallel" else {})}
        y = adapted_dense(*operands, 90, kernel=kernel, **settings)
        return jnp.sin(y.astype(jnp.float32)).sum(), y

    def both(*operands):
        graded = jax.value_and_grad(loss, has_aux=True)
        return {
            f"{gate} {path}": graded(operands, gate, path)
            for gate in gates
            for path in ("merged", "parallel")
        }

    return run(both, x, w0, factors)


@functools.cache
def usual_matmuls(name, dtype):
    return matmuls(name, dtype)


@pytest.mark.parametrize(("name", "setting"), PAIRS)
def test_every_kernel_gate_and_path(name, setting):
    """In float32 and, where dtypes may not meet, in bfloat16."""
    for dtype in (jnp.float32, jnp.bfloat16)[: 1 + (setting == "strict dtypes")]:
        expected = usual_matmuls(name, dtype)
        with SETTINGS[setting]():
            got = matmuls(name, dtype)
        assert_same(got, expected, setting)


# The bindings, from adapting to a file and back

CONFIG = {"rank": 4, "trainable": "head", "target_density": 0.3}
IMAGES = np.random.default_rng(0).normal(size=(5, 4, 4, 2)).astype(np.float32)


class Net(nnx.Module):
    """NNX's kinds of weights: a convolution, heads and a stack that is scanned."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 6, (2, 2), rngs=rngs)
        self.heads = nnx.LinearGeneral(6, (2, 3), rngs=rngs)
        rows = nnx.split_rngs(splits=2)(nnx.vmap(lambda r: nnx.Linear(6, 6, rngs=r)))
        self.fc = rows(rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = self.heads(self.conv(x).mean((1, 2))).reshape(len(x), -1)
        graphdef, state = nnx.split(self.fc)

        def body(x, row):
            return jnp.tanh(nnx.merge(graphdef, row)(x)), None

        return self.head(jax.lax.scan(body, x, state)[0])


class LinenNet(nn.Module):
    """The same of Linen."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), name="conv")(x).mean((1, 2))
        x = nn.DenseGeneral((2, 3), name="heads")(x).reshape(len(x), -1)
        rows = nn.scan(
            lambda row, x, _: (jnp.tanh(row(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = rows(nn.Dense(6, name="fc"), x, None)
        return nn.Dense(3, name="head")(x)


@functools.cache
def plain(net, dtype):
    """A model or its variables: how they start is the base's business."""
    if net is LinenNet:
        variables = net().init(jax.random.key(0), IMAGES)
        return jax.tree.map(lambda x: x.astype(dtype), variables)
    model = net(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
    return model


def in_nnx(dtype):
    """Trainable parameters, budgets, the logits of both, and what the files hold."""
    overrides = {"conv": {"path": "parallel", "kernel": "rbf"}}
    config = snella.SnellaConfig(targets="conv|heads|fc", overrides=overrides, **CONFIG)
    images = IMAGES.astype(dtype)
    model = snella.adapt(plain(Net, dtype), config, rngs=nnx.Rngs(1))
    graphdef, trainable, budgets, frozen = snella.partition(model)

    def logits(trainable, budgets):
        return nnx.merge(graphdef, trainable, budgets, frozen)(images)

    def files(trainable, budgets, folder):
        model = nnx.merge(graphdef, trainable, budgets, frozen)
        snella.save(model, folder)
        found = {
            "merged": snella.merge(model)(images),
            "loaded": called(snella.load(plain(Net, dtype), folder), images),
            "magnitude": snella.merged_magnitude(model),
        }
        return found, snella.describe(model), snella.sparsity(model)

    return trainable, budgets, logits, files


def in_linen(dtype):
    net, key, variables = LinenNet(), jax.random.key(0), plain(LinenNet, dtype)
    images = IMAGES.astype(dtype)
    config = snella.SnellaConfig(targets="conv|heads|fc", **CONFIG)
    adapters, params = linen.adapt(net, variables, config, images, key=key)
    trainable, budgets, frozen = adapters.partition(params)

    def logits(trainable, budgets):
        params = linen.join(trainable, budgets, frozen)
        return adapters.apply({"params": params}, images)

    def files(trainable, budgets, folder):
        params = linen.join(trainable, budgets, frozen)
        adapters.save(params, folder)
        again, loaded = linen.load(net, variables, folder, images)
        found = {
            "merged": net.apply({"params": adapters.merge(params)}, images),
            "loaded": run(again.apply, loaded, images),
        }
        weights = adapters.weights(params)
        return found, snella.describe(weights), snella.sparsity(weights)

    return trainable, budgets, logits, files


def in_a_tree(dtype):
    rng = np.random.default_rng(0)
    x = IMAGES.reshape(len(IMAGES), -1).astype(dtype)
    shapes = {"fc": (32, 6), "w": (6, 6), "head": (6, 3)}
    params = {
        k: jnp.asarray(0.3 * rng.normal(size=s), dtype) for k, s in shapes.items()
    }
    config = snella.SnellaConfig(targets="fc|w", **CONFIG)
    adapters, adapted = pytree.adapt(params, config, key=jax.random.key(0))
    trainable, budgets, frozen = adapters.partition(adapted)

    def net(p):
        return jnp.tanh(x @ p["fc"]) @ p["w"] @ p["head"]

    def logits(trainable, budgets):
        return net(adapters.summed(pytree.join(trainable, budgets, frozen)))

    def files(trainable, budgets, folder):
        adapted = pytree.join(trainable, budgets, frozen)
        adapters.save(adapted, folder)
        again, loaded = pytree.load(params, folder)
        found = {
            "merged": run(net, adapters.merge(adapted)),
            "loaded": run(net, again.merge(loaded)),
        }
        weights = adapters.weights(adapted)
        return found, snella.describe(weights), snella.sparsity(weights)

    return trainable, budgets, logits, files


BINDINGS = {"NNX": in_nnx, "Linen": in_linen, "pytree": in_a_tree}


def life(binding, dtype=jnp.float32):
    """Two steps, new budgets, one more step, and then merged, saved and loaded."""
    trainable, budgets, logits, files = BINDINGS[binding](dtype)
    labels = np.arange(len(IMAGES), dtype=np.int32) % 3

    @jax.jit
    def step(trainable, budgets, opt_state):
        def loss(trainable):
            found = logits(trainable, budgets).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, opt_state = TX.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    opt_state, losses, report = TX.init(trainable), [], None
    for index in range(3):
        if index == 2:
            budgets, report = snella.reallocate(budgets, opt_state, 60)
        trainable, opt_state, value = step(trainable, budgets, opt_state)
        losses.append(value)
    with tempfile.TemporaryDirectory() as folder:
        found, *text = files(trainable, budgets, f"{folder}/adapter")
    arrays = {
        "losses": losses,
        "trainable": jax.tree.leaves(trainable),
        "budgets": jax.tree.leaves(budgets),
        "scores": snella.importance(opt_state),
    }
    return arrays | found, [str(report), *map(str, text)]


@functools.cache
def usual_life(binding, dtype=jnp.float32):
    return life(binding, dtype)


@each_setting
@pytest.mark.parametrize("binding", BINDINGS)
def test_every_binding(binding, setting):
    """Steps, reallocation, merging, files and inspection."""
    expected, told = usual_life(binding)
    assert expected["losses"][-1] < expected["losses"][0]
    with SETTINGS[setting]():
        got, text = life(binding)
    assert_same(got, expected, setting)
    if setting != "disable_jit":  # scores are rounded otherwise
        assert text == told


@pytest.mark.parametrize("binding", BINDINGS)
def test_bfloat16_parameters_under_strict_dtypes(binding):
    """Where the base needs no promotion, its adapters need none from JAX."""
    expected, told = usual_life(binding, jnp.bfloat16)
    assert {leaf.dtype.name for leaf in expected["trainable"]} == {
        "bfloat16",
        "float32",
    }
    with jax.numpy_dtype_promotion("strict"):
        got, text = life(binding, jnp.bfloat16)
    assert_same(got, expected, "strict dtypes")
    assert text == told


@pytest.mark.parametrize(
    "name, shape",
    {
        "vit_ti16": {"depth": 1, "image_size": 32},
        "dinov2_s14": {"depth": 1, "image_size": 28},  # which scales its branches
        "swin_b": {
            **{"depths": (2, 2), "width": 8, "heads": (1, 2)},
            **{"image_size": 32, "window": 2},
        },
        "convnext_b": {"depths": (1,) * 4, "widths": (8,) * 4, "image_size": 32},
    }.items(),
)
@pytest.mark.parametrize("setting", ["rank promotion raises", "strict dtypes"])
def test_our_models_can_be_traced(name, shape, setting):
    model = models.create(name, num_classes=3, rngs=nnx.Rngs(0), **shape)
    images = jnp.zeros((2, *model.config.image_hw, 3))
    with SETTINGS[setting]():
        graphdef, state = nnx.split(model)
        made = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, images)
    assert (made.shape, made.dtype) == ((2, 3), jnp.float32)


# Stable Diffusion 3


def pictures():
    pipeline = models.sd3.load(ASSETS / "sd3" / "pipeline", t5_length=24)
    options = {"steps": 2, "size": (16, 24), "key": jax.random.key(0)}
    return np.asarray(pipeline(["a dog", "two dogs"], "grey", **options))


@each_setting
def test_pictures(setting):
    expected = pictures()
    with SETTINGS[setting]():
        found = pictures()
    assert found.dtype == np.uint8
    assert np.abs(np.int32(found) - np.int32(expected)).max() <= 1
