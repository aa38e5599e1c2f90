"""Draws how two thin factors become a sparse update (docs/how_it_works.md).

    python -m experiments.studies.illustrated --out docs/how_it_works.png

Factors of `--rank` columns are fitted by Adam to a random matrix of twice that rank.
The picture has the factors, the update `delta` that Mix-K makes of them, its absolute
values with the threshold, and what passes it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float

import snella_jax as snella
from experiments import plotting, terminal
from experiments.paths import Given
from experiments.plotting import plt
from experiments.studies.matrix_fitting import FittingConfig, matrices

PROGRAM = "python -m experiments.studies.illustrated"
KERNEL = snella.kernels.mix_k()


@dataclasses.dataclass(frozen=True)
class IllustratedConfig:
    """Options of `python -m experiments.studies.illustrated`."""

    size: int = 40
    """Rows and columns of the matrix."""
    rank: int = 8
    """Columns of the factors."""
    density: float = 0.1
    """Share of the entries that pass the threshold."""
    steps: int = 4000
    """Steps of Adam at 1e-2."""
    out: Given = Path("runs/illustrated.png")
    """The PNG to write."""

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail later."""
        if not 0 < self.density < 1:
            raise ValueError(f"density={self.density}: expected between 0 and 1.")
        if self.steps < 1 or self.size < 2:
            raise ValueError(
                f"steps={self.steps}, size={self.size}: expected at least 1 and 2."
            )
        KERNEL.init(jax.random.key(0), (self.size, self.size), self.rank)


def main(argv: Sequence[str] | None = None) -> None:
    """Fits, and draws."""
    config = tyro.cli(IllustratedConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        config.check()
    fitting = FittingConfig(size=config.size, matrices=1, density=1.0)
    target = jnp.asarray(matrices(fitting, rank=2 * config.rank)[0], jnp.float32)
    factors = fitted(target, config.rank, config.steps)
    draw(config.out, factors, round(config.density * config.size**2))
    terminal.console().print(f"{config.out} is written", soft_wrap=True)


def fitted(target: Float[Array, "n m"], rank: int, steps: int) -> dict[str, Array]:
    """Returns factors whose update is close to a matrix."""
    factors = KERNEL.init(jax.random.key(0), target.shape, rank)
    tx = optax.adam(1e-2)

    def error(factors):
        return jnp.square(KERNEL.apply(factors) - target).mean()

    def step(_, state):
        factors, opt_state = state
        updates, opt_state = tx.update(jax.grad(error)(factors), opt_state)
        return optax.apply_updates(factors, updates), opt_state

    def run(factors):
        return jax.lax.fori_loop(0, steps, step, (factors, tx.init(factors)))[0]

    return jax.jit(run)(factors)


def draw(path: Path, factors: dict[str, Array], budget: int) -> None:
    """Draws factors, update, threshold and survivors.

    Args:
      path: the PNG to write.
      factors: those of one matrix of Mix-K.
      budget: number of entries that survive.
    """
    delta = KERNEL.apply(factors)
    tau = float(snella.threshold(delta, jnp.asarray(budget)))
    survivors = snella.sparsify(delta, jnp.asarray(budget), gate="hard")
    limit = float(jnp.abs(delta).max())
    figure, panels = plt.subplots(
        1, 5, figsize=(13, 3.4), width_ratios=(1, 1, 3, 3, 3), layout="constrained"
    )
    a, b, whole, sizes, sparse = panels
    for axes, name in ((a, "a"), (b, "b")):
        pieces = np.concatenate(np.asarray(factors[name]), 1)
        axes.imshow(pieces, cmap="PuOr", aspect="auto")
        axes.set(title=f"factor {name}", xlabel=f"{pieces.shape[1]} columns")
    shown = dict(cmap="RdBu", vmin=-limit, vmax=limit)
    mesh = whole.imshow(delta, **shown)
    whole.set_title("delta(a, b)")
    sparse.imshow(survivors, **shown)
    sparse.set_title(f"its {budget} largest of {delta.size}")
    figure.colorbar(mesh, ax=sparse)
    for axes in (a, b, whole, sparse):
        axes.set(xticks=[], yticks=[])
    bins = np.linspace(0, limit, 60)
    sizes.hist(np.abs(delta).ravel(), bins, color="lightgrey")
    passed = np.abs(delta)[np.abs(delta) > tau]
    sizes.hist(passed, bins, color="tab:blue")
    sizes.axvline(tau, color="black", linewidth=1)
    sizes.text(tau, sizes.get_ylim()[1], " tau", va="top")
    sizes.set(title="|delta|", ylabel="entries", box_aspect=1)
    plotting.save(figure, path)


if __name__ == "__main__":
    main()
