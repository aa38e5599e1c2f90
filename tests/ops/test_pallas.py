"""Fused kernels, interpreted as plain JAX, against the plain code.

On an NVIDIA GPU (`-m gpu`) they run as they are.
`tests/benchmarks/test_fused_kernels.py` compiles them for devices that are not there.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from fused_layers import assert_close, inputs, outputs
from generic import weight_at_tau
from gpus import device
from jax.sharding import AxisType, PartitionSpec

import snella_jax as snella
from snella_jax import Layout, kernels, sparse_delta, threshold
from snella_jax.core.fused import fall_back, refusal
from snella_jax.ops.pallas import matrix, packed
from snella_jax.ops.pallas.gpu_weight import root
from snella_jax.ops.pallas.target import Target, assumed, current
from snella_jax.ops.pallas.tile import Form

# Tiles that do not divide the sizes.
TPU = Target("tpu", interpret=True, tile=(32, 128, 16))
GPU = Target("gpu", interpret=True, tile=(64, 128, 16))
SIZES = {"tpu": (40, 150), "gpu": (72, 136)}
MIX_K = kernels.mix_k()
RELEASED = kernels.mix_k(temperature=True, learn_piece_coeff=False)
PIECEWISE = kernels.piecewise_linear(pieces=3)

each_target = pytest.mark.parametrize("target", [TPU, GPU], ids=["tpu", "gpu"])


def assert_one_ulp(got, expected):
    places = [np.float32(v).view(np.int32).astype(np.int64) for v in (got, expected)]
    assert abs(places[0] - places[1]).max() <= 1


@pytest.mark.parametrize(
    ("target", "kernel", "gate", "density"),
    [
        (TPU, MIX_K, "product", 0.3),
        (TPU, RELEASED, "released", 0.05),
        (TPU, PIECEWISE, "soft", 0.3),
        (GPU, MIX_K, "product", 0.3),
        (GPU, RELEASED, "hard", 1.0),
    ],
)
def test_a_layer_is_the_plain_layer(target, kernel, gate, density):
    """Outputs, the gradients of x and of all parameters, in sizes with ragged tiles."""
    n, m = SIZES[target.platform]
    factors, x, w0, g = inputs(kernel, n, m)
    budget = int(density * n * m)
    if budget < n * m:
        row, column = weight_at_tau(kernel.apply(factors), budget)
        x, g = x.at[:, row].set(0), g.at[:, column].set(0)

    @jax.jit
    def both(x, w0, factors, g):
        how = {"kernel": kernel, "gate": gate}
        return [
            outputs(name, x, w0, factors, budget, g, **how)
            for name in ("pallas", "xla")
        ]

    with assumed(target):
        fused, plain = both(x, w0, factors, g)
    assert_close(fused, plain)
    assert np.abs(fused[3]["a"]).max() > 0


@each_target
def test_exactly_the_budget_survives(target):
    """tau is the plain code's to the last place, and so are the survivors."""
    n, m = SIZES[target.platform]
    factors, *_ = inputs(MIX_K, n, m)
    factors["alpha"] = jnp.float32(1)  # the softmax's sum is added in another order
    budget, form = 1234, Form(2, softmax=True, gate="hard")

    @jax.jit
    def update(factors):
        found = matrix.find(form, factors, jnp.int32(budget), target)
        operands = jnp.eye(n), jnp.zeros((n, m)), factors, found, target
        dense = MIX_K.apply(factors)
        tau = threshold(dense, budget)
        sparse = sparse_delta(factors, budget, kernel=MIX_K, gate="hard")
        return found.tau, tau, matrix.product(form, *operands), sparse

    tau, expected, delta, sparse = update(factors)
    assert_one_ulp(tau, expected)
    assert np.count_nonzero(delta) == budget
    assert_close(delta, sparse)


@pytest.mark.parametrize("budget", [0, 1, 3, 6, 7, 9])
@pytest.mark.parametrize(
    "sizes",
    [
        [0.5, 1.0, 1.0, 1.0, 2.0, 1e-45, 0.0, 3e38, np.inf],
        [np.nan, np.nan, np.inf, 0.0, 0.0, 0.0, 1.0, np.nextafter(1, 2), 2.0],
    ],
)
def test_a_search_of_counts(sizes, budget):
    """Ties, zeros, subnormals, neighbours and NaN: tau, and who exceeds the limit."""
    sizes = np.float32(sizes)
    bits = jnp.asarray(sizes.view(np.int32))

    def count(candidates):
        return jnp.sum(bits[:, None] >= candidates, 0, dtype=jnp.int32)

    tau, limit = jax.jit(packed.search, static_argnums=(0, 2))(
        count, jnp.int32(budget), 9
    )
    largest_first = np.sort(sizes.view(np.int32))[::-1]
    expected = largest_first[budget] if budget < 9 else 0
    assert tau.view(np.int32) == expected
    survives = (bits > expected) | np.isnan(sizes) | (budget == 9)
    np.testing.assert_array_equal(bits > limit, survives)


