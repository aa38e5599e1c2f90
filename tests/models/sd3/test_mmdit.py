"""The MMDiT against NumPy in float64, its shapes, and what of it is adapted."""

import math
import re

import jax
import jax.numpy as jnp
import mmdit_oracle
import numpy as np
import pytest
from flax import nnx
from mmdit_files import INPUTS, close, single_of, tensors
from safetensors.numpy import save_file

import snella_jax as snella
from snella_jax import models
from snella_jax.models.sd3 import mmdit
from snella_jax.nnx.targets import chosen_targets

CONFIG = mmdit.MMDiTConfig(
    width=16, depth=3, heads=2, channels=4, positions=12, context_dim=20, pooled_dim=12
)
SINGLE = single_of(tensors(depth=3))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("single") / "sd3.safetensors"
    save_file(SINGLE, file)
    return file


@pytest.fixture(scope="module")
def expected():
    return mmdit_oracle.velocity(SINGLE, *INPUTS, heads=4)


@pytest.mark.parametrize("options", [{}, {"stacked": False, "remat": "blocks"}])
def test_velocities_are_those_of_float64(path, expected, options):
    model = mmdit.load(path, heads=4, **options)
    got = jax.jit(lambda *inputs: model(*inputs))(*INPUTS)
    close(got, expected)
    assert got.dtype == jnp.float32


def test_sixteen_bits_give_nearly_the_same(path, expected):
    model = mmdit.load(path, heads=4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    got = jax.jit(lambda *inputs: model(*inputs))(*INPUTS)
    assert got.dtype == jnp.float32
    kinds = {v.dtype for v in jax.tree.leaves(nnx.state(model))}
    assert kinds == {jnp.dtype(jnp.bfloat16)}
    assert abs(got - expected).max() < 0.05 * abs(expected).max()


def test_gradients_are_the_same_recomputed_and_one_projection_has_none(path):
    def loss(graphdef, params, rest):
        return (nnx.merge(graphdef, params, rest)(*INPUTS) ** 2).mean()

    found = {}
    for kind, options in (("plain", {}), ("again", {"remat": "blocks"})):
        model = mmdit.load(path, heads=4, **options)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        found[kind] = jax.jit(jax.grad(loss, 1), static_argnums=0)(
            graphdef, params, rest
        )
    plain, again = (dict(nnx.to_flat_state(found[kind])) for kind in found)
    largest = max(abs(v[...]).max() for v in plain.values())
    for name, value in plain.items():
        assert abs(value[...] - again[name][...]).max() <= 1e-6 * largest, name
    dead = set()
    for name, value in plain.items():
        rows = value[...].reshape(2 if name[0] == "blocks" else 1, -1)
        dead |= set() if (rows != 0).any(1).all() else {"/".join(map(str, name))}
    assert dead == {f"last/context/attn/q/{kind}" for kind in ("kernel", "bias")}
    assert mmdit.MMDiT.no_gradient.keys() == {"last/context/attn/q"}


def test_sd3_medium_has_its_published_size_and_the_targets_of_dreambooth():
    model = nnx.eval_shape(lambda: models.create("sd3_medium", rngs=nnx.Rngs(0)))
    sizes = [math.prod(v.shape) for v in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) == 2_028_328_000
    assert model.positions.shape == (192, 192, 1536)

    def counted(regex):
        shapes = [t.weight.shape for t in chosen_targets(model, regex).values()]
        every = [(shape[-2:], math.prod(shape[:-2])) for shape in shapes]
        kinds = {kind for kind, _ in every}
        return {kind: sum(n for k, n in every if k == kind) for kind in kinds}

    assert counted(model.default_targets) == {(1536, 1536): 190}
    assert counted(model.all_targets) == {
        (1536, 1536): 190,
        (1536, 6144): 47,
        (6144, 1536): 47,
    }
    config = snella.SnellaConfig().names(model)
    assert (config.targets, config.trainable) == (model.default_targets, "")


def test_the_projection_without_a_gradient_is_no_target(path):
    model = nnx.eval_shape(lambda: mmdit.MMDiT(CONFIG, rngs=nnx.Rngs(0)))
    every = r".*/attn/(q|k|v|proj)"
    with pytest.raises(ValueError, match="last/context/attn/q, whose gradient is al"):
        chosen_targets(model, every)
    config = snella.SnellaConfig(targets=every)
    with pytest.raises(ValueError, match="the text's tokens are dropped"):
        snella.adapt(model, config, rngs=nnx.Rngs(0))
    listed = models.unstack(mmdit.load(path, heads=4))
    assert len(chosen_targets(listed, listed.default_targets)) == 8 * 2 + 6
    found = {p for p in chosen_targets(listed, listed.all_targets) if "mlp" in p}
    assert len(found) == 4 * 2 + 2


def inputs(**changed):
    names = ("latents", "timestep", "context", "pooled")
    given = dict(zip(names, map(np.asarray, INPUTS), strict=True))
    return {name: changed.get(name, value) for name, value in given.items()}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"latents": np.ones((2, 8, 12, 3), "f4")}, ValueError, "[B, h, w, 4]"),
        ({"latents": np.ones((8, 12, 4), "f4")}, ValueError, "[B, h, w, 4]"),
        ({"latents": np.ones((2, 7, 12, 4), "f4")}, ValueError, "patch=2 divides"),
        ({"latents": np.ones((2, 8, 26, 4), "f4")}, ValueError, "of at most 24"),
        ({"timestep": np.ones(3, "f4")}, ValueError, "timestep has shape (3,): ex"),
        ({"timestep": np.ones(2, "f2")}, TypeError, "timestep is float16"),
        ({"timestep": np.ones(2, "i4")}, TypeError, "timestep is int32"),
        ({"context": np.ones((2, 5, 19), "f4")}, ValueError, "expected [2, 5, 20]"),
        ({"context": np.ones((2, 20), "f4")}, ValueError, "expected [2, S, 20]"),
        ({"pooled": np.ones((1, 12), "f4")}, ValueError, "expected [2, 12]"),
    ],
)
def test_other_inputs_are_refused(changed, error, message):
    model = nnx.eval_shape(lambda: mmdit.MMDiT(CONFIG, rngs=nnx.Rngs(0)))
    with pytest.raises(error, match=re.escape(message)):
        nnx.eval_shape(lambda: model(**inputs(**changed)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 1}, "depth=1: expected at least 2"),
        ({"patch": 0}, "patch=0: expected at least 1"),
        ({"heads": 3}, "heads=3 divides"),
        ({"width": 30, "heads": 2}, "width=30: expected a multiple of 4"),
        ({"norm_eps": math.nan}, "norm_eps=nan"),
        ({"remat": "all"}, "remat='all'"),
        ({"attention": "flash"}, "attention='flash'"),
    ],
)
def test_other_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mmdit.MMDiTConfig(**{"width": 16, "heads": 2, **fields})
