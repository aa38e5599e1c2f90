"""The kernel study: matrices as they should be, fits that are Adam's, figures."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import snella_jax as snella
from experiments.studies import kernel_curves, matrix_fitting
from experiments.studies.matrix_fitting import FittingConfig

SMALL = ["--size", "12", "--ranks", "1", "3", "--matrices", "2", "--rank", "4"]
SMALL += ["--steps", "40", "--lr", "0.01", "--kernels", "linear", "mix_k"]


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_matrices_have_their_rank_and_are_sparse(rank, positive):
    config = FittingConfig(size=64, density=0.1, matrices=20, positive=positive)
    found = matrix_fitting.matrices(config, rank)
    assert found.shape == (20, 64, 64)
    np.testing.assert_allclose(np.square(found).mean((1, 2)), 1)
    assert np.linalg.matrix_rank(found).max() == rank
    assert np.linalg.matrix_rank(found).mean() > rank - 0.2
    assert 0.05 < (found != 0).mean() < 0.15
    assert (found.min() < 0) != positive
    assert len({matrix.tobytes() for matrix in found}) == 20


@pytest.mark.parametrize("name", ["linear", "piecewise_linear", "rbf", "mix_k"])
def test_every_matrix_is_fitted_as_if_it_were_alone(name):
    """Against a plain loop of Adam on one matrix."""
    config = FittingConfig(size=8, matrices=3, ranks=(2,))
    targets = jnp.asarray(matrix_fitting.matrices(config, 2), jnp.float32)
    kernel = snella.kernels.named(name)
    *_, (errors, fits) = matrix_fitting.fit(kernel, targets, 4, 0, 0.05, [1, 7, 20])
    factors = kernel.init(jax.random.split(jax.random.key(0), 3)[1], (8, 8), 4)
    tx = optax.adam(0.05)
    state = tx.init(factors)

    def mse(factors):
        return jnp.mean((kernel.apply(factors) - targets[1]) ** 2)

    start = mse(factors)
    for _ in range(20):
        updates, state = tx.update(jax.grad(mse)(factors), state)
        factors = optax.apply_updates(factors, updates)
    np.testing.assert_allclose(errors[1], mse(factors), rtol=1e-4)
    np.testing.assert_allclose(fits[1], kernel.apply(factors), rtol=1e-3, atol=1e-4)
    assert errors[1] < 0.9 * start


def test_a_fit_of_full_rank_is_the_matrix():
    """The linear kernel with as many columns as the matrix has rank."""
    config = FittingConfig(size=8, matrices=2, ranks=(2,))
    targets = jnp.asarray(matrix_fitting.matrices(config, 2), jnp.float32)
    found = matrix_fitting.fit(snella.kernels.linear(), targets, 3, 0, 0.02, [3000])
    errors, fits = next(iter(found))
    assert (errors < 1e-5).all()
    np.testing.assert_allclose(fits, targets, atol=2e-2)


def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    inner, fitted = matrix_fitting._fitted, []

    def interrupt(name, *rest):
        fitted.append(name)
        if len(fitted) == 2:
            raise KeyboardInterrupt
        return inner(name, *rest)

    monkeypatch.setattr(matrix_fitting, "_fitted", interrupt)
    words = [*SMALL, "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        matrix_fitting.main(words)
    result = matrix_fitting.main(words)
    assert fitted == ["linear", "mix_k", "mix_k"]
    assert json.loads((tmp_path / "matrix_fitting.json").read_text("utf-8")) == result
    own = result["kernels"]["mix_k"]
    assert np.shape(own["errors"]) == np.shape(own["fitted_ranks"]) == (2, 2)
    assert np.shape(own["curves"]) == (2, len(own["steps"])) and own["steps"][-1] == 40
    assert np.mean(own["errors"], 1) == pytest.approx(np.array(own["curves"])[:, -1])
    assert result["targets"]["rank"] == [1, 1, 3, 3]
    assert (tmp_path / "matrix_fitting.png").stat().st_size > 10_000
    assert "linear > mix_k" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was made with another lr:"):
        matrix_fitting.main([*words, "--lr", "0.1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], r"ranks=\(0,\): expected 1 to size=64"),
        (["--rank", "3"], r"rank=3 is not a positive multiple of pieces=2"),
        (["--density", "0"], "density=0.0, lr=0.0001: expected 0 < density"),
        (["--steps", "0"], "steps=0: expected at least 1"),
    ],
)
def test_bad_options_are_said_before_anything_runs(tmp_path, words, message):
    with pytest.raises(SystemExit, match=message):
        matrix_fitting.main([*words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_fit_that_is_not_finite_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"linear: an MSE is not finite .* lower --lr"):
        matrix_fitting.main([*SMALL, "--lr", "1e30", "--out", str(tmp_path)])
    assert not (tmp_path / "matrix_fitting.json").exists()


def test_the_orders_are_compared():
    def result(**means):
        return {"kernels": {name: {"errors": [[mean]]} for name, mean in means.items()}}

    def said(**means):
        return matrix_fitting._order(result(**means))

    assert said(linear=0.4, mix_k=0.1, rbf=0.2).startswith("The paper's order holds")
    assert said(linear=0.4, mix_k=0.3, rbf=0.2).endswith("here linear > mix_k > rbf.")


def test_curves_are_the_kernels_of_one_number():
    x = np.linspace(-3, 3, 13)
    found = {name: np.array(kernel_curves.row(name, x)["values"])
             for name in snella.kernels.KERNELS}  # fmt: skip
    powers = np.exp(-np.abs(x))
    expected = {
        "linear": x,
        "piecewise_linear": -np.abs(x),
        "rbf": np.exp(-(x**2) / 2),
        "sigmoid": 1 / (1 + np.exp(-x)),
        "normalized_rbf": 13 * powers / powers.sum(),
        "mix_k": -np.abs(x) + 13 * powers / powers.sum(),
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)


def test_the_curves_are_drawn(tmp_path):
    result = kernel_curves.main(["--out", str(tmp_path)])
    assert [row["kernel"] for row in result["rows"]] == list(snella.kernels.KERNELS)
    assert (tmp_path / "kernel_curves.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match=r"reach=0\.0: expected more than 0"):
        kernel_curves.main(["--reach", "0"])


def test_defaults_are_the_papers():
    config = FittingConfig()
    assert (config.steps, config.lr, config.matrices) == (100_000, 1e-4, 10)
    assert dataclasses.replace(config, rank=8).check() is None