def test_a_sketch_is_the_plain_layers():
    """Batched rows, kept ones among them, and a bias's gradient beside."""
    n, m = SIZES["tpu"]
    factors, x, w0, g = inputs(MIX_K, n, m, rows=20)
    x, g = (v.reshape(2, 10, -1) for v in (x, g))
    how = {"sketch": 4, "keep_rows": (0,), "key": jax.random.key(3), "kernel": MIX_K}

    @jax.jit
    def both(*operands):
        return [outputs(name, *operands, 1500, g, **how) for name in ("pallas", "xla")]

    with assumed(TPU):
        fused, plain = both(x, w0, factors)
    assert_close(fused, plain)


def test_local_shards():
    """Inside shard_map the kernels work on what a device has."""
    factors, x, w0, g = inputs(MIX_K, 8, 16, rows=8)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def local(x, w0, factors, g):
        y, dx, dw0, grads = outputs("pallas", x, w0, factors, 40, g, kernel=MIX_K)
        return y, dx, *jax.lax.psum((dw0, grads), "data")

    # JAX's interpreter of kernels knows no types that vary: compilers do.
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, whole, whole, rows),
        out_specs=(rows, rows, whole, whole),
        check_vma=False,
    )
    with assumed(TPU):
        fused = jax.jit(sharded)(x, w0, factors, g)
    plain = functools.partial(outputs, "xla", budget=40, kernel=MIX_K)
    assert_close(fused, jax.jit(plain)(x, w0, factors, g=g))


def test_a_model_of_rules():
    """An NNX layer's bias and casts stay its own business."""

    class Net(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(8, 16, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)

        def __call__(self, x):
            return self.fc(x)

    def gradients(implementation):
        settings = {"targets": "fc", "trainable": "fc/bias", "rank": 4}
        config = snella.SnellaConfig(**settings, implementation=implementation)
        model = snella.adapt(Net(), config, rngs=nnx.Rngs(1))
        graphdef, trainable, budgets, frozen = snella.partition(model)

        def loss(trainable):
            model = nnx.merge(graphdef, trainable, budgets, frozen)
            return jnp.sum(jnp.sin(model(jnp.ones((3, 8)))).astype(jnp.float32))

        return nnx.to_pure_dict(jax.jit(jax.grad(loss))(trainable))

    plain = gradients("xla")
    with assumed(TPU):
        fused = gradients("pallas")
    assert "bias" in plain["fc"]
    assert_close(fused, plain, rtol=2e-2)  # bfloat16: sums are rounded at other places


def test_square_roots():
    """A GPU's lacks one in Pallas; ours is a unit in the last place off at most."""
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(-60, 60, 10_000)).astype(np.float32)
    assert_one_ulp(jax.jit(root)(x), np.sqrt(x))
    assert float(root(jnp.float32(0))) == 0


# Falling back


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"path": "parallel"}, "path='parallel'"),
        ({"kernel": kernels.rbf()}, "rbf("),
        ({"kernel": kernels.mix_k(normalize_over="in")}, "normalize_over='in'"),
        ({"gate": "none"}, "gate='none'"),
        ({"layout": Layout((8,), (2, 8))}, "one matrix"),
        ({"layout": Layout((8,), (8,), (2,), fused=True)}, "one matrix"),
        ({"sharding": PartitionSpec("model")}, "sharding"),
        ({"dtype": jnp.float64}, "float64"),
        ({"rank": 66}, "rank=66"),
        ({"m": 96, "target": Target("gpu")}, "(8, 96) on a GPU"),
        ({"target": None}, "cpu: expected a TPU from v5e or an NVIDIA GPU from Hopper"),
    ],
)
def test_what_no_kernel_serves(changes, why, x64):
    how = {"kernel": MIX_K, "gate": "product", "layout": None, "path": "merged"}
    how |= {"sharding": None} | {k: v for k, v in changes.items() if k in how}
    how |= {"sharding": changes.get("sharding")}
    rank, m = changes.get("rank", 6), changes.get("m", 16)
    dtype = changes.get("dtype", jnp.float32)
    factors, x, w0, _ = inputs(MIX_K, 8, m, rank=rank, dtype=dtype)
    target = changes.get("target", TPU)
    if target is None:
        assert why in refusal(x, w0, factors, **how)
        return
    with assumed(target):
        assert why in refusal(x, w0, factors, **how)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_is_refused(kind):
    factors, x, w0, _ = inputs(MIX_K, 8, 16)
    how = {"kernel": MIX_K, "gate": "product", "layout": None, "path": "merged"}
    mesh, found = jax.make_mesh((2,), ("data",), axis_types=(kind,)), []

    def layer(x):
        found.append(refusal(x, w0, factors, sharding=None, **how))

    with assumed(TPU), jax.set_mesh(mesh):
        jax.eval_shape(layer, x)
    assert "expected jax.shard_map" in found[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Target("gpu")),
        ({"capability": "10.0"}, Target("gpu")),
        ({"capability": "8.0"}, None),
        ({"version": "PJRT C API\nrocm 60300", "capability": "gfx942"}, None),
    ],
)
def test_gpus_from_hopper_on(monkeypatch, settings, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device(**settings)])
    assert current() == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("TPU v5 lite", Target("tpu")), ("TPU v6 lite", Target("tpu")), ("TPU v4", None)],
)
def test_tpus_from_v5e_on(monkeypatch, kind, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    assert current() == expected


def test_several_devices_are_refused(monkeypatch):
    """Which of them a program runs on is not known where it is traced."""
    factors, x, w0, _ = inputs(MIX_K, 8, 16)
    how = {"kernel": MIX_K, "gate": "product", "layout": None, "path": "merged"}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="TPU v5")])
    assert "devices: expected one" in refusal(x, w0, factors, sharding=None, **how)


