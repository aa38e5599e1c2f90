"""Numbers computed outside the library: the released layers and the paper's equations.

`golden/README.md` says what the files hold.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generic import run
from places import GOLDEN

from snella_jax import adapted_dense, kernels, sparse_delta, threshold
from snella_jax.ops.pallas.target import Target, assumed

PAPER = {
    "paper_mix_k_over_out_24x40_r8": kernels.mix_k(),
    "paper_mix_k_over_out_33x17_r4": kernels.mix_k(),
    "paper_mix_k_over_in_20x28_r6": kernels.mix_k(normalize_over="in"),
}
# The released kernels keep their piece coefficients fixed.
PIECEWISE = kernels.piecewise_linear(learn_piece_coeff=False)
MIX_K = kernels.mix_k(temperature=True, learn_piece_coeff=False)
RELEASED_DENSE = {
    "released_piecewise_linear_24x40_r8": PIECEWISE,
    "released_piecewise_linear_33x17_r4": PIECEWISE,
    "released_mix_k_24x40_r8": MIX_K,
    "released_mix_k_33x17_r4": MIX_K,
}
RELEASED_SPARSE = {
    "released_snell_24x40_r8": PIECEWISE,
    "released_snell_33x17_r4": PIECEWISE,
    "released_snella_24x40_r8": MIX_K,
    "released_snella_33x17_r4": MIX_K,
}

NAMES = ("a", "b", "piece_coeff", "alpha", "beta", "gamma")
# Relative to the largest element of an array: a float32 sum of terms that cancel is
# exact to a part of the terms, not of the result.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def in_both_dtypes(files):
    """Every file in float64, and one of every kernel in float32."""
    first = {kernel: file for file, kernel in reversed(files.items())}
    cases = [(file, "float64") for file in files]
    cases += [(file, "float32") for file in sorted(first.values())]
    return pytest.mark.parametrize("file, dtype", cases)


def load(file, dtype="float64"):
    """The arrays in a dtype; the released scalars lose their axis of length 1."""
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        found = {name: arrays[name] for name in arrays}
    return {
        name: (value[0] if value.shape == (1,) else value).astype(
            dtype if value.dtype == np.float64 else value.dtype
        )
        for name, value in found.items()
    }


def factors_of(gold):
    return {name: jnp.asarray(gold[name]) for name in NAMES if name in gold}


def assert_close(got, expected):
    assert got.dtype == expected.dtype
    atol = TOLERANCE[str(expected.dtype)] * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def assert_golden(gold, functions):
    """`y` and every `grad_*` of `sum(y * cotangent)`, for each `y = f(x, factors)`."""
    expected = {name: gold[name] for name in gold if name.startswith("grad_")}

    def outputs_and_gradients(x, factors):
        vjps = [jax.vjp(function, x, factors) for function in functions]
        return [(y, vjp(jnp.asarray(gold["cotangent"]))) for y, vjp in vjps]

    x, factors = jnp.asarray(gold["x"]), factors_of(gold)
    for y, (grad_x, grads) in run(outputs_and_gradients, x, factors):
        assert_close(y, gold["y"])
        got = {"grad_x": grad_x} | {f"grad_{name}": grads[name] for name in grads}
        # The released coefficients are fixed: no gradient of theirs is in the files.
        assert got.keys() - expected.keys() <= {"grad_piece_coeff"}
        for name, value in expected.items():
            assert_close(got[name], value)


def assert_golden_layer(gold, w0, budget, kernel, gate):
    """`assert_golden` for both paths of `adapted_dense`."""
    settings = {"kernel": kernel, "gate": gate}

    def merged(x, factors):
        return adapted_dense(x, w0, factors, budget, path="merged", **settings)

    def parallel(x, factors):
        return adapted_dense(x, w0, factors, budget, path="parallel", **settings)

    assert_golden(gold, [merged, parallel])


def test_every_file_is_checked():
    """A file that no table names would be checked by nothing."""
    assert {f.stem for f in GOLDEN.glob("*.npz")} == (
        PAPER.keys() | RELEASED_DENSE.keys() | RELEASED_SPARSE.keys()
    )


@in_both_dtypes(PAPER)
def test_paper_output_and_gradients(file, dtype, x64):
    gold = load(file, dtype)
    w0 = jnp.asarray(gold["w0"])
    assert_golden_layer(gold, w0, gold["budget"], PAPER[file], "product")


@in_both_dtypes(PAPER)
def test_paper_update(file, dtype, x64):
    gold, kernel = load(file, dtype), PAPER[file]

    def update(factors):
        sparse = sparse_delta(factors, gold["budget"], kernel=kernel)
        return kernel.apply(factors), sparse

    dense, sparse = run(update, factors_of(gold))
    assert_close(dense, gold["delta_dense"])
    assert_close(sparse, gold["delta_sparse"])
    assert np.array_equal(sparse != 0, gold["delta_sparse"] != 0)


@pytest.mark.parametrize(
    ("file", "gate", "platform"),
    [
        ("paper_mix_k_over_out_24x40_r8", "product", "tpu"),
        ("paper_mix_k_over_out_33x17_r4", "product", "tpu"),
        ("released_snell_33x17_r4", "released", "tpu"),
        ("paper_mix_k_over_out_24x40_r8", "product", "gpu"),
        ("released_snella_24x40_r8", "released", "gpu"),
    ],
)
def test_fused_kernels(file, gate, platform, caplog):
    """The merged path by Pallas, interpreted, in float32; no layer falls back."""
    gold = load(file, "float32")
    w0 = gold.get("w0", np.zeros_like(gold["delta_dense"]))
    budget = gold.get("budget", gold.get("nonzero"))
    how = {"kernel": (PAPER | RELEASED_SPARSE)[file], "gate": gate}

    def layer(x, factors):
        how["implementation"] = "pallas"
        return adapted_dense(x, jnp.asarray(w0), factors, int(budget), **how)

    with assumed(Target(platform, interpret=True)):
        assert_golden(gold, [layer])
    assert not caplog.records


@pytest.mark.parametrize("file", PAPER)
def test_paper_threshold_bit_for_bit(file, x64):
    gold = load(file)
    tau = threshold(jnp.asarray(gold["delta_dense"]), gold["budget"])
    assert tau.dtype == np.float64
    assert tau.tobytes() == gold["threshold"].tobytes()


@in_both_dtypes(RELEASED_DENSE)
def test_released_kernel(file, dtype, x64):
    """The released kernels without sparsity: `y = x @ delta`."""
    gold, kernel = load(file, dtype), RELEASED_DENSE[file]
    assert_close(run(kernel.apply, factors_of(gold)), gold["delta_dense"])
    assert_golden(gold, [lambda x, factors: x @ kernel.apply(factors)])


@in_both_dtypes(RELEASED_SPARSE)
def test_released_layer(file, dtype, x64):
    """The released layers, with as many survivors: only tau is another number.

    Their tau, a quantile, is interpolated between two neighbouring magnitudes; ours is
    the lower of the two. The same weights are above either, and the released gate's
    values do not depend on tau, so everything else is equal.
    """
    gold = load(file, dtype)
    w0 = jnp.zeros_like(gold["delta_dense"])
    assert_golden_layer(gold, w0, gold["nonzero"], RELEASED_SPARSE[file], "released")


@pytest.mark.parametrize("file", RELEASED_SPARSE)
def test_released_survivors_and_threshold(file, x64):
    """Their interpolated tau lies from ours up to the smallest survivor.

    A quantile between two order statistics splits the magnitudes exactly there: ours is
    the largest that does not survive.
    """
    gold, kernel = load(file), RELEASED_SPARSE[file]
    budget = gold["nonzero"]

    def update(factors):
        return sparse_delta(factors, budget, kernel=kernel, gate="released")

    sparse = run(update, factors_of(gold))
    survives = gold["delta_sparse"] != 0
    assert np.count_nonzero(survives) == budget
    assert np.array_equal(sparse != 0, survives)
    assert_close(sparse, gold["delta_sparse"])

    smallest = np.abs(gold["delta_dense"])[survives].min()
    tau = threshold(jnp.asarray(gold["delta_dense"]), budget)
    assert tau <= abs(gold["threshold"]) < smallest
