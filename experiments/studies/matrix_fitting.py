"""Measures how well kernels fit sparse matrices with thin factors (Eq. 15, Fig. 4(b)).

    python -m experiments.studies.matrix_fitting

The matrices are random, sparse and of several ranks, each divided by its root mean
square, so that a mean squared error (MSE) of 1 is that of fitting nothing. Every kernel
fits all of them at once by Adam. The paper gives the rate, the steps and the number of
matrices, 10; their sizes, ranks and densities, and the factors' rank, are ours. Prints
a table and writes `matrix_fitting.json` and `matrix_fitting.png` into `--out`. The JSON
file keeps every kernel that is finished: the same command goes on with the others.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import snella_jax as snella
from experiments import files, hardware, terminal
from experiments.paths import Given, check_out
from experiments.reports import result_files
from experiments.studies import kernel_figures

Name = Literal[
    "linear", "piecewise_linear", "rbf", "sigmoid", "normalized_rbf", "mix_k"
]
PAPERS_ORDER: tuple[Name, ...] = ("linear", "piecewise_linear", "rbf", "mix_k")
POINTS = 60  # of a curve
NAME = "matrix_fitting"
PROGRAM = "python -m experiments.studies.matrix_fitting"


@dataclasses.dataclass(frozen=True)
class FittingConfig:
    """Options of `python -m experiments.studies.matrix_fitting`."""

    kernels: tuple[Name, ...] = (*PAPERS_ORDER, "sigmoid", "normalized_rbf")
    """Kernels to compare."""
    size: int = 64
    """Rows and columns of the matrices."""
    ranks: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Ranks of the matrices."""
    density: float = 0.1
    """Approximate share of the matrices' entries that are not 0."""
    positive: bool = False
    """Matrices have no negative entries: rbf and sigmoid, which have one alpha, make
    numbers of one sign only."""
    matrices: int = 10
    """Number of matrices of each rank."""
    rank: int = 8
    """Rank of the factors that fit the matrices."""
    steps: int = 100_000
    """Steps of Adam."""
    lr: float = 1e-4
    """Learning rate of Adam."""
    seed: int = 0
    """Seed of the matrices and of the initial factors."""
    out: Given = Path("runs/matrix_fitting")
    """Folder to write matrix_fitting.json and matrix_fitting.png into."""

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail later."""
        for name in ("size", "matrices", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if not self.kernels or not self.ranks:
            raise ValueError("expected at least one kernel and one rank.")
        if not all(1 <= rank <= self.size for rank in self.ranks):
            raise ValueError(f"ranks={self.ranks}: expected 1 to size={self.size}.")
        if not (0 < self.density <= 1 and self.lr > 0):
            raise ValueError(
                f"density={self.density}, lr={self.lr}: expected 0 < density <= 1 and "
                "lr > 0."
            )
        for name in self.kernels:
            kernel = snella.kernels.named(name)
            kernel.init(jax.random.key(0), (self.size, self.size), self.rank)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Fits what is left, and returns the content of `matrix_fitting.json`."""
    config = tyro.cli(FittingConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        config.check()
        check_out(config.out)
        result = _begun(config)
    console = terminal.console()
    targets = np.concatenate([matrices(config, rank) for rank in config.ranks])
    result["targets"] = {
        "rank": np.linalg.matrix_rank(targets).tolist(),
        "density": (targets != 0).mean((1, 2)).tolist(),
    }
    for name in config.kernels:
        if name not in result["kernels"]:
            try:
                result["kernels"][name] = _fitted(name, config, targets, console)
            except FloatingPointError as error:
                raise SystemExit(f"{PROGRAM}: {name}: {error}; lower --lr") from error
            files.write(config.out / f"{NAME}.json", result)
    draw, table = kernel_figures.fitting, _table(result)
    result_files.write(config.out, NAME, result, console, draw, table)
    console.print(_order(result), soft_wrap=True)
    return result


def matrices(config: FittingConfig, rank: int) -> Float[np.ndarray, "N n n"]:
    """Returns random matrices: sums of `rank` products of two sparse vectors.

    The entries of the vectors that are not 0 are normal. Each vector has at least one,
    and as many as make about `density` of a matrix's entries differ from 0.
    """
    rng = np.random.default_rng((config.seed, rank))
    share = (1 - (1 - config.density) ** (1 / rank)) ** 0.5
    entries = max(1, round(share * config.size))
    shape = (2, config.matrices, rank, config.size)
    vectors = rng.normal(size=shape)
    left, right = (np.abs(vectors) if config.positive else vectors) * (
        rng.permuted(np.broadcast_to(np.arange(config.size), shape), axis=-1) < entries
    )
    found = np.einsum("ckn,ckm->cnm", left, right)
    return found / np.sqrt(np.square(found).mean((1, 2), keepdims=True))


def fit(
    kernel: snella.kernels.Kernel,
    targets: Float[Array, "N n m"],
    rank: int,
    seed: int,
    lr: float,
    marks: list[int],
) -> Iterator[tuple[Float[np.ndarray, " N"], Float[np.ndarray, "N n m"]]]:
    """Fits every matrix by itself; yields MSE and fit after each number of steps.

    Adam and the MSE treat every number by itself, so all matrices are fitted at once.

    Raises:
      FloatingPointError: an MSE is not finite.
    """
    keys = jax.random.split(jax.random.key(seed), len(targets))
    shape = targets.shape[1], targets.shape[2]
    factors = jax.vmap(lambda key: kernel.init(key, shape, rank))(keys)
    tx = optax.adam(lr)

    def errors(factors):
        fits = jax.vmap(kernel.apply)(factors)
        return jnp.square(fits - targets).mean((1, 2)), fits

    def step(_, state):
        factors, opt_state = state
        gradient = jax.grad(lambda f: errors(f)[0].sum())(factors)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(factors, updates), opt_state

    measure = jax.jit(errors)
    run = jax.jit(lambda state, count: jax.lax.fori_loop(0, count, step, state))
    state, done = (factors, tx.init(factors)), 0
    for mark in marks:
        state, done = run(state, mark - done), mark
        found, fits = map(np.asarray, measure(state[0]))
        if not np.isfinite(found).all():
            raise FloatingPointError(f"an MSE is not finite after {mark} steps")
        yield found, fits


def _begun(config: FittingConfig) -> dict[str, Any]:
    """Reads the finished kernels; raises a `ValueError` if the settings differ."""
    settings = dataclasses.asdict(config)
    for name in ("out", "kernels"):
        settings.pop(name)
    settings = json.loads(json.dumps(settings))
    found = files.read(config.out / f"{NAME}.json")
    if found is None:
        device = f"{hardware.describe()}, jax {jax.__version__}"
        return {**settings, "device": device, "kernels": {}}
    if other := [name for name in settings if found.get(name) != settings[name]]:
        raise ValueError(
            f"{config.out / NAME}.json was made with another {', '.join(other)}: "
            "expected the same, or another --out."
        )
    return found


def _fitted(
    name: Name, config: FittingConfig, targets: np.ndarray, console: Console
) -> dict[str, Any]:
    marks = np.unique(np.geomspace(1, config.steps, POINTS).round().astype(int))
    found = fit(
        snella.kernels.named(name),
        jnp.asarray(targets, jnp.float32),
        config.rank,
        config.seed,
        config.lr,
        marks.tolist(),
    )
    curve, last = [], (np.empty(0), targets)
    with Progress(console=console) as bar:
        shown = bar.add_task(name, total=config.steps)
        for mark, last in zip(marks, found, strict=True):
            curve.append(last[0].reshape(len(config.ranks), -1).mean(1))
            text = f"{name} MSE {last[0].mean():.3f}"
            bar.update(shown, completed=int(mark), description=text)
    errors, fits = last
    shape = len(config.ranks), config.matrices
    return {
        "steps": marks.tolist(),
        "curves": np.transpose(curve).tolist(),
        "errors": errors.reshape(shape).tolist(),
        "fitted_ranks": np.linalg.matrix_rank(fits).reshape(shape).tolist(),
    }


def _table(result: dict[str, Any]) -> Table:
    sign = "non-negative " * result["positive"]
    title = (
        f"MSE of {result['matrices']} {sign}matrices of each rank, {result['size']} x "
        f"{result['size']}, fitted with factors of rank {result['rank']} in "
        f"{result['steps']:,} steps"
    )
    table = Table(title=title, caption="in brackets: the numerical rank of the fits")
    table.add_column("rank")
    for name in result["kernels"]:
        table.add_column(name, justify="right", overflow="fold")
    for index, rank in enumerate(result["ranks"]):
        cells = [
            f"{np.mean(own['errors'][index]):.4f} "
            f"({np.mean(own['fitted_ranks'][index]):.0f})"
            for own in result["kernels"].values()
        ]
        table.add_row(str(rank), *cells)
    table.add_section()
    means = [f"{mean:.4f}" for mean in _means(result).values()]
    table.add_row("all", *means)
    return table


def _means(result: dict[str, Any]) -> dict[str, float]:
    return {n: float(np.mean(own["errors"])) for n, own in result["kernels"].items()}


def _order(result: dict[str, Any]) -> str:
    """Says in a sentence whether the paper's order holds."""
    means = _means(result)
    ours = [name for name in PAPERS_ORDER if name in means]
    found = sorted(ours, key=lambda name: -means[name])
    if found == ours:
        return f"The paper's order holds: {' > '.join(ours)} in MSE."
    return f"The paper's order is {' > '.join(ours)} in MSE; here {' > '.join(found)}."


if __name__ == "__main__":
    main()