def test_falling_back_is_said_once_and_is_the_plain_code(caplog):
    fall_back.cache_clear()
    factors, x, w0, g = inputs(MIX_K, 8, 16)
    layer = jax.jit(
        functools.partial(outputs, budget=40, kernel=MIX_K), static_argnums=0
    )
    names = "pallas", "xla"
    fused, plain = (layer(name, x, w0, factors, g=g) for name in names)
    layer.clear_cache()
    layer("pallas", x, w0, factors, g=g)
    assert [r.getMessage() for r in caplog.records] == [
        'implementation="pallas" falls back to "xla": there is no kernel for cpu: '
        "expected a TPU from v5e or an NVIDIA GPU from Hopper on."
    ]
    jax.tree.map(np.testing.assert_array_equal, fused, plain)


def test_an_operation_that_is_no_product_falls_back(caplog):
    fall_back.cache_clear()
    factors, x, w0, _ = inputs(MIX_K, 8, 16)
    layer = snella.adapted(lambda x, w: jnp.sin(x @ (2 * w)))
    with assumed(TPU):
        layer(x, w0, factors, 40, kernel=MIX_K, implementation="pallas")
    assert "does not only multiply by its weight" in caplog.text


@pytest.mark.parametrize("target", [TPU, GPU])
def test_a_default_precision_does_not_fall_back(target, caplog):
    """As the plain layer in it; a call that asks for another one does fall back."""
    fall_back.cache_clear()
    factors, x, w0, g = inputs(MIX_K, 8, 16)
    with jax.default_matmul_precision("highest"), assumed(target):
        fused, plain = (
            outputs(name, x, w0, factors, budget=40, kernel=MIX_K, g=g)
            for name in ("pallas", "xla")
        )
    assert_close(fused, plain, 1e-5)
    assert not caplog.records
    own = snella.adapted(lambda x, w: jnp.matmul(x, w, precision="highest"))
    with assumed(target):
        own(x, w0, factors, 40, kernel=MIX_K, implementation="pallas")
    assert "does not only multiply by its weight" in caplog.text


def test_an_unknown_implementation():
    with pytest.raises(ValueError, match="auto, xla, pallas"):
        snella.SnellaConfig(implementation="cuda")


# On a GPU


def test_what_a_gpu_runs_is_lowered():
    """Without one: that this JAX's Mosaic GPU takes the kernels."""
    factors, x, w0, g = inputs(MIX_K, 72, 192, rank=2, dtype=jnp.bfloat16)
    layer = functools.partial(outputs, "pallas", budget=2000, kernel=MIX_K)
    with assumed(Target("gpu")):
        traced = jax.jit(layer).trace(x, w0, factors, g=g)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("softmax_statistics", "counts", "merged", "gradients", "softmax_tail"):
        assert f"snella_{name}" in text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("kernel", "gate"),
    [(MIX_K, "product"), (RELEASED, "released"), (PIECEWISE, "soft"), (MIX_K, "hard")],
)
def test_a_gpus_kernels(kernel, gate, dtype, caplog):
    """Values and gradients, in ragged tiles and panels, within the dtype's rounding."""
    fall_back.cache_clear()
    n, m = 776, 1088
    factors, x, w0, g = inputs(kernel, n, m, rows=197, dtype=dtype)
    how = {"kernel": kernel, "gate": gate}
    with jax.default_matmul_precision("highest"):
        fused, plain = (
            jax.jit(functools.partial(outputs, name, budget=200_000, **how))(
                x, w0, factors, g=g
            )
            for name in ("pallas", "xla")
        )
    assert_close(fused, plain, 2e-2 if dtype == jnp.bfloat16 else 1e-5)
    assert not caplog.records


@pytest.mark.gpu
def test_exactly_the_budget_survives_on_a_gpu():
    """What the product makes again is what the search has counted."""
    factors, *_ = inputs(MIX_K, 768, 3072, rank=8)
    form, target = Form(2, softmax=True, gate="hard"), Target("gpu")
    for budget in (1, 707_788, 768 * 3072 - 1):
        found = matrix.find(form, factors, jnp.int32(budget), target)
        operands = jnp.eye(768), jnp.zeros((768, 3072)), factors, found, target
        with jax.default_matmul_precision("highest"):
            delta = matrix.product(form, *operands)
        assert np.count_nonzero(delta) == budget
